"""The package in a real ComfyUI: its server, its executor, its samplers, its memory manager."""

import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import comfyui_skyreels
import pytest
from comfyui_skyreels.skyreels.builtin import BUILTIN_NAME
from comfyui_skyreels.skyreels.vae.model import VideoVAE
from support import checkout, tiny

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = ROOT / "tests" / "support"
PACK = "skyreels-wiro"
WORKFLOWS = [path.stem for path in sorted((ROOT / "workflows").glob("*.json"))]
TRANSFORMERS = (
    "skyreels_hunyuan_i2v_bf16.safetensors",
    "skyreels_hunyuan_i2v_fp8_e4m3fn.safetensors",
)

pytestmark = [pytest.mark.comfy, checkout.needs_comfy]


class Server:
    """A running ComfyUI and the few calls the tests make."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.log = base / "server.log"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [checkout.python(), "main.py", "--cpu", "--listen", "127.0.0.1", "--port", port,
                   "--disable-auto-launch", "--disable-api-nodes", "--base-directory", base,
                   "--database-url", f"sqlite:///{base}/comfyui.db"]  # fmt: skip
        environment = {**os.environ, "HOME": str(base), "PYTHONDONTWRITEBYTECODE": "1"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                list(map(str, command)), cwd=checkout.CHECKOUT, env=environment, stdout=log,
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

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return answer.read()

    def post(self, path: str, body: dict) -> tuple[int, dict]:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, json.loads(answer.read() or b"{}")
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def queue(self, prompt: dict) -> str:
        status, answer = self.post("/prompt", {"prompt": prompt})
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
def server(tmp_path_factory):
    base = tmp_path_factory.mktemp("comfy")
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes" / PACK).symlink_to(ROOT)
    (base / "custom_nodes" / "test_nodes.py").symlink_to(SUPPORT / "comfy_test_nodes.py")
    models = base / "models"
    for file in TRANSFORMERS:
        tiny.save(models / "diffusion_models" / file, tiny.transformer().state_dict())
    vae = tiny.randomize(VideoVAE(tiny.VAE)).state_dict()
    tiny.save(models / "vae" / "hunyuan_video_vae_bf16.safetensors", vae)
    (base / "input").mkdir()
    (base / "input" / "example.png").write_bytes(
        (checkout.CHECKOUT / "input" / "example.png").read_bytes()
    )
    server = Server(base)
    try:
        server.wait_until_ready()
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
        elif node["class_type"].startswith("SkyReels"):
            node["inputs"] |= {k: v for k, v in small.items() if k in node["inputs"]}
    return prompt


def saved_video(server: Server, result: dict) -> Path:
    files = [f for output in result["outputs"].values() for f in output.get("images", [])]
    assert len(files) == 1, result["status"]
    return server.base / "output" / files[0]["subfolder"] / files[0]["filename"]


def test_the_pack_is_imported_quickly_and_all_nodes_are_listed(server):
    log = server.log.read_text()
    assert "IMPORT FAILED" not in log
    assert "Cannot import" not in log
    seconds = float(re.search(rf"([\d.]+) seconds: \S*{PACK}", log)[1])
    assert seconds <= 0.2
    for name, cls in comfyui_skyreels.NODE_CLASS_MAPPINGS.items():
        info = json.loads(server.get(f"/object_info/{name}"))[name]
        assert info["output"] == list(cls.RETURN_TYPES)
        assert info["description"] == cls.DESCRIPTION
        assert info["output_tooltips"] == list(cls.OUTPUT_TOOLTIPS)


def test_templates_thumbnails_help_and_script_are_served(server):
    assert sorted(json.loads(server.get("/api/workflow_templates"))[PACK]) == WORKFLOWS
    for name in WORKFLOWS:
        template = f"/api/workflow_templates/{PACK}/{name}"
        assert server.get(template + ".json") == (ROOT / "workflows" / f"{name}.json").read_bytes()
        assert server.get(template + ".jpg")[:2] == b"\xff\xd8"
    assert f"/extensions/{PACK}/skyreels.js" in json.loads(server.get("/extensions"))
    for name in comfyui_skyreels.NODE_CLASS_MAPPINGS:
        assert server.get(f"/extensions/{PACK}/docs/{name}.md").startswith(b"# SkyReels")


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_runs_to_a_playable_video(server, name):
    import av

    result = server.result(server.queue(small_prompt(name)))
    assert result["status"]["status_str"] == "success", result["status"]
    with av.open(str(saved_video(server, result))) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.width, stream.height, stream.average_rate) == (48, 32, 24)
        assert sum(1 for _ in container.decode(stream)) == 5


def test_cancel_in_mid_run_stops_at_once_and_the_next_run_is_good(server):
    long = server.queue(small_prompt("local_bf16", steps=1000, num_frames=33))
    for _ in range(500):  # until sampling has begun
        if "SkyReelsTransformer" in server.log.read_text().rpartition("got prompt")[2]:
            break
        time.sleep(0.02)
    time.sleep(0.5)
    start = time.monotonic()
    server.post("/interrupt", {"prompt_id": long})
    result = server.result(long)
    stopped_after = time.monotonic() - start
    kinds = [kind for kind, _ in result["status"]["messages"]]
    assert "execution_interrupted" in kinds
    assert stopped_after < 1.0
    again = server.result(server.queue(small_prompt("local_bf16", steps=3)))
    assert again["status"]["status_str"] == "success"


def test_a_missing_file_is_answered_with_our_sentence_before_anything_runs(server):
    prompt = small_prompt("local_bf16", transformer="gone.safetensors")
    status, answer = server.post("/prompt", {"prompt": prompt})
    assert status == 400
    assert "put it there (from https://huggingface.co/Kijai" in json.dumps(answer["node_errors"])


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


# --- inside the process -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inside(tmp_path_factory) -> dict:
    """What comfy_inside.py measured in ComfyUI's own interpreter."""
    folder = tmp_path_factory.mktemp("inside")
    command = [checkout.python(), SUPPORT / "comfy_inside.py", checkout.CHECKOUT, ROOT, folder]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_our_sampler_equals_cores_on_the_same_weights_sigmas_and_seed(inside):
    assert inside["sampler_relative_error"] <= 1e-4


def test_euler_of_core_equals_ours(inside):
    assert inside["euler_relative_error"] <= 1e-5


def test_every_sampler_gives_with_our_model_what_it_gives_with_cores(inside):
    errors = inside["samplers"]
    assert len(errors) > 30
    # core hands uni_pc a last sigma of 0.001 instead of 0
    bounds = dict.fromkeys(errors, 1e-4) | {"uni_pc": 5e-3, "uni_pc_bh2": 5e-3}
    assert {name: error for name, error in errors.items() if not error <= bounds[name]} == {}


@pytest.mark.parametrize("what", ["unfinished", "continued", "video_to_video"])
def test_parts_of_a_schedule_give_what_they_give_in_core(inside, what):
    assert inside[f"{what}_relative_error"] <= 1e-4


def test_latents_interchange_with_cores_vae_nodes(inside):
    assert inside["decode_relative_error"] <= 1e-4
    assert inside["encode_relative_error"] <= 1e-4


def test_core_and_we_preview_in_the_same_space(inside):
    assert inside["latent_format_scale"] == pytest.approx(0.476986)


def test_the_built_in_name_is_no_file_of_core(server):
    listed = json.loads(server.get("/object_info/UNETLoader"))["UNETLoader"]
    assert BUILTIN_NAME not in listed["input"]["required"]["unet_name"][0]
