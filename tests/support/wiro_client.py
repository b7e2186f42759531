"""A client whose time only moves when it sleeps, and a run to make with it."""

from typing import Any

from comfyui_skyreels.wiro_api.client import Client, Model
from comfyui_skyreels.wiro_api.listener import RunListener
from comfyui_skyreels.wiro_api.signing import Credentials

from support.wiro_server import KEY, NOW, SECRET

MODEL = Model("wiro", "SkyReels-V1")
PARAMETERS = {
    "inputImageUrl": "", "prompt": "FPS-24, a woman smiles", "negativePrompt": "", "scale": 6.0,
    "numFrames": 97, "size": "960x544", "steps": 30,
}  # fmt: skip


class Clock:
    """A time that only sleeping moves."""

    def __init__(self) -> None:
        self.time_s = 0.0
        self.sleeps: list[float] = []

    def __call__(self) -> float:
        return self.time_s

    def now(self) -> float:
        return NOW + self.time_s

    def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.time_s += seconds


def make_client(server, clock, key: str = KEY, secret: str = SECRET) -> Client:
    return Client(
        Credentials(key, secret), base_url=server.url, sleep=clock.sleep, clock=clock,
        now=clock.now,
    )  # fmt: skip


def listening(**methods: Any) -> RunListener:
    """A listener with some methods replaced."""
    listener = RunListener()
    vars(listener).update(methods)
    return listener
