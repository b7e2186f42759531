"""Nodes for the real-ComfyUI tests: CONDITIONING without 9 GB of encoders, a census, a failure."""

import asyncio
import gc

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


class TestLiveModels:
    """How many transformers and VAEs of ours are alive in the process."""

    CATEGORY = "tests"
    FUNCTION = "count"
    RETURN_TYPES = ()
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"after": ("IMAGE", {})}}

    def count(self, after):
        gc.collect()
        names = [type(thing).__name__ for thing in gc.get_objects()]
        live = names.count("SkyReelsTransformer") + names.count("VideoVAE")
        return {"ui": {"text": [str(live)]}, "result": ()}


class TestFailsLater:
    """Raises after a while, beside other nodes that wait."""

    CATEGORY = "tests"
    FUNCTION = "fail"
    RETURN_TYPES = ()
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"seconds": ("FLOAT", {})}}

    async def fail(self, seconds):
        await asyncio.sleep(seconds)
        raise RuntimeError("this node fails")


NODE_CLASS_MAPPINGS = {
    "TestConditioning": TestConditioning,
    "TestLiveModels": TestLiveModels,
    "TestFailsLater": TestFailsLater,
}
