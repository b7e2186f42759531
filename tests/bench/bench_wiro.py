"""What following tasks on Wiro costs this machine: memory and CPU of many, time and memory of one.

    python tests/bench/bench_wiro.py
    python tests/bench/bench_wiro.py --tasks 10 --seconds 20

The service is the loopback stand-in, in a process of its own, so that only our side counts; every
measurement has a fresh process too. Linux only: memory is read from /proc. Ends with one line of
JSON; bars that are passed are named in it.
"""

import argparse
import json
import math
import platform
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import av  # noqa: F401 - our code imports these two late
import websocket  # noqa: F401
from support.clip import make_clip
from support.wiro_server import KEY, SECRET, STATES, WiroServer

from wiro_api.client import Client
from wiro_api.jobs import Job, finish, start, to_handle
from wiro_api.journal import Journal
from wiro_api.listener import RunListener
from wiro_api.schema import SKYREELS
from wiro_api.signing import Credentials
from wiro_api.task import Output
from wiro_api.video import check_video, read_frames

BARS = {"rss_mb": 200.0, "cpu_share": 0.10, "overhead_s": 1.0}
FIRST_ID, FEWEST_FRAMES = 2221, 5
PICTURE_BYTES = 2_000_000
PARAMETERS = {
    "inputImageUrl": "", "prompt": "", "negativePrompt": "", "scale": 6.0, "numFrames": 97,
    "size": "960x544", "steps": 30,
}  # fmt: skip


# --- the service --------------------------------------------------------------------------------


def serve(seconds: float, num_tasks: int, num_bytes: int) -> None:
    """Until standard input ends. Without seconds tasks have ended when they are made.

    The video of each task has a number of frames of its own; with bytes, all have the same one.
    """
    states = STATES if seconds else STATES[-1:]
    with WiroServer(pace_s=seconds, with_socket=seconds > 0, states=states) as server:
        if num_bytes:
            clip = make_clip()
            rest = num_bytes - len(clip)
            server.files["0.mp4"] = clip + rest.to_bytes(4, "big") + b"free" + bytes(rest - 8)
        for number in range(num_tasks):
            server.files[f"{FIRST_ID + number}/0.mp4"] = make_clip(FEWEST_FRAMES + number)
        print(json.dumps({"url": server.url, "socket_url": server.socket_url}), flush=True)
        sys.stdin.read()
        print(json.dumps(sum(path.startswith("Run/") for path in server.paths())), flush=True)


@contextmanager
def service(**options: float) -> Iterator[dict[str, Any]]:
    """Addresses of a running one; in the end, how many Runs it was sent."""
    command = [sys.executable, __file__, "--role", "serve", "--options", json.dumps(options)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        found = json.loads(process.stdout.readline())
        yield found
        process.stdin.close()
        found["runs"] = json.loads(process.stdout.readline())


def in_process(role: str, **options: Any) -> dict[str, Any]:
    """What a measurement in a fresh process says."""
    command = [sys.executable, __file__, "--role", role, "--options", json.dumps(options)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


# --- measurements -------------------------------------------------------------------------------


def memory_mb(name: str) -> float:
    """VmRSS, what is in memory now, or VmHWM, the most that ever was."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no {name} in /proc/self/status")


class Verifier(RunListener):
    """Decodes each video once."""

    def verify(self, path: Path, output: Output) -> None:
        check_video(path)


def job(
    url: str, socket_url: str, folder: Path, number: int, client: Client, picture: bytes
) -> int:
    """Start, follow and download one task; returns its video's number of frames."""
    journal = Journal(folder / "journal.sqlite")
    parameters = {**PARAMETERS, "prompt": f"number {number}"}
    files = [("inputImage", ("input.png", picture, "image/png"))]
    client.socket_url = socket_url
    entry = start(client, journal, Job(SKYREELS, parameters, files))
    task, paths = finish(
        client,
        to_handle(entry),
        folder / entry.taskid,
        journal=journal,
        entry_id=entry.id,
        listener=Verifier(),
    )
    row = journal.get(entry.id)
    assert row is not None
    assert (row.state, row.verdict, row.files) == ("ended", "succeeded", tuple(paths))
    assert task.parameters["prompt"] == f"number {number}"
    frames = sum(1 for _ in read_frames(paths[0]))
    return frames - FEWEST_FRAMES - int(entry.taskid) + FIRST_ID


def make_client(url: str) -> Client:
    return Client(Credentials(KEY, SECRET), base_url=url)


def measure_many(
    url: str, socket_url: str, num_tasks: int, seconds: float, shared: bool
) -> dict[str, Any]:
    """Memory and CPU of following many tasks, one thread each."""
    errors: list[str] = []
    right = 0

    def work(number: int) -> None:
        nonlocal right
        try:
            mine = client if shared else make_client(url)
            assert job(url, socket_url, folder, number, mine, b"\x89PNG") == 0, "another's video"
            right += 1
        except Exception:  # noqa: BLE001 - told in the result
            errors.append(traceback.format_exc(limit=-1))

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        client = make_client(url)
        before = memory_mb("VmRSS")
        threads = [threading.Thread(target=work, args=(n,)) for n in range(num_tasks)]
        begin = time.monotonic()
        for thread in threads:
            thread.start()
        samples = []
        while any(thread.is_alive() for thread in threads):
            samples.append((time.monotonic() - begin, time.process_time()))
            time.sleep(0.2)
        wall, cpu = time.monotonic() - begin, time.process_time()
    return {
        "right": right,
        "errors": errors[:3],
        "wall_s": round(wall, 1),
        "rss_before_mb": round(before, 1),
        "rss_mb": round(memory_mb("VmHWM") - before, 1),
        "cpu_share_queued": share(samples, 0.08 * seconds, 0.14 * seconds),
        "cpu_share_running": share(samples, 0.35 * seconds, 0.85 * seconds),
        "cpu_s": round(cpu, 2),
    }


def share(samples: list[tuple[float, float]], first_s: float, last_s: float) -> float:
    """Of one core, between two moments; NaN if it was over before."""
    inside = [sample for sample in samples if first_s <= sample[0] <= last_s]
    if len(inside) < 2:
        return math.nan
    (wall0, cpu0), (wall1, cpu1) = inside[0], inside[-1]
    return round((cpu1 - cpu0) / (wall1 - wall0), 4)


def measure_one(url: str, repeats: int) -> dict[str, Any]:
    """Time of a run whose task has ended when it is made, and what memory it takes."""
    picture = b"\x89PNG" + bytes(PICTURE_BYTES - 4)
    client = make_client(url)
    before = memory_mb("VmRSS")
    seconds = []
    for number in range(repeats):
        with tempfile.TemporaryDirectory() as name:
            begin = time.perf_counter()
            job(url, "", Path(name), number, client, picture)
            seconds.append(time.perf_counter() - begin)
    return {
        "overhead_s": round(sorted(seconds)[len(seconds) // 2], 3),
        "slowest_s": round(max(seconds), 3),
        "peak_growth_mb": round(memory_mb("VmHWM") - before, 1),
    }


# --- together -----------------------------------------------------------------------------------


def commit() -> str:
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def measure(num_tasks: int, seconds: float, shared: bool) -> dict[str, Any]:
    with service(seconds=seconds, num_tasks=num_tasks, num_bytes=0) as found:
        many = in_process(
            "many", url=found["url"], socket_url=found["socket_url"], num_tasks=num_tasks,
            seconds=seconds, shared=shared,
        )  # fmt: skip
    many["runs"] = found["runs"]
    ones = {}
    for megabytes, repeats in ((5, 5), (200, 1)):
        with service(seconds=0, num_tasks=0, num_bytes=megabytes * 1_000_000) as found:
            ones[f"{megabytes} MB"] = in_process("one", url=found["url"], repeats=repeats)
    small, large = ones.values()
    return {
        "many": many,
        "one": ones,
        "passed": {
            "all tasks right, each run once": many["right"] == many["runs"] == num_tasks,
            "memory of many": many["rss_mb"] <= BARS["rss_mb"],
            "CPU of many that wait": many["cpu_share_queued"] <= BARS["cpu_share"],
            "CPU of many that report": many["cpu_share_running"] <= BARS["cpu_share"],
            "overhead of one": small["overhead_s"] <= BARS["overhead_s"],
            "a file is never in memory": large["peak_growth_mb"] < 50,
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60.0, help="from a Run to its end")
    parser.add_argument("--client-each", action="store_true", help="as the nodes do it")
    parser.add_argument("--role", choices=("serve", "many", "one"), help=argparse.SUPPRESS)
    parser.add_argument("--options", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.role == "serve":
        serve(**given.options)
    elif given.role:
        measured = {"many": measure_many, "one": measure_one}[given.role](**given.options)
        print(json.dumps(measured))
    else:
        figures = measure(given.tasks, given.seconds, not given.client_each)
        print(
            json.dumps(
                {
                    "bench": "wiro",
                    "device": platform.machine(),
                    "python": platform.python_version(),
                    "commit": commit(),
                    "tasks": given.tasks,
                    "seconds": given.seconds,
                    **figures,
                }
            )
        )


if __name__ == "__main__":
    main()
