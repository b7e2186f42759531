"""Weights are on a device only while they are used."""

import torch
from comfyui_skyreels.skyreels import offload


def test_onloaded_tensors_are_put_back_as_the_same_objects():
    module = torch.nn.Linear(3, 3)
    before = {name: (p, p.data_ptr()) for name, p in module.named_parameters()}
    with offload.on_device(module, torch.device("cpu")):
        pass
    assert {name: (p, p.data_ptr()) for name, p in module.named_parameters()} == before
