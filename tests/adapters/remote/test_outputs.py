"""A task's files as node outputs: any kind of file, in bounded memory."""

import asyncio
import io
import json
import os
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from comfyui_skyreels.nodes import host
from comfyui_skyreels.nodes.local.receipts import SkyReelsFromReceipt
from comfyui_skyreels.nodes.remote import account
from comfyui_skyreels.nodes.remote import decode as wiro_decode
from comfyui_skyreels.nodes.remote import nodes as remote
from comfyui_skyreels.nodes.remote import run as wiro_run
from comfyui_skyreels.wiro_api import client as client_module
from comfyui_skyreels.wiro_api.errors import DownloadError, WiroError
from comfyui_skyreels.wiro_api.video import frame_size
from PIL import Image
from support.clip import make_clip
from support.forked import forks
from support.host import ExecutionBlocker, InterruptProcessingException
from support.wiro_server import WiroServer

ROOT = Path(__file__).resolve().parents[3]
CLIP = make_clip(5, 48, 32)
NAMES = remote.WiroRunModel.RETURN_NAMES
INPUTS = {"model": "wiro/SkyReels-V1", "parameters": json.dumps({"prompt": "x", "size": "960x544"})}


def graph_of(*linked: str, cls=remote.WiroRunModel, **inputs) -> dict:
    """A prompt of one node of ours with a node at each of some outputs."""
    graph = {"7": {"class_type": cls.__name__, "inputs": inputs or dict(INPUTS)}}
    for number, name in enumerate(linked):
        link = ["7", cls.RETURN_NAMES.index(name)]
        graph[f"1{number}"] = {"class_type": "Any", "inputs": {"value": link}}
    return graph


def run(*linked: str, **changes) -> dict:
    """Name -> output of Wiro Run Model, queued in a graph."""
    inputs = {**INPUTS, **changes}
    graph = graph_of(*linked, **inputs)
    picture = torch.zeros(1, 8, 8, 3)
    with torch.inference_mode():
        outputs = asyncio.run(
            remote.WiroRunModel().run(image=picture, unique_id="7", graph=graph, **inputs)
        )
    return dict(zip(NAMES, outputs, strict=True))


def make(wiro, **contents: bytes) -> None:
    """Let tasks make these files; "a_png" is a.png."""
    files = {name.replace("_", "."): content for name, content in contents.items()}
    wiro.files = files
    kinds = {
        "png": "image/png",
        "webp": "image/webp",
        "gif": "image/gif",
        "svg": "image/svg+xml",
        "mp4": "video/mp4",
        "wav": "audio/wav",
        "zip": "application/zip",
    }
    wiro.final = {
        "outputs": [
            {
                "name": name,
                "url": wiro.file_url(name),
                "contenttype": kinds.get(name.rpartition(".")[2], ""),
            }
            for name in files
        ]
    }


def encoded(form: str, *frames: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    more = {"save_all": True, "append_images": frames[1:]} if len(frames) > 1 else {}
    frames[0].save(file, form, **more, **options)
    return file.getvalue()


def rgba(red: int, alpha: int, size=(6, 4)) -> Image.Image:
    return Image.new("RGBA", size, (red, 0, 0, alpha))


def sound(seconds: float = 0.5, rate: int = 8000) -> bytes:
    file = io.BytesIO()
    samples = (np.sin(np.arange(int(seconds * rate)) / 8) * 16000).astype(np.int16)
    with wave.open(file, "wb") as made:
        made.setnchannels(2)
        made.setsampwidth(2)
        made.setframerate(rate)
        made.writeframes(np.stack([samples, -samples], axis=1).tobytes())
    return file.getvalue()


def kept(comfy, taskid: str = "2221") -> dict[str, bytes]:
    folder = comfy.root / "output" / "wiro" / taskid
    files = (path for path in folder.iterdir() if not path.name.endswith(".receipt.json"))
    return {path.name: path.read_bytes() for path in files}


# --- whatever the model makes -------------------------------------------------------------------


def test_pictures_with_alpha_give_images_and_masks_as_core_does(comfy, wiro):
    make(
        wiro,
        a_png=encoded("PNG", rgba(255, 0)),
        b_webp=encoded("WEBP", rgba(0, 255)),
        c_png=encoded("PNG", Image.new("RGB", (6, 4))),
    )
    got = run("images", "mask")
    assert got["images"].shape == (3, 4, 6, 3)
    assert got["mask"].shape == (3, 4, 6)
    assert [got["mask"][n].mean().item() for n in range(3)] == [1.0, 0.0, 0.0]
    assert got["images"].dtype == got["mask"].dtype == torch.float32
    assert "made no video" in got["video"].message
    assert "made no sound" in got["audio"].message


def test_pictures_without_alpha_give_the_empty_mask_of_core(comfy, wiro):
    make(wiro, a_png=encoded("PNG", Image.new("RGB", (6, 4), (255, 0, 0))))
    got = run("images", "mask")
    assert got["images"][0, 0, 0].tolist() == [1.0, 0.0, 0.0]
    assert torch.equal(got["mask"], torch.zeros(1, 64, 64))


@pytest.mark.parametrize("form", ["WEBP", "GIF", "PNG"])
def test_animated_pictures_give_all_frames(comfy, wiro, form):
    frames = [Image.new("RGB", (6, 4), (80 * n, 255 - 80 * n, 0)) for n in range(3)]
    options = {"lossless": True} if form == "WEBP" else {}
    make(wiro, **{f"a_{form.lower()}": encoded(form, *frames, **options)})
    images = run("images")["images"]
    assert images.shape == (3, 4, 6, 3)
    assert (images[:, 0, 0, 0] * 255).round().tolist() == pytest.approx([0, 80, 160], abs=3)


def test_a_picture_of_another_kind_of_pixels_is_read(comfy, wiro):
    make(
        wiro,
        a_png=encoded("PNG", Image.new("P", (6, 4)), transparency=0),
        b_png=encoded("PNG", Image.new("I;16", (6, 4), 30000)),
        c_png=encoded("PNG", Image.new("L", (6, 4), 128)),
        d_png=encoded("PNG", Image.new("RGB", (9, 9))),
    )
    got = run("images", "mask")
    assert got["images"].shape == (3, 4, 6, 3), "of another size: left out"
    assert got["mask"][0].mean() == 1.0


def test_sound_comes_out_of_audio_files_and_else_of_videos(comfy, wiro):
    make(wiro, a_wav=sound())
    audio = run("audio")["audio"]
    assert (audio["waveform"].shape, audio["sample_rate"]) == ((1, 2, 4000), 8000)
    assert audio["waveform"].dtype == torch.float32
    assert audio["waveform"].abs().max() == pytest.approx(16000 / 32768, abs=0.01)
    make(wiro, a_mp4=clip_with_sound())
    audio = run("audio", take=2)["audio"]
    assert audio["waveform"].shape[:2] == (1, 1)
    assert audio["waveform"].shape[2] >= 4000
    make(wiro, a_mp4=CLIP)
    assert "no sound" in run("audio", take=3)["audio"].message


def clip_with_sound() -> bytes:
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        video, audio = container.add_stream("libx264", rate=24), container.add_stream("aac", 8000)
        video.width, video.height, video.pix_fmt = 48, 32, "yuv420p"
        audio.layout = "mono"
        for _ in range(4):
            container.mux(video.encode(av.VideoFrame(48, 32, "yuv420p")))
        samples = np.zeros((1, 4096), np.float32)
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(audio.encode(frame))
        container.mux(video.encode())
        container.mux(audio.encode())
    return file.getvalue()


def test_text_comes_from_models_that_write_and_else_from_small_text_files(comfy, wiro):
    make(
        wiro,
        a_txt="ä text".encode(),
        b_json=b'{"a": 1}',
        c_srt=b"\xef\xbb\xbf1\n",
        d_svg=b"<svg/>",
        e_txt=b"x" * 2_000_000,
        f_md=b"\xff",
    )
    assert run("text")["text"] == 'ä text\n{"a": 1}\n1\n'
    wiro.final["outputs"].append({"contenttype": "raw", "content": "written"})
    for _ in range(2):  # from the service, and again beside the files that are here
        assert run("text", take=2)["text"] == "written"
    assert len(wiro.tasks) == 2


@pytest.mark.parametrize("linked", [(), ("images", "video", "mask", "audio", "text", "files")])
def test_every_file_is_kept_and_listed_whatever_it_is(comfy, wiro, linked):
    contents = {
        "a.svg": b"<svg/>",
        "b.zip": b"PK\3\4" + bytes(9),
        "c.glb": b"glTF" + bytes(9),
        "d.bin": bytes(9),
        "e.html": b"<html><script>",
    }
    make(wiro, **{name.replace(".", "_"): content for name, content in contents.items()})
    got = run(*linked)
    assert kept(comfy) == contents
    assert json.loads(got["files"]) == [f"wiro/2221/{name}" for name in contents]
    assert json.loads(got["receipt"])["files"] == json.loads(got["files"])
    for name in ("images", "mask", "video", "audio"):
        assert isinstance(got[name], ExecutionBlocker)
    assert str(comfy.root) not in got["files"]


@pytest.mark.parametrize("name", ["a_png", "a_webp", "a_mp4", "a_wav"])
def test_what_does_not_decode_is_kept_and_stops_only_what_hangs_on_it(comfy, wiro, name):
    """Neither is it fetched twice, nor paid for twice."""
    good = {
        "a_png": encoded("PNG", rgba(9, 9, (64, 64))),
        "a_wav": sound(),
        "a_mp4": CLIP,
        "a_webp": encoded("WEBP", rgba(9, 9, (64, 64))),
    }[name]
    spoiled = bytearray(good)
    # what frames it stays
    places = {"a_mp4": good.index(b"avcC") + 4 if name == "a_mp4" else 0, "a_wav": 20}
    start = places.get(name, 40)
    end = start + 26 if name in places else len(good) - 40
    spoiled[start:end] = bytes(byte ^ 0x5A for byte in spoiled[start:end])
    make(wiro, **{name: bytes(spoiled)})
    for _ in range(2):
        got = run("images", "audio", "files")
        assert isinstance(got["images"], ExecutionBlocker)
        assert isinstance(got["audio"], ExecutionBlocker)
        told = got["audio" if name == "a_wav" else "images"].message
        assert f"wiro/2221/{name.replace('_', '.')}" in told
    assert kept(comfy) == {name.replace("_", "."): bytes(spoiled)}
    assert len(wiro.fetched) == 1
    assert len(wiro.tasks) == 1


# --- only what is wanted, in the memory that is free --------------------------------------------


def test_nothing_is_decoded_that_nothing_hangs_on(comfy, wiro, monkeypatch):
    def decode(*_):
        raise AssertionError("decoded")

    for name in ("read_clip", "read_pictures", "read_audio"):
        monkeypatch.setattr(wiro_run, name, decode)
    wiro.files["0.mp4"] = CLIP
    got = run("video", "receipt", "files", "text")
    assert Path(got["video"].file).read_bytes() == CLIP
    assert "queue again" in got["images"].message


def test_a_node_that_is_not_in_the_prompt_decodes_all(comfy, wiro):
    """One that another node has made: what hangs on it cannot be known."""
    for graph in (None, {}, {"8": {"class_type": "Any", "inputs": {"value": ["7.0.1", 0]}}}):
        with torch.inference_mode():
            outputs = asyncio.run(
                remote.WiroRunModel().run(
                    image=torch.zeros(1, 8, 8, 3), unique_id="7", graph=graph, **INPUTS
                )
            )
        assert outputs[0].shape == (5, 32, 48, 3)


@pytest.mark.parametrize("announced", [2**31 - 1, 10**6, 3, 1, 0])
def test_a_header_that_lies_about_the_number_of_frames_is_not_believed(
    comfy, wiro, caplog, announced
):
    """In both places where MP4 tells it."""
    make(wiro, **{"0_mp4": lying(announced)})
    got = run("images", "video")
    assert Path(got["video"].file).name == "0.mp4"
    if isinstance(got["images"], ExecutionBlocker):  # FFmpeg itself gives up
        assert "does not decode" in got["images"].message or "ends" in got["images"].message
    else:
        assert got["images"].shape[0] <= 5
    assert kept(comfy)["0.mp4"] == wiro.files["0.mp4"]


def lying(count: int) -> bytes:
    """CLIP whose table of sample sizes announces another number of frames."""
    content = bytearray(CLIP)
    place = content.index(b"stsz") + 4 + 8
    content[place : place + 4] = count.to_bytes(4, "big")
    return bytes(content)


@pytest.mark.parametrize("kind", ["video", "picture", "animation"])
def test_what_does_not_fit_memory_is_refused_in_words_and_the_file_is_there(comfy, wiro, kind):
    frames = [Image.new("RGB", (480, 320), (n, n, n)) for n in range(5)]
    contents = {
        "video": {"0_mp4": make_clip(5, 480, 320)},
        "picture": {"0_png": encoded("PNG", frames[0])},
        "animation": {"0_webp": encoded("WEBP", *frames)},
    }[kind]
    make(wiro, **contents)
    comfy.free_bytes = 480 * 320 * 3 * 5 // 2
    got = run("images", "mask", "video", "files")
    for name in ("images", "mask"):
        message = got[name].message
        assert "480x320, which need 0.0 GB as IMAGE, but only 0.0 GB of memory are free" in message
        assert "connect video instead of images" in message
        assert "The file is kept: wiro/2221/0." in message
    assert len(kept(comfy)) == 1
    assert isinstance(got["video"], ExecutionBlocker) is (kind != "video")
    # with room it is read, from the disk
    comfy.free_bytes = 10**9
    assert run("images")["images"].shape[1:] == (320, 480, 3)
    assert (len(wiro.fetched), len(wiro.tasks)) == (1, 1)


def test_frames_are_counted_against_memory_as_they_come(comfy, wiro):
    wiro.files["0.mp4"] = make_clip(40, 64, 48)
    comfy.free_bytes = int(64 * 48 * 3 * 5 * 20 / wiro_decode.MEMORY_FRACTION)
    message = run("images")["images"].message
    assert "0.mp4 has 40 frames of 64x48" in message
    comfy.free_bytes *= 3
    assert run("images")["images"].shape[0] == 40


def test_cancel_is_seen_while_frames_are_decoded(comfy, wiro):
    wiro.files["0.mp4"] = make_clip(40, 64, 48)
    original = wiro_run.read_clip

    def cancel_then_read(path, check):
        comfy.is_cancelled = True
        return original(path, check)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(InterruptProcessingException):
        patch.setattr(wiro_run, "read_clip", cancel_then_read)
        run("images")
    assert len(kept(comfy)) == 1, "it is paid for"
    assert run("images")["images"].shape[0] == 40
    assert len(wiro.fetched) == 1


PEAK = """
import asyncio, json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1] + "/tests")
import comfyui_skyreels  # before there is a server that it could serve
from support import host
comfy = host.Host(Path(sys.argv[2]))
sys.modules.update(host.stand_ins(comfy))
import torch, requests, numpy
from comfyui_skyreels.nodes.remote import nodes as remote
import comfyui_skyreels.wiro_api.jobs, comfyui_skyreels.wiro_api.video
def peak(reset=False):
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1000
inputs = json.loads(sys.argv[3])
graph = {"7": {"class_type": "WiroRunModel", "inputs": inputs},
         "8": {"class_type": "SaveVideo", "inputs": {"video": ["7", 1]}}}
picture = torch.zeros(1, 8, 8, 3)
idle = peak(reset=True)
outputs = asyncio.run(
    remote.WiroRunModel().run(image=picture, unique_id="7", graph=graph, **inputs))
print(json.dumps([peak() - idle, str(outputs[1].file)]))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux counts so")
def test_240_frames_of_1080p_take_little_memory_if_only_the_video_is_wanted(comfy, wiro, tmp_path):
    """Decoded they would be 6 GB."""
    wiro.files["0.mp4"] = still_clip(240, 1920, 1080)
    command = ["-c", PEAK, str(ROOT), str(tmp_path / "comfy"), json.dumps(INPUTS)]
    done = forks("torch").run(command, {**os.environ})
    assert done.returncode == 0, done.stderr
    peak_mb, file = json.loads(done.stdout.splitlines()[-1])
    assert Path(file).read_bytes() == wiro.files["0.mp4"]
    assert frame_size(Path(file)) == (1920, 1080, 240)
    assert peak_mb <= 200


def still_clip(count: int, width: int, height: int) -> bytes:
    """One frame, encoded once, that many times."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"preset": "ultrafast", "tune": "zerolatency"}
        encoder = stream.codec_context
        (packet,) = encoder.encode(av.VideoFrame(width, height, "yuv420p"))
        content = bytes(packet)
        for number in range(count):
            copy = av.Packet(content)
            copy.stream, copy.time_base = stream, encoder.time_base
            copy.pts = copy.dts = number
            copy.is_keyframe = True
            container.mux(copy)
    return file.getvalue()


# --- one bad file -------------------------------------------------------------------------------


def test_a_side_file_that_does_not_come_is_a_warning_on_the_node(comfy, wiro, caplog):
    make(wiro, **{"cover_png": encoded("PNG", rgba(1, 1)), "0_mp4": CLIP})
    wiro.fail("GET cover.png", *[410] * 20)
    got = run("images", "video")
    assert got["images"].shape == (5, 32, 48, 3)
    assert list(kept(comfy)) == ["0.mp4"]
    words = "1 of 2 files of task 2221 cannot be fetched: cover.png (the server answered HTTP 410)"
    assert words in caplog.text
    assert words in comfy.texts[-1]
    assert comfy.texts[-1].startswith("done · charged $0.00351 · task 2221 · ")
    wiro._faults.clear()
    wiro.fetched.clear()
    got = run("images", "video", "files")
    assert json.loads(got["files"]) == ["wiro/2221/cover.png", "wiro/2221/0.mp4"]
    assert len(wiro.fetched) == len(wiro.tasks) == 1


def test_a_main_file_that_does_not_come_is_an_error_and_the_others_are_kept(comfy, wiro):
    make(wiro, **{"cover_png": encoded("PNG", rgba(1, 1)), "0_mp4": CLIP})
    wiro.fail("GET 0.mp4", *[410] * 20)
    with pytest.raises(DownloadError, match=r"0.mp4 \(.*410.*here are cover.png.*paid for"):
        run("video")
    assert list(kept(comfy)) == ["cover.png"]
    wiro._faults.clear()
    assert Path(run("video")["video"].file).read_bytes() == CLIP
    assert (len(wiro.tasks), sorted(kept(comfy))) == (1, ["0.mp4", "cover.png"])


def test_of_several_pictures_those_that_come_go_on(comfy, wiro):
    contents = {f"{n}_png": encoded("PNG", rgba(n, 255)) for n in range(4)}
    make(wiro, **contents)
    wiro.fail("GET 2.png", *[410] * 20)
    assert run("images")["images"].shape[0] == 3
    assert "3" not in comfy.texts[-1].partition("files")[0][-3:]


# --- files that are gone ------------------------------------------------------------------------


def queue(comfy, *linked: str, cls=remote.WiroRunModel, **inputs):
    """Queue as ComfyUI does: the token is asked for first; returns it and what runs the node."""
    inputs = inputs or dict(INPUTS)
    comfy.graph = graph_of(*linked, cls=cls, **inputs)
    token = cls.IS_CHANGED(**inputs, unique_id="7", graph={})

    def execute():
        extra = {"image": torch.zeros(1, 8, 8, 3)} if cls is not remote.WiroTaskResult else {}
        with torch.inference_mode():
            outputs = asyncio.run(
                getattr(cls(), cls.FUNCTION)(**inputs, **extra, unique_id="7", graph=comfy.graph)
            )
        return dict(zip(cls.RETURN_NAMES, outputs, strict=True))

    return token, execute


I2V = {"prompt": "x", "size": "960x544", "fit": "crop", "num_frames": 97, "steps": 30, "cfg": 6.0}


@pytest.mark.parametrize(
    ("cls", "inputs"),
    [
        (remote.WiroRunModel, INPUTS),
        (remote.WiroRemoteI2V, I2V),
        (remote.WiroTaskResult, {"task": "2221"}),
    ],
)
def test_a_node_runs_again_if_its_files_are_gone_and_only_then(comfy, wiro, cls, inputs):
    wiro_run._results.clear()
    wiro.files["0.mp4"] = CLIP
    if cls is remote.WiroTaskResult:
        wiro.add_task({"prompt": "x"})
    first, execute = queue(comfy, "video", cls=cls, **inputs)
    file = Path(execute()["video"].file)
    for _ in range(2):
        assert queue(comfy, "video", cls=cls, **inputs)[0] == first, "unchanged: not run again"
    file.unlink()
    second, execute = queue(comfy, "video", cls=cls, **inputs)
    assert second != first
    assert Path(execute()["video"].file) == file
    assert file.read_bytes() == CLIP
    for _ in range(2):
        assert queue(comfy, "video", cls=cls, **inputs)[0] == second
    assert len(wiro.tasks) == 1


def test_a_node_runs_again_if_something_else_hangs_on_it(comfy, wiro):
    """What was not decoded must not come out of ComfyUI's cache."""
    wiro_run._results.clear()
    tokens = {
        linked: queue(comfy, *linked)[0]
        for linked in [("video",), ("images",), ("images", "video"), ("mask",), ("files",)]
    }
    assert tokens[("video",)] == tokens[("files",)]
    assert tokens[("images",)] == tokens[("images", "video")]
    assert len(set(tokens.values())) == 3
    comfy.graph = None
    assert "images" in remote.WiroRunModel.IS_CHANGED(unique_id="7")


def test_other_widgets_are_another_result(comfy, wiro):
    wiro_run._results.clear()
    wiro.files["0.mp4"] = CLIP
    queue(comfy, "video", **INPUTS, take=1)[1]()
    second, execute = queue(comfy, "video", **INPUTS, take=2)
    execute()
    (comfy.root / "output" / "wiro" / "2221" / "0.mp4").unlink()
    assert queue(comfy, "video", **INPUTS, take=2)[0] == second
    assert queue(comfy, "video", **INPUTS, take=1)[0] != second


@pytest.mark.parametrize("is_there", [True, False])
def test_part_of_the_files_is_enough_if_the_rest_is_gone_for_good(
    comfy, wiro, monkeypatch, is_there
):
    monkeypatch.setattr(client_module, "NO_OUTPUT_WAIT_S", 0.01)
    make(wiro, **{"cover_png": encoded("PNG", rgba(1, 1)), "0_mp4": CLIP})
    run("video")
    folder = comfy.root / "output" / "wiro" / "2221"
    (folder / ("cover.png" if is_there else "0.mp4")).unlink()
    wiro.tasks["2221"]["outputs"] = []  # as after "delete files" in the panel
    if not is_there:
        with pytest.raises(WiroError, match="2221"):
            run("video")
        return
    got = run("video")
    assert Path(got["video"].file).read_bytes() == CLIP
    assert "may have been deleted" in comfy.texts[-1]
    assert len(wiro.tasks) == 1


def test_the_list_of_nodes_that_are_looked_after_is_bounded(comfy, wiro):
    wiro_run._results.clear()
    result = wiro_run.Result("1", "", "", "", "", "", (), "", "", "")
    for number in range(wiro_run.KEPT_NODES + 50):
        wiro_run.remember(None, str(number), result)
    assert len(wiro_run._results) == wiro_run.KEPT_NODES
    assert (
        host.linked_outputs({"1": {"inputs": {"a": ["2", 0], "b": [1, 2, 3], "c": "x"}}}, "1")
        == set()
    )
    assert account.task_folder("1").name == "1"


@pytest.mark.parametrize("fault", [("silent", 60), ("stall", 60), ("drip", 5)])
def test_cancel_is_seen_while_a_file_server_says_nothing(comfy, wiro, fault):
    import threading
    import time

    assert isinstance(wiro, WiroServer)
    wiro.fail("GET 0.mp4", fault)

    def cancel() -> None:
        while not wiro.fetched:
            time.sleep(0.01)
        comfy.is_cancelled = True

    watching = threading.Thread(target=cancel)
    watching.start()
    with pytest.raises(InterruptProcessingException):
        run("video")
    watching.join()
    assert wiro.held_s == 0, "it would be silent for a minute"
    assert Path(run("video")["video"].file).is_file(), "the next run is good"
    assert len(wiro.tasks) == 1


def test_files_say_what_they_are_and_are_not_copied_again(comfy, wiro):
    wiro.final = {**wiro.final, "starttime": "1750513340"}
    first = run("video", parameters=json.dumps({"prompt": "FPS-24, a fox runs"}))
    name = "2025-06-21_a-fox-runs_0"
    folder = comfy.root / "output" / "wiro" / "2221"
    names = sorted([f"{name}.mp4", f"{name}.receipt.json"])
    assert sorted(path.name for path in folder.iterdir()) == names
    assert Path(first["video"].file).name == f"{name}.mp4"
    fetched = len(wiro.fetched)
    again = asyncio.run(remote.WiroTaskResult().collect("2221"))
    assert again[NAMES.index("files")] == first["files"]
    assert len(wiro.fetched) == fetched
    assert sorted(path.name for path in folder.iterdir()) == names
    told = SkyReelsFromReceipt().read(receipt=f"wiro/2221/{name}.mp4 [output]")
    assert told[0] == "FPS-24, a fox runs"
