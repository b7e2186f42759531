"""Batches on a Ray cluster of this machine; skipped where Ray is not installed."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="Ray is not installed: pip install '.[ray]'")

ROOT = Path(__file__).resolve().parents[3]
#: x264 writes other bits now and then where a row has fewer than eight macroblocks
SMALL = ["--steps", "1", "--width", "128", "--height", "128", "--frames", "5"]
LIMIT_S = 300.0


def start(jobs: Path, out: Path, *options: str) -> subprocess.Popen:
    words = ["batch", jobs, "--out", out, *SMALL, *options, "--json"]
    err = (out.parent / "err").open("w", encoding="utf-8")
    with err:
        return subprocess.Popen(
            [sys.executable, "-m", "skyreels", *map(str, words)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=err,
            text=True,
        )


def end(program: subprocess.Popen) -> dict:
    told, _ = program.communicate(timeout=LIMIT_S)
    return json.loads(told)


def children(pid: int) -> dict[int, str]:
    """Processes that descend from one, and what they are called."""
    found, parents = {}, {pid}
    rows = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True).stdout
    listed = [row.split(None, 2) for row in rows.splitlines()[1:]]
    while True:
        new = {int(p): a for p, q, a in listed if int(q) in parents and int(p) not in found}
        if not new:
            return found
        found |= new
        parents |= set(new)


def until(condition: Callable[[], object]) -> object:
    deadline = time.monotonic() + LIMIT_S
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return value


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="processes are found the Linux way")
def test_each_clip_is_made_once_whoever_is_killed(tmp_path):
    """A worker is killed, then the driver; the same command makes what is left."""
    from PIL import Image

    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    lines = [{"prompt": "a red circle moves left", "seed": seed} for seed in range(10)]
    lines.append({"prompt": "a red circle moves left", "image": "a.png"})
    lines += [lines[0], {"prompt": "x", "image": "gone.png"}]
    jobs = tmp_path / "jobs.jsonl"
    jobs.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    out, single = tmp_path / "out", tmp_path / "single"

    first = start(jobs, out, "--ray", "local", "--workers", "2")
    try:
        worker = until(
            lambda: [p for p, name in children(first.pid).items() if "ray::Worker" in name]
        )
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker[0], signal.SIGKILL)
        until(lambda: list(out.glob("*.mp4")))
    finally:
        first.kill()
        first.communicate()
    there = {file.name: file.stat().st_mtime_ns for file in out.glob("*.mp4")}
    assert there

    told = end(start(jobs, out, "--ray", "local", "--workers", "2"))
    err = (tmp_path / "err").read_text(encoding="utf-8")
    assert "Traceback" not in err
    assert [job["line"] for job in told["jobs"]] == list(range(1, len(lines) + 1))
    assert "gone.png does not exist" in told["jobs"][-1]["error"]
    assert [job["error"] for job in told["jobs"][:-1]] == [None] * (len(lines) - 1)
    assert told["jobs"][0]["file"] == told["jobs"][-2]["file"]
    made = {job["file"] for job in told["jobs"] if job["tries"]}
    found = {job["file"] for job in told["jobs"][:-1] if not job["tries"]}
    assert found == set(there)
    assert not made & found
    assert {name: (out / name).stat().st_mtime_ns for name in there} == there
    assert all(re.fullmatch(r".+:\d+", job["worker"]) for job in told["jobs"] if job["tries"])

    alone = end(start(jobs, single))
    assert [job["file"] for job in alone["jobs"]] == [job["file"] for job in told["jobs"]]
    names = sorted(file.name for file in single.glob("*.mp4"))
    assert len(names) == 11
    assert names == sorted(file.name for file in out.glob("*.mp4*"))
    for name in names:
        assert (out / name).read_bytes() == (single / name).read_bytes(), name


def test_a_cluster_that_is_not_there_is_a_sentence(tmp_path):
    jobs = tmp_path / "jobs.jsonl"
    jobs.write_text('{"prompt": "a red circle"}', encoding="utf-8")
    program = start(jobs, tmp_path / "out", "--ray", "127.0.0.1:1")
    told = end(program)
    assert program.returncode == 1
    assert "There is no Ray cluster to use at 127.0.0.1:1" in told["error"]
    assert "Traceback" not in (tmp_path / "err").read_text(encoding="utf-8")
