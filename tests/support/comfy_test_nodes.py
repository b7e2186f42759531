"""A pack of one node for the real-ComfyUI tests: CONDITIONING without 9 GB of text encoders."""

import torch


class TestConditioning:
    CATEGORY = "tests"
    FUNCTION = "make"
    RETURN_TYPES = ("CONDITIONING",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"text": ("STRING", {}), "width": ("INT", {}), "pooled": ("INT", {})}}

    def make(self, text, width, pooled):
        generator = torch.Generator().manual_seed(sum(text.encode()) + 1)
        states = torch.randn(1, len(text.split()) + 1, width, generator=generator)
        return ([[states, {"pooled_output": torch.randn(1, pooled, generator=generator)}]],)


NODE_CLASS_MAPPINGS = {"TestConditioning": TestConditioning}
