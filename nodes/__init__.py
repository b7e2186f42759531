"""ComfyUI nodes: thin adapters over `skyreels`; the only folder that may import ComfyUI.

Ids equal class names and never change.
"""

import logging
from pathlib import Path

from . import host
from .i2v import SkyReelsI2V
from .local.core_model import SkyReelsCoreModel
from .local.decode import SkyReelsVAEDecode
from .local.extend import SkyReelsExtendVideo
from .local.guidance import SkyReelsGuidance
from .local.image import SkyReelsImageConditioning
from .local.loaders import SkyReelsTransformerLoader, SkyReelsVAELoader
from .local.lora import SkyReelsLoraLoader
from .local.plan import SkyReelsPlan
from .local.receipts import SkyReelsFromReceipt
from .local.sampler import SkyReelsSampler, SkyReelsScheduler
from .local.text import SkyReelsTextEncode, SkyReelsTextEncoderLoader
from .local.windows import SkyReelsContextWindows
from .remote import autocollect, routes
from .remote.batch import WiroCollect, WiroSubmit
from .remote.nodes import WiroRemoteI2V, WiroRunModel, WiroTaskResult, WiroUploadFile

logger = logging.getLogger("skyreels.nodes")

NODE_CLASS_MAPPINGS = {
    "SkyReelsI2V": SkyReelsI2V,
    "SkyReelsTransformerLoader": SkyReelsTransformerLoader,
    "SkyReelsVAELoader": SkyReelsVAELoader,
    "SkyReelsLoraLoader": SkyReelsLoraLoader,
    "SkyReelsTextEncoderLoader": SkyReelsTextEncoderLoader,
    "SkyReelsTextEncode": SkyReelsTextEncode,
    "SkyReelsImageConditioning": SkyReelsImageConditioning,
    "SkyReelsScheduler": SkyReelsScheduler,
    "SkyReelsGuidance": SkyReelsGuidance,
    "SkyReelsContextWindows": SkyReelsContextWindows,
    "SkyReelsSampler": SkyReelsSampler,
    "SkyReelsVAEDecode": SkyReelsVAEDecode,
    "SkyReelsExtendVideo": SkyReelsExtendVideo,
    "SkyReelsPlan": SkyReelsPlan,
    "SkyReelsCoreModel": SkyReelsCoreModel,
    "SkyReelsFromReceipt": SkyReelsFromReceipt,
    "WiroRemoteI2V": WiroRemoteI2V,
    "WiroRunModel": WiroRunModel,
    "WiroTaskResult": WiroTaskResult,
    "WiroUploadFile": WiroUploadFile,
    "WiroSubmit": WiroSubmit,
    "WiroCollect": WiroCollect,
}

NODE_DISPLAY_NAME_MAPPINGS = {
    "SkyReelsI2V": "SkyReels I2V",
    "SkyReelsTransformerLoader": "SkyReels Load Transformer",
    "SkyReelsVAELoader": "SkyReels Load VAE",
    "SkyReelsLoraLoader": "SkyReels Load LoRA",
    "SkyReelsTextEncoderLoader": "SkyReels Load Text Encoder",
    "SkyReelsTextEncode": "SkyReels Text Encode",
    "SkyReelsImageConditioning": "SkyReels Image Conditioning",
    "SkyReelsScheduler": "SkyReels Scheduler",
    "SkyReelsGuidance": "SkyReels Guidance",
    "SkyReelsContextWindows": "SkyReels Context Windows",
    "SkyReelsSampler": "SkyReels Sampler",
    "SkyReelsVAEDecode": "SkyReels VAE Decode",
    "SkyReelsExtendVideo": "SkyReels Extend Video",
    "SkyReelsPlan": "SkyReels Plan",
    "SkyReelsCoreModel": "SkyReels Core Model",
    "SkyReelsFromReceipt": "SkyReels From Receipt",
    "WiroRemoteI2V": "Wiro Remote I2V",
    "WiroRunModel": "Wiro Run Model",
    "WiroTaskResult": "Wiro Task Result",
    "WiroUploadFile": "Wiro Upload File",
    "WiroSubmit": "Wiro Submit",
    "WiroCollect": "Wiro Collect",
}


def register(folder: Path) -> bool:
    """Add routes, hooks and the work at start to ComfyUI's server, if there is one, once.

    A second copy of the pack would answer the page with tasks and keys of its own while the nodes
    are those of the other copy, so the copy that is loaded first serves alone.

    Args:
        folder: of this copy of the pack.

    Returns:
        Whether this copy may hand its nodes to ComfyUI.
    """
    first = host.claim_server(folder)
    if first is None:
        if (table := host.routes()) is not None:
            routes.register(table)
            host.record_prompt_users()
            host.run_at_startup(autocollect.collect_at_start)
        return True
    if first == folder:  # loaded again, or under a second name
        return True
    logger.warning(
        "Two copies of SkyReels V1 (local + Wiro) are installed: %s is used, %s is ignored. "
        "Delete one of them and restart ComfyUI.",
        first,
        folder,
    )
    return False
