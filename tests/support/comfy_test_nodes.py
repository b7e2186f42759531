"""Nodes for the real-ComfyUI tests: CONDITIONING without 9 GB of encoders, a census, a failure."""

import asyncio
import contextlib
import ctypes
import gc
import os

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


class TestMemory:
    """Bytes of all tensors that are alive in the process, and of its resident memory."""

    CATEGORY = "tests"
    FUNCTION = "count"
    RETURN_TYPES = ()
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"after": ("IMAGE", {})}}

    def count(self, after):
        gc.collect()
        storages = {}
        for thing in gc.get_objects():
            if isinstance(thing, torch.Tensor) and thing.device.type == "cpu":
                storage = thing.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        with contextlib.suppress(AttributeError, OSError):  # what is free goes back: glibc only
            ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/statm", encoding="ascii") as statm:
            resident = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        text = [str(sum(storages.values())), str(resident)]
        return {"ui": {"text": text}, "result": ()}


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
    "TestMemory": TestMemory,
    "TestFailsLater": TestFailsLater,
}
