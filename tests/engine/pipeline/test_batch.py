"""Batches without Ray: each line once, by its contents, and what stops or continues them."""

import errno
import json
import os
import sys
from argparse import Namespace
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch
from comfyui_skyreels.skyreels import cli
from comfyui_skyreels.skyreels.errors import DependencyError, OptionError, SkyReelsError
from comfyui_skyreels.skyreels.pipeline import batch, ray_workers
from comfyui_skyreels.skyreels.pipeline.receipt import read_receipt
from PIL import Image
from support.forked import forks

pytestmark = pytest.mark.usefixtures("fast_convolutions", "kept_models")
SMALL = ["--steps", "2", "--width", "32", "--height", "32", "--frames", "5"]
PROMPT = "a red circle moves left"


def write(path: Path, *jobs) -> Path:
    lines = [job if isinstance(job, str) else json.dumps(job) for job in jobs]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def run(capsys, jobs: Path, out: Path, *options) -> tuple[int, dict, str]:
    code = cli.main(["batch", str(jobs), "--out", str(out), *SMALL, *map(str, options), "--json"])
    told, err = capsys.readouterr()
    return code, json.loads(told), err


def clips(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.mp4*"))


def save_picture(path: Path, seed: int) -> Path:
    noise = np.random.default_rng(seed).integers(0, 255, (32, 32, 3), np.uint8)
    Image.fromarray(noise).save(path)
    return path


def test_lines_become_clips_in_their_order_and_equal_lines_one(capsys, tmp_path):
    first, second = {"prompt": PROMPT, "seed": 1}, {"prompt": PROMPT, "seed": 2, "steps": 1}
    jobs = write(tmp_path / "jobs.jsonl", second, "", first, second)
    code, told, err = run(capsys, jobs, tmp_path / "out")
    assert code == 0
    assert [job["line"] for job in told["jobs"]] == [1, 3, 4]
    files = [job["file"] for job in told["jobs"]]
    assert files[0] == files[2] != files[1]
    assert clips(tmp_path / "out") == sorted(set(files))
    assert {job["tries"] for job in told["jobs"]} == {1}
    assert json.loads((tmp_path / "out" / batch.SUMMARY).read_text()) == told
    assert "3 jobs: 0 clips are there, 2 to make." in err
    assert "1/2 (line 1, this process)" in err
    receipts = [read_receipt(tmp_path / "out" / file).parameters for file in files]
    assert [(each["seed"], each["steps"]) for each in receipts] == [(2, 1), (1, 2), (2, 1)]


def test_a_clip_is_that_of_generate(capsys, tmp_path):
    job = {"prompt": PROMPT, "seed": 3, "steps": 1, "width": 128, "height": 128}
    jobs = write(tmp_path / "jobs.jsonl", job)
    _, told, _ = run(capsys, jobs, tmp_path / "out")
    single = tmp_path / "single.mp4"
    # x264 writes other bits now and then where a row has fewer than eight macroblocks
    options = [f"--{name}={value}" for name, value in job.items()]
    assert cli.main(["generate", "--out", str(single), "--frames", "5", *options]) == 0
    assert (tmp_path / "out" / told["jobs"][0]["file"]).read_bytes() == single.read_bytes()


def test_weights_are_loaded_once(capsys, tmp_path, monkeypatch):
    counts = dict.fromkeys(("load_models", "load_encoder"), 0)

    def counted(name):
        load = getattr(cli.batch, name)

        def count(*arguments):
            counts[name] += 1
            return load(*arguments)

        monkeypatch.setattr(cli.batch, name, count)

    for name in counts:
        counted(name)
    jobs = [{"prompt": PROMPT, "seed": seed} for seed in range(3)]
    assert run(capsys, write(tmp_path / "jobs.jsonl", *jobs), tmp_path / "out")[1]["made"] == 3
    assert counts == {"load_models": 1, "load_encoder": 1}


BAD = {
    "nonsense": "is not JSON",
    "[1]": "not an object",
    '{"prompt": "a", "sed": 1}': "'sed' is not one of",
    '{"prompt": "a", "out": "x.mp4"}': "'out' is not one of",
    '{"prompt": "a", "steps": "many"}': "steps: invalid int value: 'many'",
    '{"prompt": "a", "steps": true}': "steps is true: give a text or a number",
    '{"prompt": "a", "seed": null}': "seed is null: give a text or a number",
    '{"prompt": "a", "width": 33}': "Width 33 is not a multiple of 16",
    '{"prompt": "a", "cfg": NaN}': "nan",
    '{"prompt": "a", "fit": "bend"}': "fit: invalid choice",
    '{"prompt": "a", "image": "gone.png"}': "gone.png does not exist",
    '{"seed": 1}': "There is no prompt",
    '{"prompt": "a", "noise-augmentation": 2}': "Noise augmentation 2.0 is not within",
}


def test_bad_lines_are_named_and_the_others_go_on(capsys, tmp_path):
    jobs = write(tmp_path / "jobs.jsonl", *BAD, {"prompt": PROMPT})
    code, told, err = run(capsys, jobs, tmp_path / "out")
    assert code == 1
    assert (told["failed"], told["made"]) == (len(BAD), 1)
    for job, sentence in zip(told["jobs"], BAD.values(), strict=False):
        assert sentence in job["error"]
        assert f"line {job['line']}: {job['error']}" in err
    assert told["jobs"][-1]["error"] is None
    assert len(clips(tmp_path / "out")) == 1


def test_an_error_of_one_clip_is_that_clips(capsys, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    bad = {"prompt": PROMPT, "image": "bad.png"}
    jobs = write(tmp_path / "jobs.jsonl", bad, {"prompt": PROMPT})
    code, told, _ = run(capsys, jobs, tmp_path / "out")
    assert code == 1
    assert "bad.png" in told["jobs"][0]["error"]
    assert told["jobs"][1]["error"] is None


def test_what_no_check_caught_is_that_clips_too(capsys, tmp_path, monkeypatch):
    make = cli.batch.make_clip

    def fail_once(arguments, *rest, **options):
        if arguments.seed == 1:
            raise MemoryError
        return make(arguments, *rest, **options)

    monkeypatch.setattr(cli.batch, "make_clip", fail_once)
    jobs = [{"prompt": PROMPT, "seed": seed} for seed in (1, 2)]
    code, told, _ = run(capsys, write(tmp_path / "jobs.jsonl", *jobs), tmp_path / "out")
    assert code == 1
    assert "ran out of memory" in told["jobs"][0]["error"]
    assert told["jobs"][1]["error"] is None


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(b"\n \n", "holds no job"), (b"\xff\xfe", "not text in UTF-8"), (None, "does not exist")],
)
def test_a_file_without_jobs_is_refused(capsys, tmp_path, content, sentence):
    jobs = tmp_path / "jobs.jsonl"
    if content is not None:
        jobs.write_bytes(content)
    code, told, _ = run(capsys, jobs, tmp_path / "out")
    assert code == 1
    assert sentence in told["error"]


def test_a_finished_clip_is_not_made_again(capsys, tmp_path):
    jobs = write(tmp_path / "jobs.jsonl", {"prompt": PROMPT}, {"prompt": PROMPT, "seed": 1})
    _, first, _ = run(capsys, jobs, tmp_path / "out")
    kept, gone = (tmp_path / "out" / job["file"] for job in first["jobs"])
    receipt = read_receipt(gone)
    kept.write_bytes(b"as it was")
    gone.unlink()
    _, told, err = run(capsys, jobs, tmp_path / "out")
    assert (told["found"], told["made"]) == (1, 1)
    assert [job["tries"] for job in told["jobs"]] == [0, 1]
    assert "1 clips are there, 1 to make" in err
    assert (kept.read_bytes(), read_receipt(gone)) == (b"as it was", receipt)


def names(tmp_path: Path, jobs: list[dict], *options) -> list[str]:
    path = write(tmp_path / "jobs.jsonl", *jobs)
    words = ["batch", path, "--out", tmp_path, *SMALL, *options]
    arguments = cli.build_parser().parse_args([str(word) for word in words])
    shared = {"weights": cli.batch.fingerprints(arguments)}
    lines = cli.batch.read_jobs(arguments, shared)
    assert [line.error for line in lines] == [""] * len(jobs)
    return [line.task.digest for line in lines]


def test_a_name_changes_with_each_input(tmp_path):
    save_picture(tmp_path / "a.png", 1)
    save_picture(tmp_path / "b.png", 2)
    base = {"prompt": PROMPT, "image": "a.png"}
    changes = [
        *({"prompt": "another"}, {"negative": "blur"}, {"seed": 5}, {"steps": 3}, {"cfg": 3}),
        *({"width": 48}, {"height": 48}, {"frames": 9}, {"shift": 5}, {"embedded-guidance": 2}),
        *({"fit": "pad"}, {"noise-augmentation": 0.1}, {"latent-strength": 2}, {"riflex": "off"}),
        *({"decode": "full"}, {"attention": "fast"}, {"cache": "easy"}, {"bad-render": "warn"}),
        *({"window": "5"}, {"image": "b.png"}, {"end-image": "b.png"}),
    ]
    found = names(tmp_path, [base, *({**base, **change} for change in changes)])
    found += names(tmp_path, [base], "--precision", "bf16")
    assert len(set(found)) == len(found) == len(changes) + 2


def test_a_name_depends_on_contents_and_not_on_how_they_are_said(tmp_path):
    save_picture(tmp_path / "a.png", 1)
    save_picture(tmp_path / "c.png", 1)
    said = [
        {"prompt": PROMPT, "image": "a.png", "seed": 0},
        {"image": str(tmp_path / "c.png"), "prompt": PROMPT, "steps": 2, "cfg": 6.0},
        {"prompt": PROMPT, "image": "a.png", "cfg": "6"},
    ]
    assert len(set(names(tmp_path, said))) == 1
    assert names(tmp_path, [{"image": "a.png"}], "--prompt", PROMPT) == names(tmp_path, said[:1])
    before = names(tmp_path, said[:1])
    save_picture(tmp_path / "a.png", 3)
    assert names(tmp_path, said[:1]) != before


def test_a_name_depends_on_the_weights(tmp_path, monkeypatch):
    before = names(tmp_path, [{"prompt": PROMPT}])
    found = cli.batch.fingerprints
    monkeypatch.setattr(cli.batch, "fingerprints", lambda given: {**found(given), "vae": "other"})
    assert names(tmp_path, [{"prompt": PROMPT}]) != before


def test_a_picture_that_changes_meanwhile_is_refused(tmp_path):
    path = save_picture(tmp_path / "a.png", 1)
    task = batch.Task("0", Namespace(image=path), {"image": batch.file_digest(path)})
    assert batch.read_files(task) == {"image": path.read_bytes()}
    save_picture(path, 2)
    with pytest.raises(OptionError, match="has changed since the batch began"):
        batch.read_files(task)


def test_a_second_batch_on_one_folder_is_refused(capsys, tmp_path):
    jobs = write(tmp_path / "jobs.jsonl", {"prompt": PROMPT})
    with batch.locked(tmp_path / "out"):
        code, told, _ = run(capsys, jobs, tmp_path / "out")
    assert code == 1
    assert f"is being filled by another batch (process {os.getpid()} on " in told["error"]
    assert clips(tmp_path / "out") == []
    assert run(capsys, jobs, tmp_path / "out")[0] == 0


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_ends_the_batch_and_leaves_nothing_half_written(capsys, tmp_path, monkeypatch):
    from comfyui_skyreels.skyreels import media

    jobs = [{"prompt": PROMPT, "seed": seed} for seed in range(3)]
    path = write(tmp_path / "jobs.jsonl", *jobs)
    code, _, _ = run(capsys, write(tmp_path / "one.jsonl", jobs[0]), tmp_path / "out")
    assert code == 0
    before = clips(tmp_path / "out")
    monkeypatch.setattr(media._VideoFile, "put", full)
    code, told, err = run(capsys, path, tmp_path / "out")
    assert code == 1
    assert "its disk is full" in told["error"]
    assert "2/2" not in err  # no other clip was tried
    assert clips(tmp_path / "out") == before
    monkeypatch.undo()


def test_bytes_of_a_worker_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    place = tmp_path / "x.mp4"
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        batch.write_whole(place, b"clip")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    batch.write_whole(place, b"clip")
    assert place.read_bytes() == b"clip"


#: a batch that is killed with its third clip half-written
KILLED = """
import os, signal, sys
from skyreels import cli, media
finish, count = media._VideoFile.finish, 0
def kill(self):
    global count
    count += 1
    if count == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    finish(self)
media._VideoFile.finish = kill
sys.exit(cli.main(WORDS))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kill -9 is of POSIX")
def test_a_killed_batch_goes_on_where_it_was(capsys, tmp_path):
    jobs = [{"prompt": PROMPT, "seed": seed} for seed in range(5)]
    path, out = write(tmp_path / "jobs.jsonl", *jobs), tmp_path / "out"
    words = ["batch", str(path), "--out", str(out), *SMALL]
    program = ["-c", KILLED.replace("WORDS", repr(words))]
    killed = forks("torch").run(program, {**os.environ, "OMP_NUM_THREADS": "1"})
    assert killed.returncode < 0, killed.stderr
    there = {file.name: file.stat().st_mtime_ns for file in out.glob("*.mp4")}
    assert (len(there), len(list(out.glob("*.part")))) == (2, 1)
    code, told, _ = run(capsys, path, out)  # the dead process's lock is no hindrance
    assert (code, told["found"], told["made"]) == (0, 2, 3)
    assert {name: (out / name).stat().st_mtime_ns for name in there} == there
    assert clips(out) == sorted(job["file"] for job in told["jobs"])


def test_an_interrupted_batch_says_what_continues_it(capsys, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.batch, "make_clip", interrupt)
    jobs = write(tmp_path / "jobs.jsonl", {"prompt": PROMPT})
    code, told, _ = run(capsys, jobs, tmp_path / "out")
    assert code == 130
    assert told["error"] == "Interrupted; the same command makes the clips that are not finished."
    summary = json.loads((tmp_path / "out" / batch.SUMMARY).read_text())
    assert summary["left"] == 1


@pytest.mark.parametrize("options", [["--workers", "2"], ["--ray", "local", "--workers", "0"]])
def test_workers_are_for_ray(capsys, tmp_path, options):
    jobs = write(tmp_path / "jobs.jsonl", {"prompt": PROMPT})
    code, told, _ = run(capsys, jobs, tmp_path / "out", *options)
    assert code == 1
    assert "is for --ray, and within 1..256" in told["error"]


def test_without_ray_its_extra_is_named(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_workers.importlib.util, "find_spec", lambda _: None)
    crew = ray_workers.Crew("local", None, "auto", cli.batch.batch_maker, cli.batch.fingerprints)
    with pytest.raises(DependencyError, match=r"pip install \"skyreels-wiro\[ray\]\""):
        ray_workers.check_crew(crew)


def test_with_ray_no_single_gpu_is_named(capsys, tmp_path):
    jobs = write(tmp_path / "jobs.jsonl", {"prompt": PROMPT})
    options = ["--ray", "local", "--device", "cuda:1"]
    code, told, _ = run(capsys, jobs, tmp_path / "out", *options)
    assert code == 1
    assert "--device cuda:1 names a GPU" in told["error"]


# --- what the driver makes of its workers' answers ----------------------------------------------


def books(said: list[str]) -> ray_workers._State:
    return ray_workers._State({"vae": "1"}, deque(), lambda: None, Path(), said.append)


def answer(**changes) -> dict:
    versions = {"python": sys.version.split()[0], "torch": torch.__version__}
    return {"name": "box:1", "package": ray_workers.VERSION, **versions, "weights": {"vae": "1"},
            "error": "", **changes}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "sentence", "is_used"),
    [
        ({}, "", True),
        ({"torch": "0.1"}, "box:1 has torch 0.1, and", True),
        ({"python": "2.7"}, "box:1 has python 2.7, and", True),
        ({"package": "9"}, "box:1 has version 9 of this package", False),
        ({"weights": {}, "error": "x does not exist."}, "box:1 lacks the weights (x does", False),
        ({"weights": {"vae": "2"}}, "box:1 has another vae than this machine", False),
    ],
)
def test_a_worker_that_differs_is_named(changes, sentence, is_used):
    said = []
    state, member = books(said), ray_workers._Member(None)
    ray_workers._admit(state, member, answer(**changes))
    assert bool(state.free) == is_used
    assert [line[: len(sentence)] for line in said] == ([sentence] if sentence else [])


def test_a_lost_workers_job_has_three_tries():
    said = []
    state = books(said)
    task = batch.Task("0", None)
    member = ray_workers._Member(None, "box:1", task)
    for tries in (1, 2):
        state.tries["0"], state.lost = tries, 0
        assert list(ray_workers._lose(state, member, RuntimeError())) == []
        assert state.queue.popleft() is task
    state.tries["0"], state.lost = 3, 0
    (ended,) = ray_workers._lose(state, member, RuntimeError())
    assert (ended.tries, ended.worker) == (3, "box:1")
    assert "Its worker was lost 3 times" in ended.error
    assert not state.queue


def test_workers_that_only_end_are_not_started_for_ever():
    state = books([])
    member = ray_workers._Member(None)
    with pytest.raises(OptionError, match="workers were lost and made nothing"):
        for _ in range(100):
            list(ray_workers._lose(state, member, SkyReelsError("gone")))
    assert state.lost < 10


def test_the_process_of_a_worker_answers_with_a_clip_or_a_sentence(tmp_path):
    def prepare(_):
        def make(arguments):
            if arguments.seed:
                raise SkyReelsError("no such seed")
            arguments.out.write_bytes(arguments.image.read_bytes())

        return make

    worker = ray_workers.Worker(None, prepare, lambda _: {"vae": "1"})
    told = worker.look()
    assert (told["weights"], told["error"]) == ({"vae": "1"}, "")
    made = worker.make(Namespace(seed=0, image=Path("x/a.png")), {"image": ("a.png", b"pixels")})
    assert (made["clip"], made["error"]) == (b"pixels", "")
    failed = worker.make(Namespace(seed=1, image=Path("x/a.png")), {})
    assert (failed["clip"], failed["error"]) == (b"", "no such seed")
