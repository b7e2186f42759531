"""A batch with up to 1,000 workers, simulated, and what the driver and Ray really take.

    python tests/bench/simulate_batch.py [--clips-each 8] [--lost-per-hour 0.01] [--seed 0]
    python tests/bench/simulate_batch.py --measure [--rounds 200]

The simulation runs the driver's own decisions and books (skyreels/pipeline/driver.py, batch.py)
against workers that exist in a simulated time (tests/support/simulated.py), for several lengths of
a clip: how much faster than one worker, the driver's share of the time, what is lost and made
again. Then where the driver becomes the limit: so many workers that one clip comes in the time it
spends on one.

With --measure, on a Ray cluster of this machine, whose workers return bytes at once: seconds that
the driver takes for a job with a picture of 2 MB and a clip of 5 MB (processor time of its main
thread, and of its whole process; it is less than the time that passes where others compute), until
a worker has started, and until one that was killed is noticed. Linux only for the last.
Ends with one line of JSON.
"""

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

PICTURE_BYTES, CLIP_BYTES = 2_000_000, 5_000_000
WORKERS = (1, 2, 4, 8, 16, 32, 64, 256, 1000)
#: seconds of a clip: a very short one, then as planned for eight H100, for one, for one RTX 4090
CLIP_SECONDS = (5.0, 35.0, 256.0, 1005.0)


def simulated(given: argparse.Namespace) -> dict:
    from support.simulated import Costs, simulate

    rows = []
    for clip in CLIP_SECONDS:
        for workers in WORKERS:
            with tempfile.TemporaryDirectory(prefix="batch-") as name:
                costs = replace(Costs(), clip=clip)
                num_clips = given.clips_each * workers
                outcome = simulate(
                    Path(name), num_clips, workers, costs,
                    lost_per_hour=given.lost_per_hour, seed=given.seed,
                )  # fmt: skip
                jobs = outcome.summary["jobs"]
                assert len(outcome.written) == len(set(outcome.written)) == num_clips
                alone = costs.start + costs.load + num_clips * clip
                rows.append({
                    "clip_s": clip, "workers": workers, "clips": num_clips,
                    "hours": round(outcome.workers.now / 3600, 3),
                    "times_one_worker": round(alone / outcome.workers.now, 1),
                    "driver_percent": round(100 * outcome.driver_share, 2),
                    "lost": outcome.workers.lost,
                    "made_again": sum(job["tries"] - 1 for job in jobs),
                    "most_tries": max(job["tries"] for job in jobs),
                })  # fmt: skip
                print(rows[-1], flush=True)
    costs = Costs()
    limits = {}
    for clip in CLIP_SECONDS:
        workers = clip / (costs.send + costs.take + costs.wait)
        for _ in range(20):
            workers = clip / (costs.send + costs.take + costs.wait + costs.wait_each * workers)
        limits[clip] = round(workers)
    print({"workers at which the driver is the limit": limits})
    return {"costs": asdict(costs), "rows": rows, "limits": limits}


def prepare(arguments: Namespace):
    clip = os.urandom(CLIP_BYTES)

    def make(job: Namespace) -> None:
        job.out.write_bytes(clip)

    return make


def look(arguments: Namespace) -> dict[str, str]:
    return {}


def measured(given: argparse.Namespace) -> dict:
    import ray

    from skyreels.pipeline import batch, driver, ray_workers

    crew = ray_workers.Crew("local", 1, "cpu", prepare, look)
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="batch-") as name, ray_workers._connected(crew):
        folder = Path(name)
        picture = folder / "a.png"
        picture.write_bytes(os.urandom(PICTURE_BYTES))
        digest = batch.file_digest(picture)
        start, _ = ray_workers._starter(crew, Namespace(out=folder))

        starts = []
        for _ in range(3):
            begin = time.perf_counter()
            actor = start()
            ray.get(actor.look.remote())
            starts.append(time.perf_counter() - begin)
            ray.kill(actor)
        figures["worker started"] = statistics.median(starts)

        tasks = [
            batch.Task(f"{n:032x}", Namespace(image=picture), {"image": digest})
            for n in range(given.rounds)
        ]
        lines = [batch.Line(n, task) for n, task in enumerate(tasks, 1)]
        workers = ray_workers._RayWorkers(start, print)
        marks: list[tuple[float, float, float]] = []

        def save(task, clip):
            batch.write_whole(task.place(folder), clip)
            marks.append((time.thread_time(), time.process_time(), time.perf_counter()))

        batch.run_lines(
            lines, folder,
            lambda left: driver.drive(
                left, workers, 1, admit=lambda found: True, save=save, tell=print,
                check=lambda: None,
            ),
            lambda line: None,
        )  # fmt: skip
        for place, kind in enumerate(("main thread", "process", "wall")):
            ends = [mark[place] for mark in marks]
            figures[f"a job, {kind}"] = (ends[-1] - ends[5]) / (len(ends) - 6)

        begin = time.thread_time()
        for task in tasks[:50]:
            batch.read_files(task)
        figures["of it, read and hash the picture"] = (time.thread_time() - begin) / 50

        begin = time.thread_time()
        actors = [start() for _ in range(4)]
        figures["begin a worker"] = (time.thread_time() - begin) / 4
        busy = ray.remote(num_cpus=0)(_Busy).remote()
        ray.get(busy.pid.remote())
        for count in (1, 100, 1000):
            refs = [busy.sleep.remote(600) for _ in range(count)]
            begin = time.thread_time()
            for _ in range(20):
                ray.wait(refs, timeout=0)
            figures[f"ask {count} workers"] = (time.thread_time() - begin) / 20
            ray.kill(busy)
            busy = ray.remote(num_cpus=0)(_Busy).remote()
            ray.get(busy.pid.remote())
        del actors

        notices = []
        for _ in range(3):
            victim = ray.remote(num_cpus=0)(_Busy).remote()
            pid = ray.get(victim.pid.remote())
            ref = victim.sleep.remote(600)
            time.sleep(0.5)
            begin = time.perf_counter()
            os.kill(pid, signal.SIGKILL)
            ray.wait([ref], timeout=60)
            notices.append(time.perf_counter() - begin)
        figures["a killed process is noticed"] = statistics.median(notices)
    for what, seconds in figures.items():
        print(f"{what:34} {1e3 * seconds:10.3f} ms")
    return {"ray": ray.__version__, "cores": os.cpu_count(), "load": os.getloadavg()[0],
            "seconds": figures}  # fmt: skip


class _Busy:
    def pid(self) -> int:
        return os.getpid()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--clips-each", type=int, default=8)
    parser.add_argument("--lost-per-hour", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    print(json.dumps(measured(given) if given.measure else simulated(given)))


if __name__ == "__main__":
    main()
