"""What a batch on Ray costs and gains, and that killed processes cost no clip.

    python tests/bench/bench_batch.py [--jobs 40] [--kills 6] [--size 128] [--steps 2] [--seed 0]

First --jobs clips of the built-in model with one worker, then with two, of one thread each, on a
Ray cluster of this machine: clips per minute between the first clip and the last, and the share of
a core that the driver took in that time. Then the same jobs once more, while workers and the driver
are killed at random; each clip must be there once, with the bytes of the first run. Linux only.
Ends with one line of JSON.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def start(jobs: Path, out: Path, size: int, steps: int, workers: int) -> subprocess.Popen:
    words = ["batch", jobs, "--out", out, "--width", size, "--height", size, "--frames", 5,
             "--steps", steps, "--ray", "local", "--workers", workers, "--json"]  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-m", "skyreels", *map(str, words)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def cpu_s(pid: int) -> float:
    """Seconds of a processor that a process took."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def workers_of(pid: int) -> list[int]:
    rows = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True).stdout
    listed = [row.split(None, 2) for row in rows.splitlines()[1:]]
    family, found = {pid}, []
    for _ in range(3):  # driver, raylet, worker
        new = [(int(p), a) for p, q, a in listed if int(q) in family and int(p) not in family]
        family |= {p for p, _ in new}
        found += [p for p, args in new if "ray::Worker" in args]
    return found


def measure(jobs: Path, out: Path, options: tuple[int, int], workers: int) -> dict[str, float]:
    program = start(jobs, out, *options, workers)
    begin = None
    used = wall = 0.0
    count = len(jobs.read_text().splitlines())
    while program.poll() is None:
        clips = len(list(out.glob("*.mp4")))
        if begin is None and clips >= workers:
            begin = (time.perf_counter(), cpu_s(program.pid), clips)
        if begin is not None and clips < count:
            wall, used = time.perf_counter() - begin[0], cpu_s(program.pid) - begin[1]
            made = clips - begin[2]
        time.sleep(0.1)
    told = json.loads(program.communicate()[0])
    assert told["made"] == count, told
    busy = sorted(job["seconds"] for job in told["jobs"])[count // 2]
    return {"workers": workers, "clips_per_min": round(60 * made / wall, 2),
            "median_clip_s": busy, "driver_core_percent": round(100 * used / wall, 2)}  # fmt: skip


def survive(jobs: Path, out: Path, options: tuple[int, int], kills: int) -> dict[str, int]:
    """Kill workers and drivers at random; start the driver again until it is done."""
    killed = {"workers": 0, "drivers": 0}
    while True:
        program = start(jobs, out, *options, 2)
        before = len(list(out.glob("*.mp4")))
        while program.poll() is None:
            time.sleep(random.uniform(0.2, 2.0))
            if sum(killed.values()) >= kills or len(list(out.glob("*.mp4"))) == before:
                continue
            workers = workers_of(program.pid)
            if workers and random.random() < 0.6:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(random.choice(workers), signal.SIGKILL)
                    killed["workers"] += 1
            else:
                program.kill()
                killed["drivers"] += 1
        text = program.communicate()[0]
        if program.returncode >= 0:
            told = json.loads(text)
            assert program.returncode == 0, told
            return {**killed, "tries_above_one": sum(j["tries"] > 1 for j in told["jobs"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("jobs", 40), ("kills", 6), ("size", 128), ("steps", 2), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    random.seed(given.seed)
    options = (given.size, given.steps)
    with tempfile.TemporaryDirectory(prefix="batch-") as name:
        folder = Path(name)
        lines = [{"prompt": "a red circle moves left", "seed": n} for n in range(given.jobs)]
        jobs = folder / "jobs.jsonl"
        jobs.write_text("\n".join(map(json.dumps, lines)))
        runs = [measure(jobs, folder / f"{count}", options, count) for count in (1, 2)]
        for run in runs:
            print(run, flush=True)
        killed = survive(jobs, folder / "killed", options, given.kills)
        print(killed, flush=True)
        clips = {file.name: file.read_bytes() for file in (folder / "1").glob("*.mp4")}
        others = {file.name: file.read_bytes() for file in (folder / "killed").glob("*.mp4*")}
        result = {
            "runs": runs,
            "speed_up": round(runs[1]["clips_per_min"] / runs[0]["clips_per_min"], 2),
            "killed": killed,
            "clips": len(others),
            "same_names": clips.keys() == others.keys(),
            "same_bytes": sum(clips[name] == others.get(name) for name in clips),
        }
        print(json.dumps(result))


if __name__ == "__main__":
    main()
