"""A loopback server, a clock that only sleeping moves, and a client of both."""

import pytest
from comfyui_skyreels.wiro_api import transport
from support.wiro_client import Clock, make_client
from support.wiro_server import WiroServer


@pytest.fixture
def server():
    with WiroServer() as server:
        yield server


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def client(server, clock):
    return make_client(server, clock)


@pytest.fixture
def calls_at_once(monkeypatch):
    """For services without a network: no call has to be left, so none needs its own thread."""

    def call(exchange, *_, **__):
        return exchange()

    monkeypatch.setattr(transport, "_in_time", call)
