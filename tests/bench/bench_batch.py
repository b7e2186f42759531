"""What a batch on Ray costs and gains, and that killed processes cost no clip.

    python tests/bench/bench_batch.py [--jobs 40] [--turns 3] [--kills 6] [--size 128] [--steps 2]
                                      [--seed 0]

--jobs clips of the built-in model with one worker and with two, of one thread each, on a Ray
cluster of this machine, --turns times in turns, so that both meet the same other work. Of each run,
between its first clip and its last: clips a minute; the driver's share of a core; the cores that
other processes took (/proc/stat less what is ours); and clips a minute if each worker had a core of
its own, from the processor time that a clip took (which leaves out what workers wait for). The
speed-up is the ratio of the medians, of both. Then the same jobs once more, while workers and the
driver are killed at random; each clip must be there once, with the bytes of the first run. Linux
only. Ends with one line of JSON.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
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


TICK_HZ = os.sysconf("SC_CLK_TCK")


def processes() -> dict[int, tuple[int, float, str]]:
    """Of each process its parent, its seconds of a processor, and its name."""
    found = {}
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                _, _, tail = (place / "stat").read_text().rpartition(")")
                name = (place / "cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
                fields = tail.split()
                used = (int(fields[11]) + int(fields[12])) / TICK_HZ
                found[int(place.name)] = (int(fields[1]), used, name)
    return found


def family_of(pid: int, listed: dict[int, tuple[int, float, str]]) -> set[int]:
    """A process and all that descend from it."""
    family = {pid} & set(listed)
    while True:
        new = {child for child, (parent, *_) in listed.items() if parent in family} - family
        if not new:
            return family
        family |= new


def workers_of(pid: int) -> list[int]:
    listed = processes()
    return [one for one in family_of(pid, listed) if "ray::Worker" in listed[one][2]]


@dataclass(frozen=True)
class Moment:
    """Seconds of processors since the start: of the driver, workers, all of ours, and everybody."""

    at: float
    clips: int
    driver: float
    workers: float
    own: float
    everybody: float


def moment(pid: int, out: Path) -> Moment:
    listed = processes()
    family = family_of(pid, listed)
    busy = [listed[one][1] for one in family if "ray::Worker" in listed[one][2]]
    fields = [int(f) for f in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    everybody = (sum(fields) - fields[3] - fields[4]) / TICK_HZ  # without idle and waiting
    return Moment(
        time.perf_counter(),
        len(list(out.glob("*.mp4"))),
        listed[pid][1] if pid in listed else 0.0,
        sum(busy),
        sum(listed[one][1] for one in family) + time.process_time(),
        everybody,
    )


def measure(jobs: Path, out: Path, options: tuple[int, int], workers: int) -> dict[str, float]:
    program = start(jobs, out, *options, workers)
    begin = end = None
    count = len(jobs.read_text().splitlines())
    while program.poll() is None:
        now = moment(program.pid, out)
        if begin is None and now.clips >= workers:
            begin = now
        if begin is not None and now.clips < count and program.poll() is None:
            end = now
        time.sleep(0.2)
    told = json.loads(program.communicate()[0])
    assert told["made"] == count, told
    wall, made = end.at - begin.at, end.clips - begin.clips
    others = (end.everybody - begin.everybody) - (end.own - begin.own)
    return {
        "workers": workers,
        "clips_per_min": round(60 * made / wall, 2),
        "clips_per_min_with_a_core_each": round(
            60 * workers * made / (end.workers - begin.workers), 2
        ),
        "median_clip_s": sorted(job["seconds"] for job in told["jobs"])[count // 2],
        "driver_core_percent": round(100 * (end.driver - begin.driver) / wall, 2),
        "cores_of_others": round(others / wall, 2),
    }


def ratio(runs: list[dict[str, float]], name: str) -> float:
    """Of the medians with two workers and with one."""
    one, two = (
        statistics.median(run[name] for run in runs if run["workers"] == count) for count in (1, 2)
    )
    return round(two / one, 2)


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
    for name, default in (
        ("jobs", 40),
        ("turns", 3),
        ("kills", 6),
        ("size", 128),
        ("steps", 2),
        ("seed", 0),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    random.seed(given.seed)
    options = (given.size, given.steps)
    with tempfile.TemporaryDirectory(prefix="batch-") as name:
        folder = Path(name)
        lines = [{"prompt": "a red circle moves left", "seed": n} for n in range(given.jobs)]
        jobs = folder / "jobs.jsonl"
        jobs.write_text("\n".join(map(json.dumps, lines)))
        runs = []
        for turn in range(given.turns):
            for count in (1, 2):
                runs.append(measure(jobs, folder / f"{turn} {count}", options, count))
                print(runs[-1], flush=True)
        killed = survive(jobs, folder / "killed", options, given.kills)
        print(killed, flush=True)
        clips = {file.name: file.read_bytes() for file in (folder / "0 1").glob("*.mp4")}
        others = {file.name: file.read_bytes() for file in (folder / "killed").glob("*.mp4*")}
        result = {
            "runs": runs,
            "speed_up": ratio(runs, "clips_per_min"),
            "speed_up_with_a_core_each": ratio(runs, "clips_per_min_with_a_core_each"),
            "killed": killed,
            "clips": len(others),
            "same_names": clips.keys() == others.keys(),
            "same_bytes": sum(clips[name] == others.get(name) for name in clips),
        }
        print(json.dumps(result))


if __name__ == "__main__":
    main()
