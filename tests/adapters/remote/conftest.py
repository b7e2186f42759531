"""What the tests of the remote nodes share: pictures that are encoded once."""

import pytest
from comfyui_skyreels.nodes.remote import batch, inputs, nodes

_png_part, _parts = inputs.png_part, {}


def kept_png_part(image, size="", fit="crop"):
    """As `inputs.png_part`, which takes 30 ms, remembering what it made of which pixels."""
    key = (image[:1].numpy().tobytes(), tuple(image.shape), image.dtype, size, fit)
    if key not in _parts:
        _parts[key] = _png_part(image, size, fit)
    return _parts[key]


@pytest.fixture(autouse=True)
def pictures_encoded_once(monkeypatch):
    """Most of these tests send the same few pictures."""
    for module in (batch, inputs, nodes):
        monkeypatch.setattr(module, "png_part", kept_png_part)


@pytest.fixture
def forget_pictures():
    """Called where the encoder changes."""
    yield _parts.clear
    _parts.clear()
