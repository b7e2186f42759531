"""A loopback server, a clock that only sleeping moves, and a client of both."""

import pytest
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
