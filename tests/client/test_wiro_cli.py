"""The remote command line, as a process of its own against a loopback server."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.clip import make_clip
from support.forked import forks
from support.wiro_server import KEY, SECRET, WiroServer
from support.wiro_socket import SocketServer

ROOT = Path(__file__).resolve().parents[2]
CLIP = make_clip()
PICTURE = ROOT / "web" / "portrait.jpg"
RUN = ["run", "wiro/SkyReels-V1", "--param", "size=960x544", "--file", f"inputImage={PICTURE}",
       "--param", "prompt=FPS-24, a woman smiles", "--param", "steps=30"]  # fmt: skip
ENDED = ("task_postprocess_end",)  # nothing to wait for
SHORT = ("task_queue", "task_start", "task_postprocess_end")


@pytest.fixture
def server(tmp_path_factory):
    with WiroServer(states=SHORT) as server:
        server.files["0.mp4"] = CLIP
        server.state = tmp_path_factory.mktemp("state")
        yield server


def environment_for(server, **changes) -> dict[str, str]:
    return {
        **{k: v for k, v in os.environ.items() if not k.startswith("WIRO_")},
        "WIRO_API_KEY": KEY, "WIRO_API_SECRET": SECRET, "WIRO_API_BASE_URL": server.url,
        "XDG_STATE_HOME": str(server.state), **changes,
    }  # fmt: skip


#: `python -m wiro_api` that waits a moment where the service would need seconds, and for no disk
QUICK = """
import sys
from wiro_api import candidates, cli, client, journal
journal.SYNCHRONOUS = "OFF"
client.NO_OUTPUT_WAIT_S = 0.02
client.POLL_SCHEDULE = ((float("inf"), 0.02),)
candidates.RECONCILE_AT_S = (0.05, 0.2, 0.5, 1.0, 3.0)
sys.exit(cli.main())
"""


def wiro(server, *arguments, **changes) -> subprocess.CompletedProcess:
    command = ["-c", QUICK, *map(str, arguments)]
    return forks("support.wiro_program").run(command, environment_for(server, **changes))


def test_a_run_ends_with_the_file_and_one_json_object(server, tmp_path):
    image = tmp_path / "ä b.PNG"
    image.write_bytes(b"\x89PNG")
    run = [f"inputImage={image}" if part.startswith("inputImage=") else part for part in RUN]
    done = wiro(server, *run, "--out", tmp_path / "o", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert done.stdout.count("\n") == 1
    (file,) = report.pop("files")
    assert Path(file).read_bytes() == CLIP
    (output,) = report.pop("outputs")
    assert output["name"] == "0.mp4"
    assert report == {
        "taskid": "2221", "status": "task_postprocess_end", "verdict": "succeeded",
        "exit_code": "0", "cost": "0.00351", "elapsed_s": 6.0,
    }  # fmt: skip
    assert "task 2221 started" in done.stderr
    assert "cost: $0.00351" in done.stderr
    (run,) = (seen for seen in server.seen if seen.path.startswith("Run/"))
    assert run.files[0][:3] == ("inputImage", "input.png", "image/png")


def test_a_quote_says_the_price_and_sends_nothing(server, tmp_path):
    job = ["quote", *RUN[1:], "--json"]
    assert json.loads(wiro(server, *job).stdout) == {
        "price": None, "is_exact": False, "was_sent": False, "taskid": "",
    }  # fmt: skip
    server.price = [{"inputs": [], "price": "0.30", "priceMethod": "cpr"}]
    server.schema = True
    quoted = wiro(server, *job)
    assert json.loads(quoted.stdout)["price"] == "0.3"
    assert "price $0.30" in quoted.stderr
    assert not any(path.startswith("Run/") for path in server.paths())
    assert wiro(server, *RUN, "--out", tmp_path).returncode == 0
    again = json.loads(wiro(server, *job).stdout)
    assert (again["was_sent"], again["taskid"]) == (True, "2221")


def test_nothing_is_started_above_the_highest_price_that_was_named(server, tmp_path):
    run = [*RUN, "--out", tmp_path, "--max-price"]
    unknown = wiro(server, *run, "5", "--json")
    assert "so --max-price cannot hold it" in json.loads(unknown.stdout)["error"]
    server.price = [{"inputs": [], "price": "0.30", "priceMethod": "cpr"}]
    server.schema = True
    refused = wiro(server, *run, "0.29", "--json")
    assert "would cost $0.30, and --max-price is $0.29" in json.loads(refused.stdout)["error"]
    assert not any(path.startswith("Run/") for path in server.paths())
    assert wiro(server, *run, "0.30").returncode == 0
    assert wiro(server, *run, "0").returncode == 0  # it is paid for
    assert wiro(server, *run, "0", "--again").returncode == 1
    assert wiro(server, *run, "much").returncode == 2


def test_a_task_is_looked_at_watched_collected_and_stopped(server, tmp_path):
    taskid = server.add_task({"prompt": "x"})
    token = server.tasks[taskid]["socketaccesstoken"]
    seen = wiro(server, "detail", taskid, "--json")
    assert json.loads(seen.stdout)["verdict"] == "running"
    early = wiro(server, "collect", taskid, "--json")
    assert early.returncode == 1
    assert "watch it instead" in json.loads(early.stdout)["error"]
    assert wiro(server, "watch", f"token:{token}", "--out", tmp_path).returncode == 0
    collected = json.loads(wiro(server, "collect", taskid, "--out", tmp_path, "--json").stdout)
    assert Path(collected["files"][0]).name == "0 (1).mp4"
    other = server.add_task({"prompt": "x"})
    stopped = wiro(server, "stop", other, "--json")
    assert json.loads(stopped.stdout)["verdict"] == "cancelled"
    listed = json.loads(wiro(server, "list", "--json").stdout)["tasks"]
    assert [task["taskid"] for task in listed] == [other, taskid]
    for command in ("cancel", "kill"):
        server.tasks[other]["status"] = {"cancel": "task_queue", "kill": "task_start"}[command]
        assert wiro(server, command, other).returncode == 0


def test_progress_of_the_socket_is_shown_and_a_dead_socket_costs_nothing(server, tmp_path):
    report = {"stepCurrent": "6", "stepTotal": "10", "percentage": "60", "speed": "1.2",
              "speedType": "it/s", "remainingTime": "3s"}  # fmt: skip

    def script(_):
        yield "text", {"type": "task_output", "message": report}
        yield ("ping",)  # answered after the report was read
        server.steps_by_itself = True
        yield ("drop",)

    server.steps_by_itself = False
    with SocketServer(script) as socket:
        done = wiro(server, *RUN, "--out", tmp_path, WIRO_SOCKET_URL=socket.url)
        assert "step 6/10 · 60 % · 1.2 it/s · 3s left" in done.stderr
        assert socket.registered[0]["tasktoken"] == server.tasks["2221"]["socketaccesstoken"]
    assert done.returncode == 0
    again = wiro(server, *RUN, "--again", "--out", tmp_path, WIRO_SOCKET_URL=socket.url)
    assert again.returncode == 0
    assert again.stderr.count("polling goes on") == 1


def test_models_and_uploads(server, tmp_path):
    assert json.loads(wiro(server, "model", "wiro/SkyReels-V1", "--json").stdout)["id"] == "598"
    picture = tmp_path / "a.png"
    picture.write_bytes(b"\x89PNG")
    sent = wiro(server, "upload", picture, "--folder", "mine", "--json")
    assert json.loads(sent.stdout)["url"] == "https://cdn.wiro.ai/u1.png"
    assert server.paths()[-2:] == ["File/FolderCreate", "File/Upload"]
    assert server.seen[-1].body == {"folderid": "f1"}


def test_a_failed_task_is_exit_code_1_with_its_id(server, tmp_path):
    server.final = {"pexit": "1", "outputs": [], "debugerror": "CUDA error"}
    done = wiro(server, *RUN, "--out", tmp_path, "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["taskid"] == "2221"
    assert "CUDA error" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "changes", "words"),
    [
        (RUN, {"WIRO_API_KEY": ""}, "no Wiro API key"),
        (RUN, {"WIRO_API_KEY": "wrong"}, "check key, secret"),
        (RUN, {"WIRO_API_SECRET": "wrong"}, "check key, secret"),
        (RUN, {"WIRO_API_BASE_URL": "http://api.wiro.ai/v1"}, "not a https address"),
        (["run", "SkyReels"], {}, "owner/project"),
        (["run", "wiro/SkyReels-V1", *RUN[2:6], "--param", "prompt="], {}, "wants prompt"),
        (RUN[:4], {}, "wants a file for inputImage"),
        ([*RUN[:2], *RUN[4:]], {}, "choose one of 960x544, 544x960"),
        ([*RUN, "--param", "seed=1"], {}, "no parameter 'seed'"),
        ([*RUN, "--param", "numFrames=many"], {}, "not a number"),
        ([*RUN, "--param", "numFrames=0"], {}, "frames is 0: the least is 5"),
        ([*RUN[:4], *RUN[6:], "--file", f"inputImage={__file__}"], {}, "is not a picture"),
        (["run", "wiro/SkyReels-V1", "--param", "prompt"], {}, "NAME=VALUE"),
        ([*RUN, "--file", "inputImage=/nowhere.png"], {}, "no file"),
        ([*RUN, "--out", "/proc/nowhere"], {}, "cannot be used"),
        (["detail", "abc"], {}, "not a task"),
        (["detail", "999"], {}, "There is no task yet"),
    ],
)
def test_mistakes_are_one_sentence_and_cost_nothing(server, arguments, changes, words):
    done = wiro(server, *arguments, "--json", **changes)
    assert done.returncode == 1
    assert words in json.loads(done.stdout)["error"]
    assert "Traceback" not in done.stderr
    assert len(server.tasks) == 0


def test_a_picture_too_large_is_refused_before_anything_is_sent(server, tmp_path):
    picture = tmp_path / "big.png"
    with picture.open("wb") as file:
        file.truncate(200_000_000)
    done = wiro(server, *RUN[:4], "--file", f"inputImage={picture}", "--json")
    assert "200000000 bytes" in json.loads(done.stdout)["error"]
    assert server.seen == []


def test_wrong_usage_answers_with_json_too(server):
    done = wiro(server, "run", "--json")
    assert done.returncode == 2
    assert "model" in json.loads(done.stdout)["error"]


def test_the_client_works_where_there_is_no_torch():
    code = (
        "import sys; sys.modules['torch'] = None; import wiro_api, wiro_api.cli; "
        "print('comfy' in sys.modules, wiro_api.sign('test-key', 'test-secret', '1734513807'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    signature = "e843f5e4ef86b64976d1e75eb4164d4f145813524596c9daa0c83c70668a9f98"
    assert done.stdout.split() == ["False", signature]


def test_public_names_are_exactly_those_listed():
    import comfyui_skyreels.wiro_api as client

    assert client.__all__ == sorted(client.__all__)
    modules = {path.stem for path in (ROOT / "wiro_api").glob("*.py")}
    public = {name for name in vars(client) if not name.startswith("_")} - modules
    assert public == set(client.__all__)


def test_the_example_of_the_package_works_as_it_stands(server, tmp_path):
    server.states = ENDED
    (tmp_path / "cat.png").write_bytes(PICTURE.read_bytes())
    doc = (ROOT / "wiro_api/__init__.py").read_text(encoding="utf-8").split('"""')[1]
    example = [line[4:] for line in doc.splitlines() if line.startswith("    ")]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join([*example, "print(task.taskid, *paths)"])],
        cwd=tmp_path,
        env=environment_for(server, PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["2221", str(Path("out", "0.mp4"))], done.stderr


# --- nothing is paid for twice ------------------------------------------------------------------


def runs(server) -> int:
    return sum(path.startswith("Run/") for path in server.paths())


def test_the_same_run_again_pays_nothing_and_gives_the_same_file(server, tmp_path):
    server.states = ENDED
    first = json.loads(wiro(server, *RUN, "--out", tmp_path, "--json").stdout)
    second = wiro(server, *RUN, "--out", tmp_path, "--json")
    assert json.loads(second.stdout)["files"] == first["files"]
    assert json.loads(second.stdout)["cost"] == first["cost"]
    assert "made before, by task 2221" in second.stderr
    assert runs(server) == 1
    Path(first["files"][0]).unlink()
    third = json.loads(wiro(server, *RUN, "--out", tmp_path, "--json").stdout)
    assert Path(third["files"][0]).is_file()
    assert runs(server) == 1
    assert wiro(server, *RUN, "--out", tmp_path, "--again").returncode == 0
    other = [*RUN, "--param", "prompt=another"]
    assert wiro(server, *other, "--out", tmp_path).returncode == 0
    assert runs(server) == 3


def test_a_failed_run_may_be_run_again(server, tmp_path):
    server.states = ENDED
    server.final = {"pexit": "1", "outputs": []}
    assert wiro(server, *RUN, "--out", tmp_path).returncode == 1
    server.final = {}
    assert wiro(server, *RUN, "--out", tmp_path).returncode == 0
    assert runs(server) == 2


def test_a_run_that_was_paid_for_and_has_no_file_is_not_paid_for_again_unasked(server, tmp_path):
    server.states, server.final = ENDED, {"outputs": []}
    for _ in range(2):
        done = wiro(server, *RUN, "--out", tmp_path)
        assert done.returncode == 1
        assert "2221 ended well and has no files" in done.stderr
    assert runs(server) == 1


@pytest.mark.slow
def test_a_program_that_is_killed_at_any_moment_has_run_once_in_the_end(server, tmp_path):
    server.pace_s, server.now = 0.05, time.time  # a lost task is recognised by its time
    random_moments = random.Random(1)
    picture = tmp_path / "a.png"
    picture.write_bytes(b"\x89PNG" + bytes(2_000_000))
    asked = 0
    for number in range(20):
        arguments = [*RUN[:4], "--param", f"prompt=number {number}", "--out", str(tmp_path),
                     "--file", f"inputImage={picture}"]  # fmt: skip
        before = runs(server)
        process = forks("support.wiro_program").start(
            ["-c", QUICK, *arguments], environment_for(server)
        )
        time.sleep(random_moments.uniform(0.0, 0.25))
        process.kill()
        process.wait()
        again = wiro(server, *arguments, "--json")
        if "its outcome is unknown" in again.stderr:  # died between its last note and the last byte
            assert runs(server) == before, again.stderr
            asked += 1
            again = wiro(server, *arguments, "--again", "--json")
        assert again.returncode == 0, again.stderr
        (file,) = json.loads(again.stdout)["files"]
        assert Path(file).read_bytes() == CLIP
        assert runs(server) - before == 1, "paid twice, or not at all"
    assert asked <= 1
