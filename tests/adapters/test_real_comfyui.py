"""The package in a real ComfyUI: its server, its executor, its samplers, its memory manager."""

import base64
import contextlib
import io
import json
import os
import re
import signal
import socket
import stat
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import replace
from pathlib import Path

import comfyui_skyreels
import pytest
import websocket
from comfyui_skyreels.skyreels.builtin import BUILTIN_NAME
from comfyui_skyreels.skyreels.vae.model import VideoVAE
from support import gguf_files, locales, lora, tiny
from support.checkout import Checkout
from support.clip import make_clip
from support.wiro_server import KEY, SECRET, WiroServer
from support.workflows import TITLES, shipped

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = ROOT / "tests" / "support"
PACK = "skyreels-wiro"
WORKFLOWS = list(TITLES)
TRANSFORMERS = (
    "skyreels_hunyuan_i2v_bf16.safetensors",
    "skyreels_hunyuan_i2v_fp8_e4m3fn.safetensors",
)
LORA = "hyvideo_FastVideo_LoRA-fp8.safetensors"

pytestmark = [pytest.mark.comfy, pytest.mark.usefixtures("checkout")]


class Server:
    """A running ComfyUI and the few calls the tests make."""

    def __init__(self, checkout: Checkout, base: Path, wiro: WiroServer, *flags: str) -> None:
        self.checkout = checkout
        self.base, self.wiro = base, wiro
        self.log = base / "server.log"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [checkout.python(), "main.py", "--cpu", "--listen", "127.0.0.1", "--port", port,
                   "--disable-auto-launch", "--disable-api-nodes", "--base-directory", base,
                   "--verbose", "DEBUG",
                   "--database-url", f"sqlite:///{base}/comfyui.db", *flags]  # fmt: skip
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("WIRO_")},
            "XDG_STATE_HOME": str(base / "state"),
            "WIRO_API_BASE_URL": wiro.url, "WIRO_SOCKET_URL": wiro.socket_url,
            "HOME": str(base), "PYTHONDONTWRITEBYTECODE": "1",
        }  # fmt: skip
        self.command, self.environment = list(map(str, command)), environment
        self.start()

    def start(self) -> None:
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                self.command, cwd=self.checkout.folder, env=self.environment, stdout=log,
                stderr=subprocess.STDOUT,
            )  # fmt: skip

    def wait_until_ready(self) -> None:
        for _ in range(600):
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                self.get("/object_info/SkyReelsSampler")
                return
            except OSError:
                time.sleep(0.2)
        raise AssertionError(self.log.read_text()[-3000:])

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def get(self, path: str, **headers: str) -> bytes:
        request = urllib.request.Request(
            self.url + path, headers={name.replace("_", "-"): v for name, v in headers.items()}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.read()

    def post(self, path: str, body: dict, **headers: str | None) -> tuple[int, dict]:
        """As the page does; a header that is None is not sent."""
        sent = {"Content-Type": "application/json", "Origin": self.url, **headers}
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(),
            {name.replace("_", "-"): value for name, value in sent.items() if value is not None},
        )  # fmt: skip
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, json.loads(answer.read() or b"{}")
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def queue(self, prompt: dict, client_id: str = "", **headers: str) -> str:
        page = {"client_id": client_id} if client_id else {}
        status, answer = self.post("/prompt", {"prompt": prompt, **page}, **headers)
        assert (status, answer.get("node_errors")) == (200, {}), answer
        return answer["prompt_id"]

    def result(self, prompt_id: str, limit_s: float = 120) -> dict:
        end = time.monotonic() + limit_s
        while time.monotonic() < end:
            history = json.loads(self.get(f"/history/{prompt_id}"))
            if prompt_id in history:
                return history[prompt_id]
            time.sleep(0.02)
        raise AssertionError(f"still running; log: {self.log.read_text()[-2000:]}")


@pytest.fixture(scope="module")
def server(checkout, tmp_path_factory):
    base = tmp_path_factory.mktemp("comfy")
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes" / PACK).symlink_to(ROOT)
    (base / "custom_nodes" / "test_nodes.py").symlink_to(SUPPORT / "comfy_test_nodes.py")
    models = base / "models"
    for file in TRANSFORMERS:
        tiny.save(models / "diffusion_models" / file, tiny.transformer().state_dict())
    blocks = gguf_files.in_blocks(tiny.transformer().state_dict())
    gguf_files.write(models / "diffusion_models" / "skyreels-hunyuan-I2V-Q4_K_S.gguf", blocks)
    text_only = tiny.transformer(replace(tiny.TRANSFORMER, in_channels=16)).state_dict()
    tiny.save(
        models / "diffusion_models" / "skyreels_hunyuan_t2v_fp8_e4m3fn.safetensors", text_only
    )
    vae = tiny.randomize(VideoVAE(tiny.VAE)).state_dict()
    tiny.save(models / "vae" / "hunyuan_video_vae_bf16.safetensors", vae)
    factors = lora.letters(lora.whole_modules(lora.draw_parts()), "transformer.")
    tiny.save(models / "loras" / LORA, factors)
    (base / "input").mkdir()
    portrait = (ROOT / "web" / "portrait.jpg").read_bytes()
    (base / "input" / "skyreels_portrait.jpg").write_bytes(portrait)
    with WiroServer(pace_s=2.0, with_socket=True, schema=True) as wiro:
        wiro.files["0.mp4"] = make_clip(5, 48, 32)
        server = Server(checkout, base, wiro)
        try:
            server.wait_until_ready()
            # the key comes as a person gives it: through the settings, once
            status, _ = server.post(
                "/skyreels/wiro/account", {"api_key": KEY, "api_secret": SECRET}
            )
            assert status == 200
            yield server
        finally:
            server.stop()


def small_prompt(name: str, **changes) -> dict:
    """A shipped workflow, as the page sends it, on tiny weights and at a small size.

    The core text encoders are 9 GB: a test node makes the same kind of CONDITIONING.
    """
    prompt = json.loads((ROOT / "tests" / "workflows" / f"{name}.api.json").read_text())
    small = {"width": 48, "height": 32, "num_frames": 5, "steps": 2, **changes}
    for key, node in list(prompt.items()):
        if node["class_type"] == "CLIPTextEncode":
            node["class_type"] = "TestConditioning"
            text = node["inputs"]["text"]
            node["inputs"] = {"text": text, "width": tiny.TRANSFORMER.text_embed_dim,
                              "pooled": tiny.TRANSFORMER.pooled_projection_dim}  # fmt: skip
        elif node["class_type"] == "DualCLIPLoader":
            del prompt[key]
        elif node["class_type"] == "EmptyHunyuanLatentVideo":
            node["inputs"] |= {"width": 48, "height": 32, "length": 5}
        elif node["class_type"].startswith(("SkyReels", "KSampler")):
            node["inputs"] |= {k: v for k, v in small.items() if k in node["inputs"]}
        if node["class_type"] == "SkyReelsI2V":  # Wiro has its own sizes
            is_here = node["inputs"]["backend"] == "local"
            own = {"transformer": BUILTIN_NAME} if is_here else {"width": 960, "height": 544}
            node["inputs"] |= own
    return prompt


def saved_videos(server: Server, result: dict) -> list[Path]:
    files = [f for output in result["outputs"].values() for f in output.get("images", [])]
    places = [server.base / "output" / file["subfolder"] / file["filename"] for file in files]
    return [place for place in places if place.suffix == ".mp4"]


def test_the_pack_is_imported_quickly_and_all_nodes_are_listed(server):
    log = server.log.read_text()
    assert "IMPORT FAILED" not in log
    assert "Cannot import" not in log
    assert re.search(rf"[\d.]+ seconds: \S*{PACK}", log)  # what it imports: test_contract.py
    for name, cls in comfyui_skyreels.NODE_CLASS_MAPPINGS.items():
        info = json.loads(server.get(f"/object_info/{name}"))[name]
        assert info["output"] == list(cls.RETURN_TYPES)
        assert info["description"] == cls.DESCRIPTION
        assert info["output_tooltips"] == list(cls.OUTPUT_TOOLTIPS)


def test_templates_thumbnails_help_and_script_are_served(server):
    listed = json.loads(server.get("/api/workflow_templates"))[PACK]
    assert sorted(listed) == sorted(TITLES.values())
    for name, title in TITLES.items():
        template = f"/api/workflow_templates/{PACK}/{urllib.parse.quote(title)}"
        assert server.get(template + ".json") == shipped(name).read_bytes()
        assert server.get(template + ".jpg")[:2] == b"\xff\xd8"
    assert f"/extensions/{PACK}/skyreels.js" in json.loads(server.get("/extensions"))
    for name in comfyui_skyreels.NODE_CLASS_MAPPINGS:
        assert server.get(f"/extensions/{PACK}/docs/{name}.md").startswith(b"# ")
    assert f"/extensions/{PACK}/wiro.js" in json.loads(server.get("/extensions"))
    assert b"createPanel" in server.get(f"/extensions/{PACK}/wiro/panel.mjs")


@pytest.mark.parametrize("language", ["en", *locales.languages()])
def test_texts_of_a_language_reach_the_page(server, language):
    merged = json.loads(server.get("/i18n"))[language]
    for name in locales.FILES:
        tree = json.loads(locales.read(locales.LOCALES / language / f"{name}.json"))
        shown = merged if name == "main" else merged[name]
        for key, text in locales.flat(tree).items():
            assert locales.flat(shown)[key] == text
    if language != "en":
        for name in comfyui_skyreels.NODE_CLASS_MAPPINGS:
            page = server.get(f"/extensions/{PACK}/docs/{name}/{language}.md")
            assert page == (locales.DOCS / name / f"{language}.md").read_bytes()


def test_blueprints_are_listed_where_comfyui_looks_for_them(server):
    try:
        listed = json.loads(server.get("/global_subgraphs"))
    except urllib.error.HTTPError:
        pytest.skip("this ComfyUI has no blueprints of packs")
    ours = {key: e["name"] for key, e in listed.items() if e["info"]["node_pack"].endswith(PACK)}
    assert sorted(ours.values()) == sorted(p.stem for p in (ROOT / "subgraphs").glob("*.json"))
    for key, name in ours.items():
        entry = json.loads(server.get(f"/global_subgraphs/{key}"))
        assert json.loads(entry["data"])["nodes"][0]["title"] == name


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_runs_to_a_playable_video(server, name):
    import av

    result = server.result(server.queue(small_prompt(name)))
    assert result["status"]["status_str"] == "success", result["status"]
    videos = saved_videos(server, result)
    assert len(videos) == {"local_and_remote": 3, "wiro_batch": 2}.get(name, 1)
    for path in videos:
        width = 48 + 8 + 48 if "compared" in path.name else 48
        width += 8 + 48 if name == "compare" else 0
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
            assert (stream.width, stream.height, stream.average_rate) == (width, 32, 24)
            frames = 9 if name == "extend_video" else 5  # a clip of 5 grows by 4
            assert sum(1 for _ in container.decode(stream)) == frames


def test_cancel_in_mid_run_stops_at_once_and_the_next_run_is_good(server):
    long = server.queue(small_prompt("local_bf16", steps=1000, num_frames=33))
    for _ in range(500):  # until sampling has begun
        if "SkyReelsTransformer" in server.log.read_text().rpartition("got prompt")[2]:
            break
        time.sleep(0.02)
    time.sleep(0.5)
    server.post("/interrupt", {"prompt_id": long})
    result = server.result(long)
    kinds = [kind for kind, _ in result["status"]["messages"]]
    assert "execution_interrupted" in kinds
    again = server.result(server.queue(small_prompt("local_bf16", steps=3)))
    assert again["status"]["status_str"] == "success"


def test_the_plan_is_shown_each_time_it_is_queued(server):
    inputs = {"transformer": BUILTIN_NAME, "width": 64, "height": 64, "num_frames": 17, "steps": 6,
              "cfg": 6.0}  # fmt: skip
    for _ in range(2):
        result = server.result(
            server.queue({"7": {"class_type": "SkyReelsPlan", "inputs": inputs}})
        )
        assert result["status"]["status_str"] == "success", result["status"]
        (text,) = result["outputs"]["7"]["text"]
        assert "17 frames of 64x64" in text


def test_a_missing_file_is_answered_with_our_sentence_before_anything_runs(server):
    prompt = small_prompt("local_bf16", transformer="gone.safetensors")
    status, answer = server.post("/prompt", {"prompt": prompt})
    assert status == 400
    assert "download it from https://huggingface.co/Kijai" in json.dumps(answer["node_errors"])


def test_an_error_in_a_node_is_one_sentence(server):
    prompt = small_prompt("local_bf16")
    for node in prompt.values():
        if node["class_type"] == "SkyReelsSampler":
            del node["inputs"]["negative"]
    result = server.result(server.queue(prompt))
    message = dict(result["status"]["messages"])["execution_error"]["exception_message"]
    assert message.strip().startswith("CFG 6.0 needs a negative prompt")


def test_models_that_were_replaced_are_let_go(server):
    def live_models(seed: int) -> int:
        prompt = small_prompt("local_bf16", seed=seed, precision=("bf16", "fp32")[seed % 2])
        (decode,) = (k for k, n in prompt.items() if n["class_type"] == "SkyReelsVAEDecode")
        prompt["count"] = {"class_type": "TestLiveModels", "inputs": {"after": [decode, 0]}}
        result = server.result(server.queue(prompt))
        assert result["status"]["status_str"] == "success"
        return int(result["outputs"]["count"]["text"][0])

    counts = [live_models(seed) for seed in range(8)]
    assert counts[0] >= 1
    assert max(counts[2:]) <= counts[1]


def test_ten_runs_that_alternate_with_another_model_leave_memory_where_it_was(server):
    def used(run: int) -> tuple[int, int]:
        name = ("local_bf16", "quick_start")[run % 2]
        prompt = small_prompt(name, seed=run)
        (decode,) = (k for k, n in prompt.items() if n["class_type"] == "SkyReelsVAEDecode")
        prompt["memory"] = {"class_type": "TestMemory", "inputs": {"after": [decode, 0]}}
        result = server.result(server.queue(prompt))
        assert result["status"]["status_str"] == "success"
        return tuple(map(int, result["outputs"]["memory"]["text"]))

    runs = [used(run) for run in range(10)]
    for kind in range(2):  # of all tensors, of the process
        before, after = (max(run[kind] for run in part) for part in (runs[2:6], runs[6:]))
        assert after <= 1.01 * before, runs


# --- remote -------------------------------------------------------------------------------------


def remote_prompt(prompt: str, *, copies: int = 1) -> dict:
    """The shipped remote workflow with another prompt, and its node several times."""
    graph = json.loads((ROOT / "tests" / "workflows" / "remote.api.json").read_text())
    (key,) = (k for k, node in graph.items() if node["class_type"] == "WiroRemoteI2V")
    (save,) = (k for k, node in graph.items() if node["class_type"] == "SaveVideo")
    for number in range(copies):
        inputs = {**graph[key]["inputs"], "prompt": f"{prompt} {number}"}
        graph[f"remote {number}"] = {"class_type": "WiroRemoteI2V", "inputs": inputs}
        graph[f"save {number}"] = {
            "class_type": "SaveVideo",
            "inputs": {**graph[save]["inputs"], "video": [f"remote {number}", 1]},
        }
    return {k: node for k, node in graph.items() if k not in (key, save)}


def test_two_remote_nodes_of_one_graph_run_at_the_same_time(server):
    result = server.result(server.queue(remote_prompt("two", copies=2)))
    assert result["status"]["status_str"] == "success", result["status"]
    tasks = list(server.wiro.tasks.values())
    first, second = (
        task for task in tasks if task["parameters"]["prompt"].endswith(("two 0", "two 1"))
    )
    assert int(second["createtime"]) < int(first["endtime"]), "one after the other"


def test_a_batch_of_pictures_comes_home_in_order_with_one_that_fails(server, monkeypatch):
    """The shipped workflow with a third picture, two places and frames wanted."""
    from PIL import Image

    graph = json.loads((ROOT / "tests" / "workflows" / "wiro_batch.api.json").read_text())
    keys = {node["class_type"]: key for key, node in graph.items()}
    for number in range(3):
        picture = Image.new("RGB", (64, 48), (60 * number, 90, 120))
        picture.save(server.base / "input" / f"batch_{number}.png")
        inputs = {**graph[keys["LoadImage"]]["inputs"], "image": f"batch_{number}.png"}
        graph[f"image {number}"] = {"class_type": "LoadImage", "inputs": inputs}
    graph[keys["ImageBatch"]]["inputs"] = {"image1": ["image 0", 0], "image2": ["image 1", 0]}
    graph["more"] = {
        "class_type": "ImageBatch",
        "inputs": {"image1": [keys["ImageBatch"], 0], "image2": ["image 2", 0]},
    }
    submit, collect = graph[keys["WiroSubmit"]], keys["WiroCollect"]
    submit["inputs"] |= {"image": ["more", 0], "prompt": "FPS-24, a batch"}
    graph["look"] = {"class_type": "PreviewImage", "inputs": {"images": [collect, 1]}}
    graph["report"] = {"class_type": "PreviewAny", "inputs": {"source": [collect, 4]}}
    first = 2221 + len(server.wiro.tasks)
    failure = {"pexit": "1", "outputs": [], "debugerror": "CUDA error"}
    monkeypatch.setattr(server.wiro, "finals", {str(first + 1): failure})
    monkeypatch.setattr(server.wiro, "max_tasks", 2)

    def queue() -> tuple[list[str], dict]:
        result = server.result(server.queue(graph))
        assert result["status"]["status_str"] == "success", result["status"]
        cached = dict(result["status"]["messages"])["execution_cached"]["nodes"]
        return cached, result

    _, result = queue()
    assert (
        len(saved_videos(server, {"outputs": {"save": result["outputs"][keys["SaveVideo"]]}})) == 2
    )
    assert len(result["outputs"]["look"]["images"]) == 2 * 5
    text = result["outputs"]["report"]["text"][0]
    assert text.startswith("2 of 3 done · 1 failed")
    assert f"Picture 2: Task {first + 1} failed" in text
    sent = [task["parameters"]["inputImage"] for task in server.wiro.tasks.values()][-3:]
    assert len({server.wiro.inputs[url.partition("/File/")[2]] for url in sent}) == 3
    monkeypatch.setattr(server.wiro, "finals", {})
    cached, result = queue()
    assert keys["WiroSubmit"] in cached
    assert collect not in cached, "what failed is tried again"
    assert result["outputs"]["report"]["text"][0].startswith("3 of 3 done")
    cached, _ = queue()
    assert collect in cached, "nothing is left to do"
    assert 2221 + len(server.wiro.tasks) == first + 4


def test_cancel_in_comfyui_stops_all_runs_of_a_batch(server, monkeypatch):
    monkeypatch.setattr(server.wiro, "pace_s", 8.0)
    graph = json.loads((ROOT / "tests" / "workflows" / "wiro_batch.api.json").read_text())
    (submit,) = (node for node in graph.values() if node["class_type"] == "WiroSubmit")
    (prompt,) = (n for n in graph.values() if n["class_type"] == "PrimitiveStringMultiline")
    prompt["inputs"]["value"] = "FPS-24, cancel a batch"
    submit["inputs"]["take"] = 2
    (batch,) = (node for node in graph.values() if node["class_type"] == "ImageBatch")
    graph["other"] = {
        "class_type": "EmptyImage",
        "inputs": {"width": 64, "height": 48, "batch_size": 1, "color": 255},
    }
    batch["inputs"]["image2"] = ["other", 0]
    before = set(server.wiro.tasks)
    queued = server.queue(graph)
    for _ in range(1000):
        ours = [task for key, task in list(server.wiro.tasks.items()) if key not in before]
        if len(ours) == 2 and "Task/Detail" in [s.path for s in server.wiro.seen[-2:]]:
            break
        time.sleep(0.01)
    server.post("/interrupt", {"prompt_id": queued})
    result = server.result(queued)
    assert "execution_interrupted" in [kind for kind, _ in result["status"]["messages"]]
    assert [task["status"] for task in ours] == ["task_cancel"] * 2


def test_deleted_files_come_again_and_frames_are_there_when_something_wants_them(server):
    graph = remote_prompt("deleted")

    def queue() -> tuple[bool, dict]:
        """Whether the remote node came from the cache, and what the others gave."""
        result = server.result(server.queue(graph))
        assert result["status"]["status_str"] == "success", result["status"]
        told = dict(result["status"]["messages"])
        return "remote 0" in told["execution_cached"]["nodes"], result["outputs"]

    assert queue()[0] is False
    assert queue()[0] is True, "nothing has changed"
    (task,) = [t for t in server.wiro.tasks.values()
               if t["parameters"]["prompt"].endswith("deleted 0")]  # fmt: skip
    (file,) = (server.base / "output" / "wiro" / task["id"]).glob("*_0.mp4")
    file.unlink()
    assert queue()[0] is False
    assert file.read_bytes() == server.wiro.files["0.mp4"]
    assert queue()[0] is True
    graph["look"] = {"class_type": "PreviewImage", "inputs": {"images": ["remote 0", 0]}}
    from_cache, outputs = queue()
    assert from_cache is False
    assert len(outputs["look"]["images"]) == 5
    assert queue()[0] is True
    prompts = [t["parameters"]["prompt"] for t in server.wiro.tasks.values()]
    assert sum(prompt.endswith("deleted 0") for prompt in prompts) == 1


def wait_for_task(server: Server, prompt: str, *states: str) -> dict:
    for _ in range(500):
        for task in list(server.wiro.tasks.values()):
            if task["parameters"]["prompt"].endswith(prompt) and task["status"] in states:
                return task
        time.sleep(0.01)
    raise AssertionError(f"no task of {prompt!r} in {states}")


@pytest.mark.parametrize(("state", "call"), [("queue", "Task/Cancel"), ("output", "Task/Kill")])
def test_cancel_in_comfyui_stops_the_remote_task(server, monkeypatch, state, call):
    monkeypatch.setattr(server.wiro, "pace_s", 8.0)
    before = len(server.wiro.seen)
    queued = server.queue(remote_prompt(f"cancel {state}"))
    task = wait_for_task(server, f"cancel {state} 0", f"task_{state}")
    server.post("/interrupt", {"prompt_id": queued})
    result = server.result(queued)
    assert "execution_interrupted" in [kind for kind, _ in result["status"]["messages"]]
    assert task["status"] == "task_cancel"
    assert call in [seen.path for seen in server.wiro.seen[before:]]
    monkeypatch.setattr(server.wiro, "pace_s", 2.0)
    again = server.result(server.queue(remote_prompt(f"after {state}")))
    assert again["status"]["status_str"] == "success", "the next run is good"


def test_a_neighbour_that_fails_stops_the_remote_task(server):
    prompt = remote_prompt("neighbour")
    prompt["bad"] = {"class_type": "TestFailsLater", "inputs": {"seconds": 0.7}}
    queued = server.queue(prompt)
    task = wait_for_task(server, "neighbour 0", "task_queue", "task_start", "task_output")
    result = server.result(queued)
    assert result["status"]["status_str"] == "error"
    assert task["status"] == "task_cancel"


def test_the_panel_is_told_of_tasks_and_files_and_acts_on_them(server):
    listed = json.loads(server.get("/skyreels/wiro/tasks?limit=100"))
    assert listed["error"] == ""
    assert {task["verdict"] for task in listed["tasks"]} >= {"succeeded", "cancelled"}
    done = next(task for task in listed["tasks"] if task["files"])
    file = done["files"][0]
    clip = server.get(
        f"/view?filename={file['filename']}&subfolder={file['subfolder']}&type=output"
    )
    assert clip == server.wiro.files["0.mp4"]
    assert server.post(f"/skyreels/wiro/tasks/{done['id']}/delete_files", {})[1]["task"][
        "remote_deleted"
    ]
    status, answer = server.post("/skyreels/wiro/tasks/9999/stop", {})
    assert (status, "no task 9999" in answer["error"]) == (502, True)
    status, answer = server.post("/skyreels/wiro/account/test", {})
    assert (status, "accepts the key" in answer["message"]) == (200, True)


@pytest.mark.parametrize(
    ("body", "kind", "status", "words"),
    [
        (b'{"per_run": null, "per_day": null, "per_month": null}', "text/plain", 415, "not JSON"),
        (b"{" + b" " * 20_000 + b"}", "application/json", 413, "too long"),
        (b"[]", "application/json", 400, "not a JSON object"),
        (b"", "application/json", 400, "not a JSON object"),
        (b"{}", "application/json", 400, "lacks per_run, per_day, per_month"),
        (b'{"per_run": "1e50", "per_day": "", "per_month": ""}', "application/json", 400, "1e50"),
    ],
)
def test_a_request_that_is_not_the_pages_changes_nothing(server, body, kind, status, words):
    limits = {"per_run": "9", "per_day": None, "per_month": None}
    proof = {"proof": KEY[-4:]}
    assert server.post("/skyreels/wiro/limits", {**limits, **proof})[0] == 200
    headers = {"Content-Type": kind, "Origin": server.url}
    request = urllib.request.Request(server.url + "/skyreels/wiro/limits", body, headers)
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=30)
    assert caught.value.code == status
    assert words in json.loads(caught.value.read())["error"]
    assert json.loads(server.get("/skyreels/wiro/account"))["limits"] == limits
    assert server.post("/skyreels/wiro/limits", {**dict.fromkeys(limits), **proof})[0] == 200


@pytest.mark.parametrize(
    "path",
    ["account", "account/test", "limits", "tasks/1/stop", "tasks/1/delete_files",
     "tasks/1/refresh", "tasks/1/collect", "tasks/1/forget", "settings", "price"],
)  # fmt: skip
def test_another_page_writes_nothing_even_where_comfyui_lets_it_in(open_server, path):
    """With --enable-cors-header ComfyUI asks nobody where he comes from."""
    server = open_server
    port = server.url.rpartition(":")[2]
    evil = f"http://evil.example:{port}"
    body = {"api_key": "stolen", "api_secret": "", "per_run": None, "per_day": None,
            "per_month": None, "proof": KEY[-4:]}  # fmt: skip
    before = state_of(server)
    for prefix in ("", "/api"):
        for headers in (
            {"Origin": None},
            {"Origin": "null"},
            {"Origin": "http://evil.example"},
            {"Origin": evil, "Host": f"evil.example:{port}"},
            {"Origin": evil, "Host": f"evil.example:{port}", "X_Forwarded_Host": "127.0.0.1"},
            {"Origin": "http://127.0.0.1:1"},
            {"Sec_Fetch_Site": "cross-site"},
            {"Sec_Fetch_Site": "same-site"},
        ):
            status, answer = server.post(f"{prefix}/skyreels/wiro/{path}", body, **headers)
            assert (status, "nothing was changed" in answer["error"]) == (403, True), headers
    assert state_of(server) == before


def test_looking_at_the_page_makes_no_file(open_server):
    before = state_of(open_server)
    for path in ("account", "tasks", "tasks?limit=²", "tasks/1/file?name=0.mp4"):
        with contextlib.suppress(urllib.error.HTTPError):
            open_server.get(f"/skyreels/wiro/{urllib.parse.quote(path, safe='/?=')}")
    assert state_of(open_server) == before


def state_of(server: Server) -> dict[str, bytes]:
    """Every file of ours in the user's folder."""
    files = [p for p in (server.base / "user" / "__skyreels").rglob("*") if p.is_file()]
    return {str(path): path.read_bytes() for path in files}


def test_a_file_that_could_act_is_handed_out_as_a_download(server):
    done = next(t for t in json.loads(server.get("/skyreels/wiro/tasks"))["tasks"] if t["files"])
    name = urllib.parse.quote(done["files"][0]["filename"])
    address = f"{server.url}/skyreels/wiro/tasks/{done['id']}/file?name={name}"
    with urllib.request.urlopen(address, timeout=30) as answer:
        assert answer.read() == server.wiro.files["0.mp4"]
        assert answer.headers["Content-Type"] == "application/octet-stream"
        assert answer.headers["Content-Disposition"].startswith("attachment;")
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
    with pytest.raises(urllib.error.HTTPError, match="404"):
        server.get(
            f"/skyreels/wiro/tasks/{done['id']}/file?name=..%2F..%2Fuser%2Fcomfy.settings.json"
        )


# --- several users ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def open_server(checkout, tmp_path_factory):
    """A server for several users, for pages of other sites, with previews and our nodes alone."""
    base = tmp_path_factory.mktemp("open")
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes" / PACK).symlink_to(ROOT)
    (base / "input").mkdir()
    portrait = (ROOT / "web" / "portrait.jpg").read_bytes()
    (base / "input" / "skyreels_portrait.jpg").write_bytes(portrait)
    with WiroServer(pace_s=1.0, schema=True) as wiro:
        wiro.files["0.mp4"] = make_clip(5, 48, 32)
        flags = ("--multi-user", "--enable-cors-header", "--preview-method", "latent2rgb")
        server = Server(checkout, base, wiro, *flags)
        try:
            server.wait_until_ready()
            yield server
        finally:
            server.stop()


def listen(server: Server, client_id: str, heard: list) -> websocket.WebSocket:
    """A page's socket; everything it is told goes into `heard`."""
    page = websocket.create_connection(f"ws{server.url[4:]}/ws?clientId={client_id}", timeout=60)

    def read() -> None:
        with contextlib.suppress(websocket.WebSocketException, OSError):
            while True:
                heard.append(page.recv())

    threading.Thread(target=read, daemon=True).start()
    return page


def test_a_user_hears_of_and_changes_only_what_is_hers(open_server):
    server = open_server
    key = {"api_key": KEY, "api_secret": SECRET}
    assert server.post("/skyreels/wiro/account", key)[0] == 200, "the first key needs no proof"
    users = {name: server.post("/users", {"username": name})[1] for name in ("anna", "bert")}
    heard: dict[str, list] = {"anna": [], "bert": []}
    pages = [listen(server, f"page-of-{name}", heard[name]) for name in users]
    try:
        for name, user in users.items():
            queued = server.queue(remote_prompt(name), f"page-of-{name}", comfy_user=user)
            assert server.result(queued)["status"]["status_str"] == "success"
    finally:
        for page in pages:
            page.close()
    ids = {t["parameters"]["prompt"].split()[-2]: i for i, t in server.wiro.tasks.items()}
    for name, other in (("anna", "bert"), ("bert", "anna")):
        told = [m if isinstance(m, str) else m.decode(errors="replace") for m in heard[name]]
        assert any(ids[name] in m and "skyreels.wiro" in m for m in told)
        assert any("done" in m and ids[name] in m for m in told), "the line on the node"
        assert not [m for m in told if f"task {ids[other]}" in m or f'"{ids[other]}"' in m]
    rows = {
        name: json.loads(server.get("/skyreels/wiro/tasks", comfy_user=user))["tasks"]
        for name, user in users.items()
    }
    assert {name: [t["taskid"] for t in tasks] for name, tasks in rows.items()} == {
        name: [ids[name]] for name in users
    }
    of_anna = f"/skyreels/wiro/tasks/{rows['anna'][0]['id']}/delete_files"
    status, answer = server.post(of_anna, {}, comfy_user=users["bert"])
    assert (status, "The journal has no task" in answer["error"]) == (502, True)
    assert server.wiro.tasks[ids["anna"]]["outputs"]
    for stranger in ({}, {"comfy_user": "carl"}):
        assert server.post(of_anna, {}, **stranger)[0] == 403
    assert server.post(of_anna, {}, comfy_user=users["anna"])[0] == 200
    assert not server.wiro.tasks[ids["anna"]]["outputs"]


def preview_clips(heard: list) -> list[dict]:
    """The clips of moving previews among all that a page was told."""
    texts = [each for each in heard if isinstance(each, str) and each]  # "" is the socket's end
    told = [json.loads(each) for each in texts]
    return [message["data"] for message in told if message["type"] == "skyreels.preview"]


def sample_with_two_pages(server: Server, **headers: str) -> tuple[list[dict], list[dict]]:
    """The clips that the page of a local run got, and those of a page beside it."""
    own, other = [], []
    pages = [listen(server, "page-that-ran", own), listen(server, "page-beside", other)]
    try:
        queued = server.queue(small_prompt("quick_start", steps=12), "page-that-ran", **headers)
        result = server.result(queued)
        assert result["status"]["status_str"] == "success", result["status"]
        for _ in range(100):  # what was sent before the end is read a little later
            if any(isinstance(each, str) and "execution_success" in each for each in own):
                break
            time.sleep(0.05)
    finally:
        for page in pages:
            page.close()
    return preview_clips(own), preview_clips(other)


def test_a_sampled_clip_is_shown_moving_on_the_page_that_queued_it_and_on_no_other(open_server):
    from PIL import Image

    user = open_server.post("/users", {"username": "carla"})[1]
    clips, beside = sample_with_two_pages(open_server, comfy_user=user)
    assert beside == []
    assert clips
    prompt = small_prompt("quick_start")
    (node,) = (k for k, n in prompt.items() if n["class_type"] == "SkyReelsSampler")
    for clip in clips:
        assert (clip["node"], clip["class_type"]) == (node, "SkyReelsSampler")
        assert (clip["count"], clip["width"], clip["height"]) == (2, 6, 4)  # 5 frames of 48x32
        with Image.open(io.BytesIO(base64.b64decode(clip["image"]))) as sheet:
            sheet.load()
            assert sheet.format == "JPEG"
            assert sheet.size == (8 * clip["columns"], 8 * clip["rows"])
        assert clip["columns"] * clip["rows"] >= clip["count"]
        assert clip["max_edge"] == 512


def test_without_a_preview_method_no_clips_are_sent(server):
    assert sample_with_two_pages(server) == ([], [])


def test_the_planted_key_is_nowhere_but_in_its_file(server):
    """Runs last of the remote tests: the server has done everything by now."""
    secret_file = server.base / "user" / "__skyreels" / "wiro.env"
    assert KEY in secret_file.read_text()
    assert stat.S_IMODE(secret_file.stat().st_mode) == 0o600
    failed = remote_prompt("fails")
    server.wiro.fail("Run", {"status": 401, "body": {"result": False, "errors": [
        {"code": 0, "message": "Project authorization is not valid."}]}})  # fmt: skip
    assert server.result(server.queue(failed))["status"]["status_str"] == "error"
    secrets = [KEY, SECRET, *(t["socketaccesstoken"] for t in server.wiro.tasks.values())]
    answers = [
        server.get(path)
        for path in ("/history", "/queue", "/prompt", "/settings", "/skyreels/wiro/account",
                     "/skyreels/wiro/tasks", "/users", "/system_stats")
    ]  # fmt: skip
    files = [p for p in server.base.rglob("*") if p.is_file() and p != secret_file]
    assert any(path.suffix == ".mp4" for path in files)
    assert any(path.name == "journal.sqlite" for path in files)
    texts = [*answers, *(p.read_bytes() for p in files if "models" not in p.parts)]
    for secret in secrets:
        assert not [t[:200] for t in texts if secret.encode() in t], "a secret leaked"


@pytest.mark.parametrize(
    "path",
    ["/userdata/__skyreels%2Fwiro.env", "/userdata/..%2F__skyreels%2Fwiro.env",
     "/userdata/%2E%2E%2F__skyreels%2Fwiro.env", "/api/userdata/..%2F..%2F__skyreels%2Fwiro.env",
     "/view?filename=wiro.env&subfolder=../user/__skyreels&type=output",
     "/view?filename=wiro.env&subfolder=__skyreels&type=input",
     "/v2/userdata?path=../__skyreels", "/extensions/../user/__skyreels/wiro.env"],
)  # fmt: skip
def test_the_key_file_is_not_served(server, path):
    try:
        assert KEY.encode() not in server.get(path)
    except urllib.error.HTTPError as error:
        assert error.code in (400, 403, 404)
        assert KEY.encode() not in error.read()


def test_killed_in_mid_task_and_queued_again_it_goes_on(server):
    queued = server.queue(remote_prompt("killed"))
    task = wait_for_task(server, "killed 0", "task_start", "task_output")
    server.process.kill()
    server.process.wait()
    server.start()
    server.wait_until_ready()
    assert queued not in json.loads(server.get("/history"))
    result = server.result(server.queue(remote_prompt("killed")))
    assert result["status"]["status_str"] == "success", result["status"]
    same = [t for t in server.wiro.tasks.values() if t["parameters"]["prompt"].endswith("killed 0")]
    assert same == [task], "one Run"


# --- its memory manager -------------------------------------------------------------------------

#: options that both versions have, and for the CPU; the current one has two more
SPARING = ("--reserve-vram", "1", "--cache-none", "--disable-smart-memory")
SPARING_NOW = ("--disable-dynamic-vram", "--disable-pinned-memory")


def test_with_sparing_options_a_clip_is_made_and_nothing_stays(checkout, tmp_path):
    """The built-in model, from text to video."""
    (tmp_path / "custom_nodes").mkdir()
    (tmp_path / "custom_nodes" / PACK).symlink_to(ROOT)
    (tmp_path / "custom_nodes" / "test_nodes.py").symlink_to(SUPPORT / "comfy_test_nodes.py")
    (tmp_path / "input").mkdir()
    flags = [*SPARING, *(SPARING_NOW if has_dynamic_memory(checkout) else ())]
    with WiroServer() as wiro:
        server = Server(checkout, tmp_path, wiro, *flags)
        try:
            server.wait_until_ready()
            result = server.result(server.queue(small_prompt("quick_start")))
            assert result["status"]["status_str"] == "success", result["status"]
            assert len(saved_videos(server, result)) == 1
            picture = {"width": 16, "height": 16, "batch_size": 1, "color": 0}
            census = {
                "1": {"class_type": "EmptyImage", "inputs": picture},
                "2": {"class_type": "TestLiveModels", "inputs": {"after": ["1", 0]}},
            }
            counted = server.result(server.queue(census))
            assert counted["outputs"]["2"]["text"] == ["0"]
        finally:
            server.stop()


def has_dynamic_memory(checkout: Checkout) -> bool:
    return "--disable-dynamic-vram" in (checkout.folder / "comfy" / "cli_args.py").read_text()


GIB = 2**30
FLAGS = ("", "--lowvram", "--reserve-vram 1", "--disable-smart-memory", "--cache-none", "--novram")


@pytest.fixture(scope="module")
def managed(checkout, tmp_path_factory) -> dict[str, dict]:
    """What comfy_memory.py found on its made-up card, with each set of options."""
    folder = tmp_path_factory.mktemp("managed")
    flags = [*FLAGS, *(SPARING_NOW if has_dynamic_memory(checkout) else ())]
    command = [checkout.python(), SUPPORT / "comfy_memory.py", checkout.folder, ROOT, folder]
    run = subprocess.run([*map(str, command), *flags], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["--lowvram"]["state"] == "LOW_VRAM"
    assert found["--reserve-vram 1"]["reserved"] == GIB
    assert not found["--disable-smart-memory"]["smart"]
    return found


@pytest.fixture(params=[*FLAGS, *SPARING_NOW])
def memory(managed, request) -> dict:
    if request.param not in managed:
        pytest.skip("this version of ComfyUI has no such option")
    return managed[request.param]


def test_what_is_reserved_for_others_is_not_free(memory):
    assert memory["free"] == 12 * GIB - memory["reserved"]


def test_a_model_that_has_room_once_others_leave_is_not_streamed(memory):
    found = memory["room"]
    whole = 0 if memory["state"] == "NO_VRAM" else 8 * GIB  # told to keep none on the card
    assert (found["resident"], found["again"]) == (whole, whole)
    assert found["room"] >= 2.5 * GIB  # activations, and a reserve; what is reserved is apart


def test_our_model_gives_way_and_comes_back(memory):
    if memory["state"] == "NO_VRAM":
        pytest.skip("no model stays on the card")
    assert memory["room"]["given"] >= 7 * GIB
    assert memory["room"]["other"] >= 5 * GIB
    assert memory["dynamic"]["before"] == 8 * GIB
    assert memory["dynamic"]["after"] <= GIB
    assert memory["asked"]["free"] >= 10 * GIB


def test_for_a_model_that_is_streamed_all_others_leave(memory):
    assert memory["streamed"] == {"used": 0, "free": 8 * GIB - memory["reserved"]}


@pytest.mark.parametrize("size", ["small", "large"])
def test_text_encoder_and_vae_stay_beside_a_run_only_if_there_is_room(memory, size):
    found = memory[size]
    assert found["room"] >= 3.5 * GIB
    if memory["state"] == "NO_VRAM":
        assert found["sampling"] == found["beside"] == 0
        return
    assert found["sampling"] == 8 * GIB
    assert found["decoding"] == GIB
    if size == "small":
        assert found["beside"] <= GIB / 2
    else:
        assert found["beside"] == (5 * GIB if memory["smart"] else 0)


def test_ten_runs_in_turns_with_another_model_leave_the_card_as_it_was(memory):
    used = memory["ten"]["used"]
    assert max(used[2:]) <= 1.01 * max(used[:2])
    assert memory["ten"]["after"] == 0


def test_memory_that_another_program_takes_while_a_model_loads_does_not_end_the_run(memory):
    assert memory["shrinks"]["inside"] == 0
    assert memory["shrinks"]["again"] == (0 if memory["state"] == "NO_VRAM" else 8 * GIB)


def test_models_whose_outputs_are_dropped_leave_the_card(memory):
    found = memory["let go"]
    assert found["reclaimable"] == 0  # a module whose handle is gone cannot be unloaded
    assert (found["used"], found["listed"]) == (0, 0)


def test_what_we_page_lock_counts_against_comfyuis_limit(managed, checkout):
    for flags, found in managed.items():
        pins = found["pins"]
        if flags == "--disable-pinned-memory":
            assert pins["before"] == 0
            assert "--disable-pinned-memory" in pins["refused"]
            continue
        assert (pins["taken"], pins["locked"]) == (16 * 4096, 16 * 4096)
        assert pins["after"] == pins["before"]
        if has_dynamic_memory(checkout):
            assert pins["counted"] == 16 * 4096


# --- inside the process -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inside(checkout, tmp_path_factory) -> dict:
    """What comfy_inside.py measured in ComfyUI's own interpreter."""
    folder = tmp_path_factory.mktemp("inside")
    command = [checkout.python(), SUPPORT / "comfy_inside.py", checkout.folder, ROOT, folder]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_our_sampler_equals_cores_on_the_same_weights_sigmas_and_seed(inside):
    assert inside["sampler_relative_error"] <= 1e-4


def test_text_to_video_equals_cores_on_the_same_weights_sigmas_and_seed(inside):
    assert inside["t2v_relative_error"] <= 1e-4


def test_euler_of_core_equals_ours(inside):
    assert inside["euler_relative_error"] <= 1e-5


def test_every_sampler_gives_with_our_model_what_it_gives_with_cores(inside):
    errors = inside["samplers"]
    assert len(errors) > 30
    # core hands uni_pc a last sigma of 0.001 instead of 0
    bounds = dict.fromkeys(errors, 1e-4) | {"uni_pc": 5e-3, "uni_pc_bh2": 5e-3}
    assert {name: error for name, error in errors.items() if not error <= bounds[name]} == {}


def test_cores_samplers_and_nodes_give_with_our_model_what_they_give_with_cores(inside):
    errors = inside["bridge"]
    assert {"KSampler", "single block skipped", "EasyCache"} <= errors.keys()
    assert {name: error for name, error in errors.items() if not error <= 1e-5} == {}


def test_context_windows_give_what_cores_give(inside):
    errors = inside["windows"]  # none where core leaves the picture whole
    assert {name: error for name, error in errors.items() if not error <= 1e-5} == {}
    assert inside["windows_that_differ"] == []


def test_as_a_core_model_our_weights_are_loaded_once_and_given_back(inside):
    assert inside["bridge_listed"] == 1
    assert inside["bridge_bytes"] == 0
    assert inside["bridge_is_idle"]
    assert not inside.get("bridge_shares_weights")  # a copy for another device has its own
    assert inside["bridge_lora"]["effect"] > 0.01
    assert inside["bridge_lora"]["is_undone"]


def test_what_a_core_model_of_ours_cannot_do_is_said(inside):
    refusals = inside["bridge_refusals"]
    assert "connect SkyReels Image Conditioning to `image`" in refusals["no picture"]
    assert "cannot merge or save" in refusals["merged"]
    assert "takes no picture" in refusals["picture for text"]
    assert inside["bridge_pictures"] == [[2, 16, 3, 6, 8], True]
    assert "attn1_output_patch" in inside["bridge_unused"]


@pytest.mark.parametrize("what", ["unfinished", "continued", "video_to_video"])
def test_parts_of_a_schedule_give_what_they_give_in_core(inside, what):
    assert inside[f"{what}_relative_error"] <= 1e-4


def test_ranges_strengths_and_several_entries_give_what_they_give_in_core(inside):
    assert len(inside["entries"]) == 12
    assert {name: error for name, error in inside["entries"].items() if not error <= 1e-5} == {}


def test_batches_and_noise_masks_give_what_they_give_in_core(inside):
    assert len(inside["latents"]) == 7
    assert {name: error for name, error in inside["latents"].items() if not error <= 1e-5} == {}


def test_weights_in_a_prompt_are_read_and_applied_as_in_core(inside):
    assert inside["parsed"] == 0
    assert {text: error for text, error in inside["weighted"].items() if not error <= 1e-5} == {}
    assert len(inside["weighted"]) == 3


def test_schedules_by_name_are_cores(inside):
    assert len(inside["schedules"]) == 7
    assert set(inside["schedules"].values()) == {0.0}


def test_latents_interchange_with_cores_vae_nodes(inside):
    assert inside["decode_relative_error"] <= 1e-4
    assert inside["encode_relative_error"] <= 1e-4


def test_core_and_we_preview_in_the_same_space(inside):
    assert inside["latent_format_scale"] == pytest.approx(0.476986)


def test_the_built_in_name_is_no_file_of_core(server):
    listed = json.loads(server.get("/object_info/UNETLoader"))["UNETLoader"]
    assert BUILTIN_NAME not in listed["input"]["required"]["unet_name"][0]
