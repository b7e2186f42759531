"""Files that are not what a loader expects, made from a seed: kinds of people's mistakes, damages.

Each is made by `odd_file` in a folder of its own. No program code in them may run: a pickle that is
loaded as code makes `MARKER`, in the folder that was given.
"""

import gzip
import io
import json
import os
import pickle
import random
import socket
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from comfyui_skyreels.skyreels.config import VAEConfig
from comfyui_skyreels.skyreels.vae.model import VideoVAE
from safetensors.torch import save

from support import tiny
from support.gguf_files import gguf_bytes, in_blocks

MARKER = "code-ran"
CONFIG = tiny.TRANSFORMER.__class__(
    **{**tiny.TRANSFORMER.__dict__, "num_layers": 1, "num_single_layers": 1,
       "num_refiner_layers": 1}
)  # fmt: skip
VAE = VAEConfig(block_out_channels=(32, 32, 32, 32), layers_per_block=1)
#: of `Sound.files`, those of safetensors
HEADERS = ("transformer", "comfyui", "diffusers", "vae", "lora")
SUFFIXES = (".safetensors", ".sft", ".pt", ".pth", ".ckpt", ".bin", ".gguf", "", ".SAFETENSORS")
#: what a terminal obeys, and what hides or turns a text
ESCAPES = ("\x1b[31mred\x1b[0m", "a\rb\nc\n", "\x07\x08\x00", "\u202etxt", "\ud800", "é💥", "%s%n")


class Evil:
    """A pickle that creates a file where it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (open, (str(self.marker), "w"))


class Sound:
    """The bytes of sound files, made once."""

    def __init__(self) -> None:
        model = tiny.transformer(CONFIG)
        state = model.state_dict()
        diffusers = tiny.to_diffusers(state, CONFIG)
        vae = tiny.randomize(VideoVAE(VAE)).state_dict()
        lora = {
            f"transformer.double_blocks.0.img_attn_qkv.{part}.weight": torch.randn(4, 32)
            for part in ("lora_A", "lora_B")
        }
        self.state, self.diffusers, self.vae = state, diffusers, vae
        self.comfyui = tiny.to_comfyui(state)
        self.files: dict[str, bytes] = {
            "transformer": save(state),
            "comfyui": save(self.comfyui),
            "diffusers": save(diffusers),
            "vae": save(vae),
            "lora": save(lora),
            "gguf": gguf_bytes(in_blocks(state)),
            "pt": _pickled(state),
            "old pt": _pickled(state, old=True),
        }


def _pickled(content: object, old: bool = False) -> bytes:
    out = io.BytesIO()
    torch.save(content, out, _use_new_zipfile_serialization=not old)
    return out.getvalue()


def _mutated(rng: random.Random, raw: bytes) -> bytes:
    """Damage: some bytes, mostly near the start, where names and sizes are."""
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 5, 40))):
        at = int(len(data) * rng.random() ** rng.choice((1, 6, 12))) if data else 0
        match rng.randrange(7):
            case 0:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                del data[at:]
            case 2:
                del data[at : at + rng.choice((1, 8, 100))]
            case 3:
                data[at:at] = rng.randbytes(rng.choice((1, 8, 100)))
            case 4:
                data[at : at + 8] = struct.pack(
                    "<Q", rng.choice((0, 2**31, 2**40, 2**63, 2**64 - 1))
                )
            case 5:
                data[at : at + 4] = b"\0" * 4
            case _:
                data += rng.randbytes(16)
    return bytes(data)


def _odd_header(rng: random.Random, raw: bytes) -> bytes:
    """A safetensors file whose header is JSON, and says something else than it should."""
    length = struct.unpack("<Q", raw[:8])[0]
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    for name in rng.sample(sorted(header), min(len(header), rng.choice((1, 1, 3)))):
        entry = header[name]
        match rng.randrange(9):
            case 0:
                entry["dtype"] = rng.choice(
                    ("F4", "F64", "I8", "U8", "BOOL", "C64", 7, None, ESCAPES[0])
                )
            case 1:
                entry["shape"] = rng.choice(
                    ([], [2**62], [-1, 5], [0], [1.5], "x", None, [[1]], [10**30])
                )
            case 2:
                entry["data_offsets"] = rng.choice(([0, 0], [5], [2**63, 2**64], "ab", [10, 4]))
            case 3:
                header[rng.choice(ESCAPES[:4] + ESCAPES[5:]) + name] = header.pop(name)
            case 4:
                header["x" * rng.choice((1000, 100_000))] = header.pop(name)
            case 5:
                del header[name]
            case 6:
                entry["shape"] = entry.get("shape", [])[::-1]
            case 7:
                header["__metadata__"] = rng.choice(
                    ([], {"a": 1}, {"a": ESCAPES[0] * 1000}, "x", {"_quantization_metadata": "[[["},
                     {"_quantization_metadata": '{"layers": {"a": {"format": "\x1b[1m"}}}'})
                )  # fmt: skip
            case _:
                header[name] = rng.choice((5, [], "x", None, {}))
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _odd_model(rng: random.Random, sound: Sound) -> bytes:
    """Sound as a file, with tensors or blocks that no model has."""
    state = dict(rng.choice((sound.state, sound.comfyui, sound.diffusers, sound.vae)))
    for name in rng.sample(sorted(state), rng.choice((1, 2, 30))):
        tensor = state.pop(name)
        match rng.randrange(6):
            case 0:
                ndim = rng.choice((0, 1, 2, 5, tensor.ndim, tensor.ndim))
                state[name] = torch.zeros(
                    [rng.choice((0, 1, 2, 3, 5, 16, 64)) for _ in range(ndim)]
                )
            case 1:
                state[name.replace(".0.", f".{rng.choice((1, 7, 10**9))}.")] = tensor
            case 2:
                dtypes = (torch.int64, torch.bool, torch.float8_e4m3fn, torch.int8, torch.float64)
                state[name] = tensor.to(rng.choice(dtypes))
            case 3:
                state[name] = tensor
                state[name.rpartition(".")[0] + ".scale_weight"] = torch.zeros(rng.choice((1, 3)))
            case 4:
                state[name] = torch.full_like(tensor, rng.choice((torch.nan, torch.inf)))
            case _:
                state[name] = tensor.flatten()
    if rng.random() < 0.2:
        stem = rng.choice(
            ("double_blocks", "single_blocks", "transformer_blocks", "decoder.up_blocks")
        )
        state |= {f"{stem}.{n}.x": torch.zeros(0) for n in range(rng.choice((50, 1000)))}
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    return save(state)


def _other_kind(rng: random.Random, sound: Sound) -> bytes:
    """Something else under the name of a weight file."""
    page = b"<!DOCTYPE html><html><head><title>Access denied</title></head></html>" * 9
    zipped, tarred = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(
        zipped, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    ) as file:
        file.writestr(rng.choice(("model.safetensors", "archive/data.pkl")), sound.files["lora"])
    with tarfile.open(fileobj=tarred, mode="w") as file:
        file.addfile(tarfile.TarInfo("a"), io.BytesIO())
    return rng.choice(
        (
            b"",
            b"\0",
            b"\0" * 5000,
            page,
            b"\n\n  <html>" + page,
            b"\xef\xbb\xbf<?xml version='1'?>",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 25643\n",
            b"\x89PNG\r\n\x1a\n" + rng.randbytes(99),
            b"\xff\xd8\xff\xe0" + rng.randbytes(99),
            b"\0\0\0 ftypisom" + rng.randbytes(99),
            b"RIFF1234WEBP",
            b"GIF89a" + rng.randbytes(30),
            b"\x1aE\xdf\xa3" + rng.randbytes(30),
            b"%PDF-1.7 " + rng.randbytes(30),
            gzip.compress(sound.files["lora"]),
            b"7z\xbc\xaf\x27\x1c" + rng.randbytes(60),
            b"Rar!\x1a\x07\x01\0" + rng.randbytes(60),
            b"PK\x03\x04",
            zipped.getvalue(),
            tarred.getvalue(),
            json.dumps({"nodes": [], "links": [], "version": 0.4}).encode(),
            b"[" * 100_000,
            b"{}",
            b"MZ" + rng.randbytes(60),
            b"\x7fELF" + rng.randbytes(60),
            b"\x93NUMPY\x01\0",
            b"just some text\n" * 20,
            rng.randbytes(rng.choice((1, 7, 8, 9, 600))),
            b"GGUF",
            b"GGUF\x03\0\0\0",
            struct.pack("<Q", 2) + b"{}",
            struct.pack("<Q", 5) + b"[[[[[",
            struct.pack("<Q", 10**17) + b"{" * 50,
            struct.pack("<Q", 200_000) + b"[" * 200_000,
            struct.pack("<Q", 40) + b'{"a":' * 8,
        )
    )


def _odd_pickle(rng: random.Random, sound: Sound, marker: Path) -> bytes:
    own: dict[str, object] = {}
    own["state_dict"] = own
    deep: dict[str, object] = dict(sound.state)
    for _ in range(50):
        deep = {"state_dict": deep}
    first = next(iter(sound.state))
    contents: tuple[object, ...] = (
        own, deep, {"state_dict": own, "model": own}, Evil(marker), {"a": Evil(marker)},
        {"state_dict": {"a": torch.ones(2), "b": Evil(marker)}}, [], 5, "text", {}, {"a": 5},
        {1: torch.ones(2)}, torch.ones(3), {"a": torch.ones(2, dtype=torch.complex128)},
        {ESCAPES[rng.randrange(4)]: torch.ones(2)}, {"x" * 300_000: torch.ones(2)},
        {**sound.state, first: torch.ones(1).expand(10**12)},
        {**sound.state, first: torch.ones(3, 3).to_sparse()},
        {**sound.state, "more" + ESCAPES[0]: torch.ones(1)},
    )  # fmt: skip
    content = rng.choice(contents)
    if rng.random() < 0.3:
        try:
            return pickle.dumps(content, protocol=rng.choice((0, 2, 4)))
        except Exception:  # noqa: BLE001 - some of them only torch can write
            content = Evil(marker)
    return _pickled(content, old=rng.random() < 0.3)


def _odd_place(rng: random.Random, sound: Sound, path: Path) -> None:
    """What is no file, and folders."""
    index = "diffusion_pytorch_model.safetensors.index.json"
    match rng.randrange(12):
        case 0:
            os.mkfifo(path)
        case 1:
            with socket.socket(socket.AF_UNIX) as end:
                end.bind("s")  # at most 107 bytes
            os.rename("s", path)
        case 2:
            path.symlink_to(rng.choice(("/dev/zero", "/dev/null", path.name, "nowhere")))
        case 3:
            pass  # missing
        case kind:
            path.mkdir()
            shard = "m-00001-of-00002.safetensors"
            names = dict.fromkeys(["a", "b"], shard)
            if kind == 4:
                os.mkfifo(path / rng.choice((index, "x.safetensors", "config.json")))
            elif kind == 5:
                names = {str(n): f"{n}.safetensors" for n in range(rng.choice((2, 1001)))}
            elif kind == 6:
                names = {
                    "a": rng.choice(("../x", "/etc/passwd", "a\0b", ESCAPES[0], "", ".", "a/b"))
                }
            elif kind == 7:
                (path / "config.json").write_bytes(
                    rng.choice(
                        (b"{", b"[" * 99_999, b'{"rope_theta": "\\u001b[1m"}', b"\xff", b"5")
                    )
                )
                (path / "m.safetensors").write_bytes(sound.files["diffusers"])
            elif kind == 8:
                for part in ("transformer", "vae", "a"):
                    (path / part).mkdir()
            elif kind == 9:
                (path / "a.safetensors").write_bytes(sound.files["lora"])
                (path / "b.safetensors").write_bytes(sound.files["vae"])
            elif kind == 10:
                (path / shard).write_bytes(sound.files["lora"])
            if kind in (5, 6, 11):
                content = rng.choice(
                    (b"{}", b"[]", b'{"weight_map": 5}', b"\xff\xfe", b"[" * 99_999)
                )
                if kind != 11:
                    content = json.dumps({"weight_map": names}).encode()
                (path / index).write_bytes(content)


def odd_file(rng: random.Random, sound: Sound, folder: Path, marker: Path) -> Path:
    """Make one.

    Args:
        rng: decides.
        sound: see `Sound`.
        folder: that it lies in, alone.
        marker: what program code in it would make.

    Returns:
        Its path, which may be a folder or missing.
    """
    name = rng.choice(("model", "m\x1b[31m", "a" * 200, "diffusion_pytorch_model"))
    if rng.random() < 0.04:
        name = "x-00001-of-00006"
    path = folder / (name + rng.choice(SUFFIXES))
    makers: tuple[Callable[[], bytes], ...] = (
        lambda: _mutated(rng, rng.choice(list(sound.files.values()))),
        lambda: _mutated(rng, rng.choice(list(sound.files.values()))),
        lambda: _odd_header(rng, sound.files[rng.choice(HEADERS)]),
        lambda: _odd_header(rng, sound.files[rng.choice(HEADERS)]),
        lambda: _odd_model(rng, sound),
        lambda: _odd_model(rng, sound),
        lambda: _other_kind(rng, sound),
        lambda: _odd_pickle(rng, sound, marker),
        lambda: rng.choice(list(sound.files.values())),
    )  # fmt: skip
    if rng.random() < 0.15:
        _odd_place(rng, sound, path)
        return path
    path.write_bytes(rng.choice(makers)())
    return path
