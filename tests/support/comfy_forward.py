# ruff: noqa: E402 - ComfyUI chooses its device when it is imported
"""Run inside ComfyUI's own environment: its HunyuanVideo transformer on saved inputs.

    python comfy_forward.py CHECKOUT CHECKPOINT INPUTS OUTPUT

OUTPUT gets "velocity" and ComfyUI's own names and tensors, prefixed "weights.".
"""

import sys

checkout, checkpoint, inputs_path, output_path = sys.argv[1:5]
sys.argv = sys.argv[:1]
sys.path.insert(0, checkout)

import comfy.cli_args

comfy.cli_args.args.cpu = True

import comfy.sd
import torch
from safetensors.torch import load_file, save_file

patcher = comfy.sd.load_diffusion_model(checkpoint, model_options={"dtype": torch.float32})
model = patcher.model.diffusion_model.eval()
inputs = load_file(inputs_path)
with torch.inference_mode():
    velocity = model(
        inputs["hidden_states"],
        inputs["timestep"],
        inputs["encoder_hidden_states"],
        inputs["pooled_projections"],
        guidance=inputs["guidance"] / 1000,  # ComfyUI multiplies by 1000 itself
    )
weights = {"weights." + k: v.contiguous() for k, v in model.state_dict().items()}
save_file({"velocity": velocity.contiguous(), **weights}, output_path)
