"""Hundreds of odd files through `inspect` and `generate`: one sentence each, and no code runs."""

import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
from collections import Counter
from collections.abc import Iterator

import pytest
from comfyui_skyreels.skyreels import cli
from comfyui_skyreels.skyreels.errors import MAX_MESSAGE, SkyReelsError
from comfyui_skyreels.skyreels.runtime import TorchRuntime
from comfyui_skyreels.skyreels.weights.load import load_transformer, load_vae
from support.forked import forks
from support.odd_files import MARKER, Sound, odd_file

NUM_FILES = 500
#: files of one test
NUM_PARTS = 5
#: what a file is given to `generate` as
ROLES = ("transformer",) * 5 + ("vae", "vae", "text", "image", "clip")
#: after which a file has made the program hang
LIMIT_S = 60
pytestmark = pytest.mark.skipif(
    not hasattr(signal, "setitimer"), reason="pipes and alarms are Unix's"
)


@pytest.fixture(scope="module")
def sound() -> Sound:
    return Sound()


@contextlib.contextmanager
def hang_guard(what: str) -> Iterator[None]:
    def ring(*_: object) -> None:
        raise AssertionError(f"hangs: {what}")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run(*arguments: object) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main([str(each) for each in arguments])
    return code, out.getvalue(), err.getvalue()


def check(code: int, out: str, err: str) -> str:
    """Assert that an answer is for people, and return the reason of a refusal."""
    lines = err.splitlines()
    assert all(line.isprintable() for line in lines), err
    answer = json.loads(out)
    assert out.count("\n") == 1
    if code == 0:
        return ""
    assert code == 1
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    assert len(lines[0]) <= MAX_MESSAGE + 20
    assert answer == {"error": lines[0].removeprefix("error: ")}
    assert "defect of the program" not in err, err
    assert re.search(r"[.?)]$", lines[0]), err
    return answer["error"]


@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_odd_files_are_answered_with_one_sentence_and_no_code_runs(
    tmp_path, monkeypatch, sound, part
):
    rng = random.Random(part)
    marker = tmp_path / MARKER
    good = tmp_path / "good.safetensors"
    good.write_bytes(sound.files["vae"])
    model = tmp_path / "model.safetensors"
    model.write_bytes(sound.files["transformer"])
    nowhere = tmp_path / "no-text-encoder"
    seen: Counter[str] = Counter()
    for number in range(NUM_FILES // NUM_PARTS):
        folder = tmp_path / "x"
        folder.mkdir()
        monkeypatch.chdir(folder)  # names of sockets must be short
        path = odd_file(rng, sound, folder, marker)
        role = rng.choice(ROLES)
        places = {
            "transformer": [path, good, nowhere],
            "vae": [model, path, nowhere],
            "text": [model, good, path],
        }.get(role, [])
        command = ["generate", "--prompt", "x", "--out", tmp_path / "out.npy", "--json"]
        options = ("--transformer", "--vae", "--text-encoder")
        for option, place in zip(options, places, strict=False):
            command += [option, place]
        command += {"image": [path], "clip": ["--extend", path]}.get(role, [])
        with hang_guard(f"file {number} of part {part}, {path.name!r} as {role}"):
            described = check(*run("inspect", path, "--json"))
            refused = check(*run(*command))
            assert refused, "there is no text encoder, or no picture"
            if role in ("transformer", "vae") and "text encoder" in refused:
                load = load_transformer if role == "transformer" else load_vae
                with contextlib.suppress(SkyReelsError):
                    load(path, runtime=TorchRuntime())
        seen["refused" if described else "described"] += 1
        monkeypatch.chdir(tmp_path)
        shutil.rmtree(folder)
    assert not marker.exists()
    assert seen["refused"] > 40 and seen["described"] > 5, seen


def test_the_same_holds_for_the_program_as_people_start_it(tmp_path, sound):
    rng = random.Random(77)
    for _ in range(3):
        path = odd_file(rng, sound, tmp_path, tmp_path / MARKER)
        result = forks("torch").run(
            ["-m", "skyreels", "inspect", str(path), "--json"], {**os.environ}
        )
        check(result.returncode, result.stdout, result.stderr)
    assert not (tmp_path / MARKER).exists()
