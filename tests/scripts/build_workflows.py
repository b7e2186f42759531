"""Write workflows/, their API form in tests/workflows/, and subgraphs/, from the graphs below.

    python tests/scripts/build_workflows.py [--check]

Widget values, their order and the sockets come from the node definitions (ours from the classes,
ComfyUI's from tests/support/core_nodes.json, recorded from 0.3.64), so files cannot disagree with
them. --check writes nothing and fails if a file differs from what would be written.
"""

import argparse
import json
import sys
import tempfile
import uuid
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from comfyui_skyreels.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from comfyui_skyreels.skyreels.builtin import BUILTIN_NAME
from comfyui_skyreels.skyreels.config import PRESETS
from comfyui_skyreels.skyreels.text.encode import DEFAULT_NEGATIVE_PROMPT
from scripts.draw_graph import digest, digest_of, draw
from support import host
from support.project import PYPROJECT, ROOT
from support.workflows import shipped

PROJECT = PYPROJECT["project"]
CORE_VERSION = "0.3.64"
WIDGET_TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")

POSITIVE = {"color": "#232", "bgcolor": "#353"}
NEGATIVE = {"color": "#322", "bgcolor": "#533"}
NOTE = {"color": "#432", "bgcolor": "#653"}
GROUP_COLORS = {
    "load": "#8A8", "encode": "#88A", "prompt": "#88A", "sample": "#A88",
    "here": "#A88", "on Wiro": "#A88", "run on Wiro": "#A88", "decode and extend": "#A88",
    "decode and save": "#3f789e", "save": "#3f789e",
}  # fmt: skip
#: a row's gap holds the badges above a node, and the footer of Nodes 2.0 where a model is missing
COLUMN_GAP, ROW_GAP, TITLE_HEIGHT = 60, 54, 30
#: of the first node of a column: the title of the group is above its badges
TOP = 110
#: a running node grows by a status line, one that samples also by a preview as wide as the node
STATUS_HEIGHT, SAMPLER_HEIGHT, I2V_HEIGHT = 60, 550, 900
#: of a preview
SQUARE, LANDSCAPE = 340, 195


@dataclass(frozen=True)
class Node:
    """One node: widget values other than the defaults, and input -> (node, output) links."""

    type: str
    values: dict[str, Any] = field(default_factory=dict)
    links: dict[str, tuple[str, int]] = field(default_factory=dict)
    title: str = ""
    look: dict[str, str] = field(default_factory=dict)
    models: tuple[str, ...] = ()
    height: int = 0


#: column -> name -> node; columns become groups, left to right
Graph = dict[str, dict[str, Node]]

#: drawn by draw_pictures.py; the page puts it into the input folder when a template asks for it
PORTRAIT = "skyreels_portrait.jpg"

HUGGING_FACE = "https://huggingface.co/"
COMFY_ORG = HUGGING_FACE + "Comfy-Org/HunyuanVideo_repackaged/resolve/main/split_files/"
KIJAI = HUGGING_FACE + "Kijai/SkyReels-V1-Hunyuan_comfy/resolve/main/"
#: file -> (folder kind, address)
MODELS = {
    "skyreels_hunyuan_i2v_bf16.safetensors": ("diffusion_models", KIJAI),
    "skyreels_hunyuan_i2v_fp8_e4m3fn.safetensors": ("diffusion_models", KIJAI),
    "skyreels_hunyuan_t2v_fp8_e4m3fn.safetensors": ("diffusion_models", KIJAI),
    "skyreels-hunyuan-I2V-Q4_K_S.gguf": ("diffusion_models", KIJAI),
    "hunyuan_video_vae_bf16.safetensors": ("vae", COMFY_ORG + "vae/"),
    "clip_l.safetensors": ("text_encoders", COMFY_ORG + "text_encoders/"),
    "llava_llama3_fp8_scaled.safetensors": ("text_encoders", COMFY_ORG + "text_encoders/"),
    "hyvideo_FastVideo_LoRA-fp8.safetensors": (
        "loras",
        HUGGING_FACE + "Kijai/HunyuanVideo_comfy/resolve/main/",
    ),
}


# --- the graphs ---------------------------------------------------------------------------------


def note(text: str, height: int) -> Node:
    return Node("MarkdownNote", {"text": text}, look=NOTE, height=height)


def sample_decode_save(
    prefix: str, decode: dict[str, Any], sample_note: Node, preview: int = SQUARE
) -> Graph:
    """The right half, the same in every graph; preview: its height."""
    return {
        "sample": {
            "sample note": sample_note,
            "sampler": Node(
                "SkyReelsSampler",
                links={
                    "model": ("transformer", 0),
                    "positive": ("positive", 0),
                    "negative": ("negative", 0),
                    "image": ("conditioning", 0),
                },
                height=SAMPLER_HEIGHT + preview,
            ),
        },
        "decode and save": {
            "decode": Node(
                "SkyReelsVAEDecode", decode, {"vae": ("vae", 0), "samples": ("sampler", 0)}
            ),
            "video": Node("CreateVideo", {"fps": 24.0}, {"images": ("decode", 0)}),
            "save": Node(
                "SaveVideo",
                {"filename_prefix": f"video/{prefix}"},
                {"video": ("video", 0)},
                height=430,
            ),
        },
    }


def conditioning(width: int, height: int, num_frames: int) -> Node:
    return Node(
        "SkyReelsImageConditioning",
        {"width": width, "height": height, "num_frames": num_frames},
        {"vae": ("vae", 0), "image": ("image", 0)},
    )


def quick_start() -> Graph:
    """The built-in model and an image drawn by ComfyUI's own nodes: no file is needed."""
    introduction = note(
        "## Quick start\n\nPress **Run**: a 64x64 clip in seconds, on any machine, without "
        "a download.\n\nThe built-in model is **not SkyReels-V1**. It is a tiny network of "
        "the same architecture, trained on circles, squares and triangles of eight colours "
        "that move left, right, up or down, stay still, grow, shrink or fade out. Change "
        "the prompt, or replace the image with a Load Image node.\n\nFor real videos open "
        "one of the templates *Local, ...*.",
        250,
    )
    return {
        **builtin(introduction, x=30),
        **sample_decode_save(
            "skyreels_quick_start",
            {},
            note(
                "**Cancel** takes effect between two transformer blocks. The same seed gives the "
                "same video on every device.",
                90,
            ),
        ),
    }


def core_samplers() -> Graph:
    """The quick start with core's KSampler in place of SkyReels Sampler."""
    graph = builtin(
        note(
            "## SkyReels in core's samplers\n\nPress **Run**: the built-in model, sampled by "
            "ComfyUI's own *KSampler*.\n\n*SkyReels Core Model* makes a MODEL for core's samplers, "
            "guiders and model nodes: LoRA loaders, EasyCache, Skip Layer Guidance, context "
            "windows. The engine still streams what does not fit the card.\n\nFor real videos load "
            "the weights as in the template *Local, bf16*.",
            250,
        ),
        x=30,
    )
    encode = graph["encode"]
    encode["size"] = Node(
        "EmptyHunyuanLatentVideo",
        {"width": 64, "height": 64, "length": 17},
        title="Size and length, as in SkyReels Image Conditioning",
    )
    right = sample_decode_save(
        "skyreels_core_sampler",
        {},
        note(
            "Euler, *simple* and the default shift 7 are what SkyReels Sampler does; "
            "*ModelSamplingSD3* sets another shift. SkyReels Sampler alone has step caches, "
            "resume and 8-bit attention.",
            110,
        ),
    )
    right["sample"] = {
        "sample note": right["sample"]["sample note"],
        "model": Node(
            "SkyReelsCoreModel", {}, {"model": ("transformer", 0), "image": ("conditioning", 0)}
        ),
        "sampler": Node(
            "KSampler",
            {"steps": 30, "cfg": 6.0, "sampler_name": "euler", "scheduler": "simple"},
            {
                "model": ("model", 0),
                "positive": ("positive", 0),
                "negative": ("negative", 0),
                "latent_image": ("size", 0),
            },
            height=474,
        ),
    }
    return {**graph, **right}


def builtin(introduction: Node, x: int) -> Graph:
    """The left half with the built-in model: a red square, its left edge at x, moves left."""
    return {
        "load": {
            "note": introduction,
            "transformer": Node("SkyReelsTransformerLoader", {"transformer": BUILTIN_NAME}),
            "vae": Node("SkyReelsVAELoader", {"vae": BUILTIN_NAME}),
            "text encoder": Node("SkyReelsTextEncoderLoader", {"text_encoder": BUILTIN_NAME}),
        },
        "image": {
            "background": Node(
                "EmptyImage", {"width": 64, "height": 64, "color": 0x203060}, title="Background"
            ),
            "square": Node(
                "EmptyImage", {"width": 20, "height": 20, "color": 0xE03030}, title="Red square"
            ),
            "image": Node(
                "ImageCompositeMasked",
                {"x": x, "y": 22},
                {"destination": ("background", 0), "source": ("square", 0)},
                title="Image (replace with Load Image)",
            ),
        },
        "encode": {
            "positive": shape_prompt("a red square moves left", "Prompt", POSITIVE),
            "negative": Node(
                "SkyReelsTextEncode", {"prompt": "", "add_fps_prefix": False},
                {"text_encoder": ("text encoder", 0)}, title="Negative prompt", look=NEGATIVE,
            ),
            "conditioning": conditioning(64, 64, 17),
        },
    }  # fmt: skip


def shape_prompt(prompt: str, title: str, look: dict[str, str]) -> Node:
    links = {"text_encoder": ("text encoder", 0)}
    return Node("SkyReelsTextEncode", {"prompt": prompt}, links, title=title, look=look)


def extend_video() -> Graph:
    """The clip of the quick start and its continuation with a prompt of its own."""
    graph = builtin(
        note(
            "## A clip, continued\n\nPress **Run**: the built-in model makes a clip of 17 frames, "
            "and *SkyReels Extend Video* adds 16 that start from its last one.\n\nFor your own "
            "clip replace everything before *images* with core's Load Video and Get Video "
            "Components, and load the real weights as in the template *Local, bf16*, with "
            "97 frames.",
            250,
        ),
        x=38,
    )
    graph["encode"]["next"] = shape_prompt("a red square moves down", "What happens next", POSITIVE)
    clip = sample_decode_save(
        "skyreels_extended",
        {},
        note("The clip to continue: nothing here differs from *Quick start*.", 70),
    )
    save = clip.pop("decode and save")
    decode, video = save.pop("decode"), save.pop("video")
    return {
        **graph,
        **clip,
        "decode and extend": {
            "decode": decode,
            "extend note": note(
                "**overlap_frames** 1 is what the model was trained with: the prompt tells the "
                "motion. 5 or 9 also show it the motion; that is untrained. Chain more of these "
                "nodes for more.",
                110,
            ),
            "extend": Node(
                "SkyReelsExtendVideo",
                {"num_frames": 17, "seed": 1},
                {
                    "model": ("transformer", 0),
                    "vae": ("vae", 0),
                    "images": ("decode", 0),
                    "positive": ("next", 0),
                    "negative": ("negative", 0),
                },
                height=680,
            ),
        },
        "save": {"video": replace(video, links={"images": ("extend", 0)}), **save},
    }


def local(transformer: str, prefix: str, introduction: Node, sample_note: Node) -> Graph:
    """Real weights, ComfyUI's text encoders, an image from disk."""
    vae = "hunyuan_video_vae_bf16.safetensors"
    clips = ("clip_l.safetensors", "llava_llama3_fp8_scaled.safetensors")
    return {
        "load": {
            "note": introduction,
            "transformer": Node(
                "SkyReelsTransformerLoader", {"transformer": transformer}, models=(transformer,)
            ),
            "vae": Node("SkyReelsVAELoader", {"vae": vae}, models=(vae,)),
            "clip": Node(
                "DualCLIPLoader",
                {"clip_name1": clips[0], "clip_name2": clips[1], "type": "hunyuan_video"},
                models=clips,
            ),
            "image": Node("LoadImage", {"image": PORTRAIT}, height=320),
        },
        "encode": {
            "positive": Node(
                "CLIPTextEncode",
                {"text": PROMPT},
                {"clip": ("clip", 0)},
                title="Prompt (begin with FPS-24, )",
                look=POSITIVE,
            ),
            "negative": Node(
                "CLIPTextEncode", {"text": DEFAULT_NEGATIVE_PROMPT}, {"clip": ("clip", 0)},
                title="Negative prompt", look=NEGATIVE,
            ),
            "conditioning": conditioning(960, 544, 97),
        },
        **sample_decode_save(prefix, {}, sample_note, LANDSCAPE),
    }  # fmt: skip


SETTINGS_NOTE = (
    "30 steps, CFG 6, embedded guidance 1 and shift 7 are the authors' settings. Keep embedded "
    "guidance at 1, and steps at least five times CFG.\n\nTrained sizes: 960x544, 544x960, "
    "720x720, with 97 frames."
)


def local_bf16() -> Graph:
    return local(
        "skyreels_hunyuan_i2v_bf16.safetensors",
        "skyreels",
        note(
            "## SkyReels-V1, exact\n\nThe published weights, 25.6 GB in bf16. On a GPU below 24 GB "
            "the blocks that do not fit are streamed from system memory (64 GB needed).\n\n"
            f"[Transformer]({HUGGING_FACE}Kijai/SkyReels-V1-Hunyuan_comfy) · "
            f"[VAE and text encoders]({HUGGING_FACE}Comfy-Org/HunyuanVideo_repackaged)\n\n"
            "Choose an image of a person below: it becomes the first frame.",
            190,
        ),
        note(SETTINGS_NOTE, 140),
    )


def local_low_memory() -> Graph:
    return local(
        "skyreels_hunyuan_i2v_fp8_e4m3fn.safetensors",
        "skyreels_low_memory",
        note(
            "## SkyReels-V1 on a 12 GB GPU\n\nThe 8-bit file, 13.2 GB: blocks are streamed from "
            "system memory (32 GB needed), and the decoder uses the largest tiles that fit.\n\n"
            f"[Transformer]({HUGGING_FACE}Kijai/SkyReels-V1-Hunyuan_comfy) · "
            f"[VAE and text encoders]({HUGGING_FACE}Comfy-Org/HunyuanVideo_repackaged)\n\n"
            "**Out of memory?** First use fewer frames (49) or a smaller size (640x368): "
            "activations take more memory than weights.",
            210,
        ),
        note(SETTINGS_NOTE, 140),
    )


def local_gguf() -> Graph:
    """The smallest file: GGUF blocks, which an 8 GB card keeps whole."""
    return local(
        "skyreels-hunyuan-I2V-Q4_K_S.gguf",
        "skyreels_gguf",
        note(
            "## SkyReels-V1 on an 8 GB GPU\n\nThe GGUF file in 4 bits, 7.7 GB: its blocks stay as "
            "they are and are dequantized on the card for every call. Q5_K_M, Q6_K and Q8_0 are "
            "closer to bf16 and larger; choose one in *SkyReels Load Transformer*.\n\n"
            f"[Transformer]({HUGGING_FACE}Kijai/SkyReels-V1-Hunyuan_comfy) · "
            f"[VAE and text encoders]({HUGGING_FACE}Comfy-Org/HunyuanVideo_repackaged)\n\n"
            "**Out of memory?** Use fewer frames (49) or a smaller size (640x368).",
            210,
        ),
        note(SETTINGS_NOTE, 140),
    )


def local_few_steps() -> Graph:
    """A step-distilled LoRA and the settings of its authors."""
    lora, settings = "hyvideo_FastVideo_LoRA-fp8.safetensors", PRESETS["few-steps"]
    graph = local(
        "skyreels_hunyuan_i2v_bf16.safetensors",
        "skyreels_few_steps",
        note(
            "## LoRAs, and few steps\n\n*SkyReels Load LoRA* takes any HunyuanVideo LoRA in "
            "`models/loras`: choose your own, set its strength, chain more of them. The node says "
            "what of the file was used.\n\nThis one is step-distilled: 6 steps at CFG 1 take a "
            "tenth of the time.\n\n"
            f"[LoRA]({HUGGING_FACE}Kijai/HunyuanVideo_comfy) · "
            f"[Transformer]({HUGGING_FACE}Kijai/SkyReels-V1-Hunyuan_comfy) · "
            f"[VAE and text encoders]({HUGGING_FACE}Comfy-Org/HunyuanVideo_repackaged)",
            250,
        ),
        note(
            "**Experimental.** 6 steps, shift 17, embedded guidance 6 and CFG 1 are what the LoRA "
            "was made for, on HunyuanVideo's text-to-video model. SkyReels is another model: "
            "expect less motion and detail.\n\nWith another LoRA set 30 steps, CFG 6, embedded "
            "guidance 1 and shift 7 again.",
            170,
        ),
    )
    files = graph["load"]
    first = {name: files.pop(name) for name in ("note", "transformer")}
    loader = Node(
        "SkyReelsLoraLoader", {"lora": lora}, {"model": ("transformer", 0)}, models=(lora,),
        height=230,
    )  # fmt: skip
    graph["load"] = {**first, "lora": loader, **files}
    sampler = graph["sample"]["sampler"]
    graph["sample"]["sampler"] = replace(
        sampler,
        values=dict(vars(settings)),
        links={**sampler.links, "model": ("lora", 0)},
    )
    return graph


def local_text_to_video() -> Graph:
    """The text-to-video weights: no picture, and the size from core's empty latent."""
    graph = local(
        "skyreels_hunyuan_t2v_fp8_e4m3fn.safetensors",
        "skyreels_text_to_video",
        note(
            "## SkyReels-V1 from text alone\n\nThe text-to-video file in 8 bits, 13.2 GB: as "
            "the template *Local, 8-bit*, without an image. The size and length of the video are "
            "those of *Empty HunyuanLatentVideo*.\n\n"
            f"[Transformer]({HUGGING_FACE}Kijai/SkyReels-V1-Hunyuan_comfy) · "
            f"[VAE and text encoders]({HUGGING_FACE}Comfy-Org/HunyuanVideo_repackaged)\n\n"
            "The settings are those of image to video: the authors use the same for both.",
            200,
        ),
        note(SETTINGS_NOTE, 140),
    )
    del graph["load"]["image"], graph["encode"]["conditioning"]
    size = {"width": 960, "height": 544, "length": 97}
    graph["encode"]["size"] = Node("EmptyHunyuanLatentVideo", size, title="Size and length")
    sampler = graph["sample"]["sampler"]
    links = {name: link for name, link in sampler.links.items() if name != "image"}
    graph["sample"]["sampler"] = replace(sampler, links={**links, "latent": ("size", 0)})
    return graph


WIRO_NOTE = (
    "## SkyReels-V1 on Wiro\n\nNo GPU is needed: the video is generated on "
    "[wiro.ai](https://wiro.ai/models/wiro/SkyReels-V1), **which costs money**. The node shows the "
    "price before the run and the cost after it.\n\n1. Enter your Wiro API key in *Settings > "
    "SkyReels > Wiro*; set spending limits there too.\n2. Choose an image of a person.\n"
    "3. **Run**. *Cancel* also stops the task at Wiro."
)
TAKE_NOTE = (
    "Running the same inputs again costs nothing, even after a crash or restart: the node reuses "
    "the video or waits for it. For another video set **take** (the number of the variation) to 2, "
    "3, ...\n\nThe **Wiro** tab in the sidebar shows all tasks."
)
BATCH_NOTE = (
    "## Many images on Wiro\n\nEach image becomes a run of its own on "
    "[wiro.ai](https://wiro.ai/models/wiro/SkyReels-V1), **and each costs money**: *Wiro Submit* "
    "shows their number and total price before anything is sent.\n\n1. Enter your Wiro API key and "
    "limits in *Settings > SkyReels > Wiro*.\n2. Choose two images, or connect any batch or list "
    "of images instead. The same image twice is one run.\n3. **Run**."
)
COLLECT_NOTE = (
    "As many run at once as your account has task slots; the others wait. The videos are in the "
    "order of the images. Failed runs are listed in the **report** and retried by the next "
    "**Run**; the others are not billed again.\n\n*Cancel* stops all running tasks."
)
PROMPT = (
    "FPS-24, A woman in a green coat turns her head towards the camera and smiles, wind moves her "
    "hair, soft evening light, medium shot"
)


def prompt_text() -> Node:
    return Node(
        "PrimitiveStringMultiline", {"value": PROMPT}, title="Prompt", look=POSITIVE, height=200
    )


def wiro_node() -> Node:
    return Node(
        "WiroRemoteI2V",
        {"negative_prompt": DEFAULT_NEGATIVE_PROMPT},
        {"image": ("image", 0), "prompt": ("prompt", 0)},
        height=620,
    )


def save(prefix: str, video: tuple[str, int], title: str = "") -> Node:
    return Node(
        "SaveVideo", {"filename_prefix": f"video/{prefix}"}, {"video": video}, title, height=430
    )


def remote() -> Graph:
    """Image and prompt, one node, the video."""
    return {
        "image": {
            "note": note(WIRO_NOTE, 260),
            "image": Node("LoadImage", {"image": PORTRAIT}, height=320),
        },
        "prompt": {"prompt": prompt_text()},
        "run on Wiro": {"remote": wiro_node(), "take note": note(TAKE_NOTE, 150)},
        "save": {"save": save("wiro", ("remote", 1))},
    }


def wiro_batch() -> Graph:
    """Two images as one batch, a run on Wiro for each, the videos in order."""
    images = {"image1": ("image", 0), "image2": ("second", 0)}
    return {
        "images": {
            "note": note(BATCH_NOTE, 300),
            "image": Node("LoadImage", {"image": PORTRAIT}, title="Image 1", height=320),
            "second": Node("LoadImage", {"image": PORTRAIT}, title="Image 2", height=320),
            "batch": Node("ImageBatch", {}, images),
        },
        "prompt": {"prompt": prompt_text()},
        "run on Wiro": {
            "submit": Node(
                "WiroSubmit",
                {"negative_prompt": DEFAULT_NEGATIVE_PROMPT},
                {"image": ("batch", 0), "prompt": ("prompt", 0)},
                height=560,
            ),
            "collect": Node("WiroCollect", {}, {"runs": ("submit", 0)}, height=220),
            "collect note": note(COLLECT_NOTE, 190),
        },
        "save": {"save": save("wiro_batch", ("collect", 0))},
    }


def local_and_remote() -> Graph:
    """The same image and prompt locally and on Wiro, and both videos side by side."""
    graph = local(
        "skyreels_hunyuan_i2v_fp8_e4m3fn.safetensors",
        "skyreels_here",
        note(
            "## Local and on Wiro\n\nThe same image and prompt, once on this machine with the "
            "8-bit file (12 GB GPU, 32 GB of system memory) and once on Wiro, **which costs "
            "money**. Both run at the same time. Mute a branch (Ctrl+M) to run only the other."
            "\n\nThe two use different noise: the videos differ as with two seeds.",
            220,
        ),
        note(SETTINGS_NOTE, 140),
    )
    encode = graph["encode"]
    encode["positive"] = Node(
        "CLIPTextEncode", {"text": ""}, {"clip": ("clip", 0), "text": ("prompt", 0)},
        title="Encoded prompt", look=POSITIVE,
    )  # fmt: skip
    graph["encode"] = {"prompt": prompt_text(), **encode}
    both = {"image1": ("decode", 0), "image2": ("remote", 0)}
    return {
        **graph,
        "run on Wiro": {"remote": wiro_node(), "take note": note(TAKE_NOTE, 150)},
        "compare": {
            "save remote": save("skyreels_wiro", ("remote", 1), "Save Video (Wiro)"),
            "stitch": Node("ImageStitch", {"spacing_width": 8}, both, title="Local | Wiro"),
            "both": Node("CreateVideo", {"fps": 24.0}, {"images": ("stitch", 0)}),
            "save both": save("skyreels_compared", ("both", 0), "Save Video (both)"),
        },
    }


def compare() -> Graph:
    """One node with two backends, and what they made beside each other."""
    inputs = {"image": ("image", 0), "prompt": ("prompt", 0)}
    values = {"negative_prompt": DEFAULT_NEGATIVE_PROMPT}

    def i2v(backend: str, title: str) -> Node:
        height = I2V_HEIGHT + LANDSCAPE
        return Node("SkyReelsI2V", {**values, "backend": backend}, inputs, title, height=height)

    def beside(first: str, second: tuple[str, int], direction: str, title: str) -> Node:
        values = {"direction": direction, "spacing_width": 8, "spacing_color": "black"}
        return Node("ImageStitch", values, {"image1": (first, 0), "image2": second}, title)

    def frame(index: int) -> Node:
        return Node("ImageFromBatch", {"batch_index": index}, {"image": ("three", 0)})

    return {
        "image": {
            "note": note(
                "## Here and on Wiro\n\nThe same image and prompt in two *SkyReels I2V* nodes, of "
                "which only **backend** differs: *local* and *remote*, **which costs money**. "
                "Weights are found in ComfyUI's folders by their headers.\n\nTo see one, mute "
                "the other (Ctrl+M). The two use different noise: the clips differ as with two "
                "seeds.",
                230,
            ),
            "image": Node("LoadImage", {"image": PORTRAIT}, height=320),
            "prompt": prompt_text(),
        },
        "here": {"here": i2v("local", "SkyReels I2V (here)")},
        "on Wiro": {"there": i2v("remote", "SkyReels I2V (Wiro)")},
        "receipts": {
            "receipt note": note(
                "Time and cost of each are in its receipt: `elapsed_s` and `cost_usd`. Here it is "
                "the time of sampling, without the decode; at Wiro what was billed.",
                110,
            ),
            "receipt here": Node("PreviewAny", {}, {"source": ("here", 3)}, "Receipt (here)",
                                 height=330),
            "receipt there": Node("PreviewAny", {}, {"source": ("there", 3)}, "Receipt (Wiro)",
                                  height=330),
        },
        "compare": {
            "difference": Node(
                "ImageBlend", {"blend_factor": 1.0, "blend_mode": "difference"},
                {"image1": ("here", 0), "image2": ("there", 0)}, "Difference (black: the same)",
            ),
            "two": beside("here", ("there", 0), "right", "Here | Wiro"),
            "three": beside("two", ("difference", 0), "right", "Here | Wiro | difference"),
            "video": Node("CreateVideo", {"fps": 24.0}, {"images": ("three", 0)}),
            "save": save("skyreels_compared", ("video", 0)),
        },
        "contact sheet": {
            "first": frame(0),
            "middle": frame(48),
            "last": frame(96),
            "upper": beside("first", ("middle", 0), "down", "First and middle frame"),
            "sheet": beside("upper", ("last", 0), "down", "and the last"),
            "show": Node("PreviewImage", {}, {"images": ("sheet", 0)}, "Contact sheet", height=330),
        },
    }  # fmt: skip


GRAPHS = {
    "quick_start": quick_start,
    "extend_video": extend_video,
    "core_samplers": core_samplers,
    "local_bf16": local_bf16,
    "local_low_memory": local_low_memory,
    "local_gguf": local_gguf,
    "local_few_steps": local_few_steps,
    "local_text_to_video": local_text_to_video,
    "remote": remote,
    "wiro_batch": wiro_batch,
    "local_and_remote": local_and_remote,
    "compare": compare,
}


# --- blueprints: a graph as one node ------------------------------------------------------------


@dataclass(frozen=True)
class Blueprint:
    """A graph that the page offers as one node.

    inputs: name -> the inputs (node, name) of the graph that it feeds. outputs: name -> (node,
    output). words: by which it is found.
    """

    graph: Graph
    inputs: dict[str, tuple[str, str]]
    outputs: dict[str, tuple[str, int]]
    description: str
    words: tuple[str, ...]


def image_to_video_blueprint() -> Blueprint:
    """The 8-bit template between Load Image and Save Video."""
    graph = local_low_memory()
    del graph["load"]["image"], graph["decode and save"]["save"]
    for name in ("positive", "conditioning"):
        node = graph["encode"][name]
        links = {key: link for key, link in node.links.items() if link[0] != "image"}
        graph["encode"][name] = replace(node, links=links)
    inputs = {
        "image": ("conditioning", "image"),
        "prompt": ("positive", "text"),
        "negative_prompt": ("negative", "text"),
        "width": ("conditioning", "width"),
        "height": ("conditioning", "height"),
        "num_frames": ("conditioning", "num_frames"),
        "steps": ("sampler", "steps"),
        "cfg": ("sampler", "cfg"),
        "seed": ("sampler", "seed"),
        "transformer": ("transformer", "transformer"),
    }
    return Blueprint(
        graph,
        inputs,
        {"VIDEO": ("video", 0), "IMAGE": ("decode", 0)},
        "A picture and a prompt become a video with SkyReels-V1 on this machine.",
        ("image to video", "i2v", "hunyuan", "skyreels", "animate image"),
    )


def extend_video_blueprint() -> Blueprint:
    """The weights of the 8-bit template and one Extend Video node."""
    graph = local_low_memory()
    files, encode = graph["load"], graph["encode"]
    del files["image"], encode["conditioning"]
    extend = extend_video()["decode and extend"]["extend"]
    links = {**extend.links, "positive": ("positive", 0)}
    del links["images"]
    extend = replace(extend, links=links, values={"num_frames": 97, "seed": 1})
    return Blueprint(
        {
            "load": files,
            "encode": encode,
            "decode and extend": {"extend": extend},
            "save": {"video": Node("CreateVideo", {"fps": 24.0}, {"images": ("extend", 0)})},
        },
        {
            "images": ("extend", "images"),
            "prompt": ("positive", "text"),
            "negative_prompt": ("negative", "text"),
            "num_frames": ("extend", "num_frames"),
            "overlap_frames": ("extend", "overlap_frames"),
            "seed": ("extend", "seed"),
            "transformer": ("transformer", "transformer"),
        },
        {"VIDEO": ("video", 0), "IMAGE": ("extend", 0)},
        "Continues a clip with SkyReels-V1 on this machine: its frames and what comes next.",
        ("extend video", "continue video", "longer video", "hunyuan", "skyreels"),
    )


#: name of the file, which the page shows -> blueprint
BLUEPRINTS = {
    "Image to Video (SkyReels V1)": image_to_video_blueprint,
    "Extend Video (SkyReels V1)": extend_video_blueprint,
}


# --- from definitions to files ------------------------------------------------------------------


def definition(node_type: str) -> dict[str, Any]:
    """{"input": {"required", "optional"}, "output", "output_name"} of a node, as /object_info."""
    if node_type == "MarkdownNote":  # lives in the page only
        text = ["STRING", {"default": "", "multiline": True}]
        return {"input": {"required": {"text": text}}, "output": [], "output_name": []}
    cls = NODE_CLASS_MAPPINGS.get(node_type)
    if cls is None:
        return host.CORE_NODES[node_type]
    return {
        "input": cls.INPUT_TYPES(),
        "output": list(cls.RETURN_TYPES),
        "output_name": list(cls.RETURN_NAMES),
    }


def split_inputs(node_type: str) -> tuple[dict[str, tuple], dict[str, tuple]]:
    """Sockets and widgets of a node: name -> (type, options, is optional), in page order."""
    sockets: dict[str, tuple] = {}
    widgets: dict[str, tuple] = {}
    for kind in ("required", "optional"):
        for name, (kind_of_input, *rest) in definition(node_type)["input"].get(kind, {}).items():
            options = dict(rest[0]) if rest else {}
            if isinstance(kind_of_input, list):
                options["options"] = kind_of_input
                kind_of_input = "COMBO"
            group = widgets if kind_of_input in WIDGET_TYPES else sockets
            group[name] = (kind_of_input, options, kind == "optional")
    return sockets, widgets


def widget_values(node: Node) -> dict[str, Any]:
    """Every widget's value, by name."""
    _, widgets = split_inputs(node.type)
    unknown = set(node.values) - set(widgets)
    if unknown:
        raise ValueError(f"{node.type} has no widget {sorted(unknown)}")
    values = {}
    for name, (_, options, _) in widgets.items():
        choices = options.get("options") or [None]
        values[name] = node.values.get(name, options.get("default", choices[0]))
    return values


def stored_values(node: Node) -> list[Any]:
    """Values by position, with the widgets that the page adds on its own."""
    _, widgets = split_inputs(node.type)
    stored = []
    for name, value in widget_values(node).items():
        stored.append(value)
        if widgets[name][1].get("control_after_generate"):
            stored.append("fixed")
        if widgets[name][1].get("image_upload"):
            stored.append("image")
    return stored


def node_height(node: Node) -> int:
    sockets, widgets = split_inputs(node.type)
    rows = max(len(sockets), len(definition(node.type)["output"]))
    multiline = sum(bool(options.get("multiline")) for _, options, _ in widgets.values())
    status = STATUS_HEIGHT if "unique_id" in definition(node.type)["input"].get("hidden", {}) else 0
    height = 14 + 20 * rows + 24 * len(stored_values(node)) + 90 * multiline + status
    return node.height or height


def to_ui(name: str, graph: Graph) -> dict[str, Any]:
    """The litegraph file, version 0.4."""
    flat = {key: node for column in graph.values() for key, node in column.items()}
    ids = {key: number for number, key in enumerate(flat, 1)}
    links: list[list[Any]] = []
    groups: list[dict[str, Any]] = []
    nodes: list[dict[str, Any]] = []
    x = 40
    for title, column in graph.items():
        width = 400 if title in ("load", "encode") else 340
        y = TOP
        for key, node in column.items():
            height = node_height(node)
            nodes.append(ui_node(ids, key, node, flat, links, (x, y), (width, height)))
            y += height + TITLE_HEIGHT + ROW_GAP
        groups.append(
            {
                "id": len(groups) + 1,
                "title": title,
                "bounding": [x - 20, 0, width + 40, y - TITLE_HEIGHT],
                "color": GROUP_COLORS.get(title, "#b58b2a"),
                "font_size": 24,
                "flags": {},
            }
        )
        x += width + COLUMN_GAP
    for link in links:
        origin = nodes[link[1] - 1]["outputs"][link[2]]
        origin["links"] = [*(origin["links"] or []), link[0]]
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"skyreels-wiro/{name}")),
        "revision": 0,
        "last_node_id": len(nodes),
        "last_link_id": len(links),
        "nodes": nodes,
        "links": links,
        "groups": groups,
        "config": {},
        "extra": {"linearData": app_mode(ids, flat)} if is_app(flat) else {},
        "version": 0.4,
    }


#: what an app asks for: name of a node -> its widgets
APP_INPUTS = {
    "image": ("image",),
    "prompt": ("value",),
    "positive": ("text", "prompt"),
    "conditioning": ("num_frames",),
    "sampler": ("seed", "steps"),
    "next": ("prompt",),
}
#: nodes that may cost money, with the price above them: app mode would hide it
PAID = {"SkyReelsI2V", "WiroRemoteI2V", "WiroSubmit", "WiroRunModel"}


def is_app(flat: dict[str, Node]) -> bool:
    """Whether a graph is one for the page's app mode: it saves a video, and costs nothing."""
    return "save" in flat and PAID.isdisjoint(node.type for node in flat.values())


def app_mode(ids: dict[str, int], flat: dict[str, Node]) -> dict[str, Any]:
    """What the page's app mode shows of a graph: these widgets, and the saved videos."""
    inputs = [
        [ids[key], name]
        for key, names in APP_INPUTS.items()
        for name in names
        if key in flat and name in widget_values(flat[key]) and name not in flat[key].links
    ]
    return {"inputs": inputs, "outputs": [ids[k] for k, n in flat.items() if n.type == "SaveVideo"]}


def to_blueprint(name: str, blueprint: Blueprint) -> dict[str, Any]:
    """A workflow file of one node, whose type is the graph."""
    whole = to_ui(name, blueprint.graph)
    flat = {key: node for column in blueprint.graph.values() for key, node in column.items()}
    ids = {key: number for number, key in enumerate(flat, 1)}
    nodes = {node["id"]: node for node in whole["nodes"]}
    keys = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    links = [dict(zip(keys, link, strict=True)) for link in whole["links"]]

    def identity(*parts: str) -> str:
        return str(uuid.uuid5(uuid.NAMESPACE_URL, "/".join(("skyreels-wiro", name, *parts))))

    def connect(origin: tuple[int, int], target: tuple[int, int], kind: str) -> int:
        number = len(links) + 1
        links.append(dict(zip(keys, (number, *origin, *target, kind), strict=True)))
        return number

    right = max(node["pos"][0] + node["size"][0] for node in nodes.values())
    inner_inputs, outer_inputs, values = [], [], []
    for slot, (label, (key, target)) in enumerate(blueprint.inputs.items()):
        entries = nodes[ids[key]]["inputs"]
        place = next(i for i, entry in enumerate(entries) if entry["name"] == target)
        kind = entries[place]["type"]
        entries[place]["link"] = connect((-10, slot), (ids[key], place), kind)
        here = {"name": label, "type": kind}
        inner_inputs.append(
            {"id": identity("input", label), **here, "linkIds": [entries[place]["link"]],
             "pos": [-120, 100 + 20 * slot]}
        )  # fmt: skip
        is_widget = "widget" in entries[place]
        outer_inputs.append({**here, **({"widget": {"name": label}} if is_widget else {}),
                             "link": None})  # fmt: skip
        if is_widget:
            values.append((label, widget_values(flat[key])[target]))
    inner_outputs, outer_outputs = [], []
    for slot, (label, (key, place)) in enumerate(blueprint.outputs.items()):
        output = nodes[ids[key]]["outputs"][place]
        number = connect((ids[key], place), (-20, slot), output["type"])
        output["links"] = [*(output["links"] or []), number]
        here = {"name": label, "type": output["type"]}
        inner_outputs.append(
            {"id": identity("output", label), **here, "linkIds": [number],
             "pos": [right + 120, 100 + 20 * slot]}
        )  # fmt: skip
        outer_outputs.append({**here, "links": None})
    outer = {
        "id": 1,
        "type": identity("graph"),
        "pos": [40, TOP],
        "size": [400, 480],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": outer_inputs,
        "outputs": outer_outputs,
        "properties": {
            "proxyWidgets": [["-1", label] for label, _ in values],
            "cnr_id": PROJECT["name"],
            "ver": PROJECT["version"],
        },
        "widgets_values": [value for _, value in values],
        "title": name,
    }
    inner = {
        "id": identity("graph"),
        "version": 1,
        "state": {
            "lastGroupId": len(whole["groups"]),
            "lastNodeId": len(nodes),
            "lastLinkId": len(links),
            "lastRerouteId": 0,
        },
        "revision": 0,
        "config": {},
        "name": name,
        "inputNode": {"id": -10, "bounding": [-180, 60, 120, 60 + 20 * len(inner_inputs)]},
        "outputNode": {"id": -20, "bounding": [right + 60, 60, 120, 60 + 20 * len(inner_outputs)]},
        "inputs": inner_inputs,
        "outputs": inner_outputs,
        "widgets": [],
        "nodes": whole["nodes"],
        "groups": whole["groups"],
        "links": links,
        "extra": {},
        "category": "SkyReels",
        "description": blueprint.description,
    }
    return {
        "id": whole["id"],
        "revision": 0,
        "last_node_id": 1,
        "last_link_id": 0,
        "nodes": [outer],
        "links": [],
        "groups": [],
        "definitions": {"subgraphs": [inner]},
        "config": {},
        "extra": {
            "BlueprintDescription": blueprint.description,
            "BlueprintSearchAliases": list(blueprint.words),
        },
        "version": 0.4,
    }


def ui_node(
    ids: dict[str, int],
    key: str,
    node: Node,
    flat: dict[str, Node],
    links: list[list[Any]],
    pos: tuple[int, int],
    size: tuple[int, int],
) -> dict[str, Any]:
    """One entry of "nodes"; its links are appended to `links`."""
    sockets, widgets = split_inputs(node.type)
    unknown = set(node.links) - set(sockets) - set(widgets)
    if unknown:
        raise ValueError(f"{node.type} has no input {sorted(unknown)}")
    inputs: list[dict[str, Any]] = []
    for name, (kind, _, is_optional) in {**sockets, **widgets}.items():
        of_widget = {"widget": {"name": name}} if name in widgets else {}
        entry: dict[str, Any] = {"name": name, "type": kind, **of_widget, "link": None}
        if is_optional:
            entry["shape"] = 7
        if name in node.links:
            origin, slot = node.links[name]
            given = definition(flat[origin].type)["output"][slot]
            if kind not in (given, "*"):
                raise ValueError(f"{key}.{name} takes {kind}, and {origin} gives {given}")
            links.append([len(links) + 1, ids[origin], slot, ids[key], len(inputs), given])
            entry["link"] = len(links)
        inputs.append(entry)
    described = definition(node.type)
    outputs = [
        {"name": label, "type": kind, "links": None}
        for label, kind in zip(described["output_name"], described["output"], strict=True)
    ]
    is_note = node.type == "MarkdownNote"
    return {
        "id": ids[key],
        "type": node.type,
        "pos": list(pos),
        "size": list(size),
        "flags": {},
        "order": ids[key] - 1,
        "mode": 0,
        "inputs": [] if is_note else inputs,
        "outputs": outputs,
        "properties": {} if is_note else node_properties(node),
        "widgets_values": stored_values(node),
        **({"title": node.title} if node.title else {}),
        **node.look,
    }


def node_properties(node: Node) -> dict[str, Any]:
    """Who owns the node, and the files its widgets name with where to get them."""
    ours = node.type in NODE_CLASS_MAPPINGS
    properties: dict[str, Any] = {
        "Node name for S&R": node.type,
        "cnr_id": PROJECT["name"] if ours else "comfy-core",
        "ver": PROJECT["version"] if ours else CORE_VERSION,
    }
    if node.models:
        properties["models"] = [
            {"name": file, "url": MODELS[file][1] + file, "directory": MODELS[file][0]}
            for file in node.models
        ]
    return properties


def to_api(graph: Graph) -> dict[str, Any]:
    """What the page sends for the same graph."""
    flat = {key: node for column in graph.values() for key, node in column.items()}
    ids = {key: str(number) for number, key in enumerate(flat, 1)}
    return {
        ids[key]: {
            "inputs": {
                **widget_values(node),
                **{name: [ids[origin], slot] for name, (origin, slot) in node.links.items()},
            },
            "class_type": node.type,
        }
        for key, node in flat.items()
        if node.type != "MarkdownNote"
    }


def build() -> dict[Path, str]:
    """Path -> content of every generated file."""
    files = {}
    with tempfile.TemporaryDirectory() as folder, patch.dict(sys.modules):
        sys.modules.update(host.stand_ins(host.Host(Path(folder))))
        for name, graph in GRAPHS.items():
            forms = {
                shipped(name): to_ui(name, graph()),
                ROOT / "tests" / "workflows" / f"{name}.api.json": to_api(graph()),
            }
            files |= {p: json.dumps(v, indent=1, ensure_ascii=False) for p, v in forms.items()}
        for name, blueprint in BLUEPRINTS.items():
            content = to_blueprint(name, blueprint())
            files[ROOT / "subgraphs" / f"{name}.json"] = json.dumps(
                content, indent=1, ensure_ascii=False
            )
    return {path: text + "\n" for path, text in files.items()}


#: of the quick start, in README.md
PICTURE = ROOT / "web" / "docs" / "graph.png"


def draw_picture(*, is_check: bool) -> bool:
    """Draw the quick start again if the picture shows another graph; returns whether it did."""
    with tempfile.TemporaryDirectory() as folder, patch.dict(sys.modules):
        sys.modules.update(host.stand_ins(host.Host(Path(folder))))
        graph = to_ui("quick_start", quick_start())
        if digest_of(PICTURE) == digest(graph):
            return False
        names = {"MarkdownNote": "Note", **NODE_DISPLAY_NAME_MAPPINGS}
        if not is_check:
            PICTURE.write_bytes(draw(graph, names))
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    for path, text in build().items():
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(path.relative_to(ROOT))
        if not check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
    if draw_picture(is_check=check):
        stale.append(PICTURE.relative_to(ROOT))
    for path in stale:
        print(f"{path} {'differs from its graph' if check else 'written'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
