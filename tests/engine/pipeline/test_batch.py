"""Batches without Ray: each line once, by its contents, and what stops or continues them."""

import errno
import itertools
import json
import os
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from comfyui_skyreels.skyreels import cli
from comfyui_skyreels.skyreels.builtin import builtin_transformer
from comfyui_skyreels.skyreels.errors import DependencyError, OptionError, SkyReelsError
from comfyui_skyreels.skyreels.media import read_clip
from comfyui_skyreels.skyreels.pipeline import batch, driver, ray_workers
from comfyui_skyreels.skyreels.pipeline.receipt import read_receipt
from comfyui_skyreels.skyreels.runtime import TorchRuntime
from PIL import Image
from support import lora
from support.forked import WITHOUT_TEXT_ENCODER, forks

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
    job = {"prompt": PROMPT, "seed": 3, "steps": 1, "width": 128, "height": 64}
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


def test_a_job_has_loras_of_its_own_and_the_next_one_has_none(capsys, tmp_path):
    parts = lora.draw_parts(builtin_transformer(runtime=TorchRuntime()).config)
    path = lora.write("musubi-tuner", parts, tmp_path)
    name = str(path.relative_to(tmp_path))
    base = {"prompt": PROMPT, "steps": 1, "width": 128, "height": 64}
    jobs = [base, {**base, "lora": f"{name}:0.2"}, {**base, "lora": [f"{name}:0.1", f"{name}:0.1"]},
            {**base, "seed": 1}]  # fmt: skip
    _, told, err = run(capsys, write(tmp_path / "jobs.jsonl", *jobs), tmp_path / "out")
    assert [job["error"] for job in told["jobs"]] == [None] * 4
    assert err.count("(musubi-tuner):") == 3
    clips_ = [(tmp_path / "out" / job["file"]).read_bytes() for job in told["jobs"]]
    assert len(set(clips_)) == 4
    options = [f"--{key}={value}" for key, value in base.items()]
    for number, more in ((1, [f"--lora={path}:0.2"]), (3, ["--seed=1"])):
        single = tmp_path / f"{number}.mp4"
        assert cli.main(["generate", "--out", str(single), "--frames=5", *options, *more]) == 0
        assert single.read_bytes() == clips_[number]


def test_a_job_continues_a_clip(capsys, tmp_path):
    first = tmp_path / "first.mp4"
    size = ["--width", "48", "--height", "32", "--steps", "1"]
    words = ["generate", "--prompt", PROMPT, "--frames", "9", "--out", str(first), *size]
    assert cli.main(words) == 0
    job = {"prompt": PROMPT, "extend": "first.mp4", "frames": 9}
    jobs = [job, {**job, "overlap": 5}, {**job, "overlap": 3}, {**job, "width": 48}]
    # the clip has a size, whatever the command's is
    _, told, _ = run(capsys, write(tmp_path / "jobs.jsonl", *jobs), tmp_path / "out")
    errors = [job["error"] for job in told["jobs"]]
    assert errors[:2] == [None, None]
    assert "3" in errors[2]
    assert "leave --width and --height out" in errors[3]
    found = [read_clip(tmp_path / "out" / job["file"]) for job in told["jobs"][:2]]
    assert [tuple(clip.shape) for clip in found] == [(17, 32, 48, 3), (13, 32, 48, 3)]
    assert (
        torch.equal(found[0][:8], read_clip(first)[:8])
        or (found[0][:8] - read_clip(first)[:8]).abs().mean() < 0.05
    )


def test_a_lora_of_the_command_is_of_lines_without_one_and_is_part_of_names(tmp_path):
    config = builtin_transformer(runtime=TorchRuntime()).config
    (tmp_path / "b").mkdir()
    first, second = (
        lora.write("musubi-tuner", lora.draw_parts(config, seed), folder)
        for seed, folder in enumerate((tmp_path, tmp_path / "b"))
    )
    job = {"prompt": PROMPT}
    own = [
        {**job, "lora": f"{path}:{strength}"} for path in (first, second) for strength in (1, 0.5)
    ]
    found = names(tmp_path, [job, *own])
    assert len(set(found)) == 5
    assert names(tmp_path, [job, own[2]], "--lora", first) == [found[1], found[3]]


def test_a_lora_that_is_another_one_where_the_clip_is_made_is_refused(tmp_path):
    (task,) = [line.task for line in lines_of(tmp_path, {"prompt": PROMPT})]
    task.arguments.lora_digests = ["0"]
    make = cli.batch.batch_maker(task.arguments)
    with pytest.raises(OptionError, match="not what the batch began with"):
        make(task.arguments)


BAD = {
    '{"prompt": "a", "overlap": 5}': "belong to --extend CLIP",
    '{"prompt": "a", "extend": "gone.mp4"}': "gone.mp4 does not exist",
    '{"prompt": "a", "lora": [1]}': "lora is [1]: give a text",
    '{"prompt": "a", "lora": "gone.safetensors"}': "gone.safetensors does not exist",
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
    return [line.task.digest for line in lines_of(tmp_path, *jobs, options=options)]


def lines_of(tmp_path: Path, *jobs: dict, options=()) -> list[batch.Line]:
    path = write(tmp_path / "jobs.jsonl", *jobs)
    words = ["batch", path, "--out", tmp_path, *SMALL, *options]
    arguments = cli.build_parser().parse_args([str(word) for word in words])
    lines = cli.batch.read_jobs(arguments, cli.batch.fingerprints(arguments))
    assert [line.error for line in lines] == [""] * len(jobs)
    return lines


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
KILLED = f"""
import os, signal, sys
from skyreels import cli, media
{WITHOUT_TEXT_ENCODER}
cli.batch.encode_prompts = lambda *_: (prompt, prompt)
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


def test_the_summary_is_there_while_the_batch_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(batch, "SUMMARY_PERIOD_S", 0.0)
    monkeypatch.setattr(batch, "SUMMARY_SHARE", float("inf"))
    lines = [batch.Line(n, batch.Task(f"{n}", Namespace())) for n in range(1, 4)]
    seen = []

    def work(tasks):
        for task in tasks:
            yield batch.Ended(task.digest, 1.0, "box", 1)
            seen.append(json.loads((tmp_path / batch.SUMMARY).read_text()))

    batch.run_lines(lines, tmp_path, work, lambda line: None)
    assert [(told["made"], told["left"]) for told in seen] == [(1, 2), (2, 1), (3, 0)]
    assert [path.name for path in tmp_path.iterdir()] == [batch.SUMMARY]


def test_a_summary_that_takes_long_is_written_seldom(tmp_path, monkeypatch):
    clock, written = [0.0], []

    def write_slowly(*_):
        clock[0] += 5.0
        written.append(clock[0])

    monkeypatch.setattr(batch.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(batch, "_write_summary", write_slowly)

    def work(tasks):
        for task in tasks:
            clock[0] += 1.0
            yield batch.Ended(task.digest, 1.0, "box", 1)

    lines = [batch.Line(n, batch.Task(f"{n:032x}", Namespace())) for n in range(1200)]
    batch.run_lines(lines, tmp_path, work, lambda line: None)
    assert len(written) == 1200 // 500 + 2  # once in 500 s, and at the end


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


# --- jobs for Wiro ------------------------------------------------------------------------------


REMOTE = {"backend": "remote", "image": "a.png", "prompt": "a fox"}
BAD_REMOTE = {
    "seed": ({"seed": 1}, "seed is for clips that are made here"),
    "picture": ({"image": None}, "starts from a picture"),
    "prompt": ({"prompt": None}, "There is no prompt"),
    "size": ({"width": 64}, "64x544 is not made on Wiro: use 960x544 or 544x960"),
    "frames": ({"frames": 18}, "18"),
    "backend": ({"backend": "auto"}, "backend: invalid choice"),
}


def remote_lines(tmp_path, *jobs, options=("--wiro-limit", "2")):
    save_picture(tmp_path / "a.png", 1)
    cleaned = [{k: v for k, v in job.items() if v is not None} for job in jobs]
    path = write(tmp_path / "jobs.jsonl", *cleaned)
    words = ["batch", path, "--out", tmp_path, *options]
    arguments = cli.build_parser().parse_args([str(word) for word in words])
    return cli.batch.read_jobs(arguments, {})


def test_a_job_for_wiro_is_what_its_model_takes(tmp_path):
    upright = {"width": 544, "height": 960}
    jobs = [REMOTE, REMOTE | {"steps": 30, "cfg": 6}, REMOTE | {"steps": 20}, REMOTE | upright]
    lines = remote_lines(tmp_path, *jobs)
    assert [line.error for line in lines] == [""] * 4
    tasks = [line.task for line in lines]
    assert all(task.is_remote for task in tasks)
    assert tasks[0].digest == tasks[1].digest
    assert len({task.digest for task in tasks}) == 3
    given = tasks[0].arguments
    assert (given.prompt, given.width, given.height, given.frames) == (
        "FPS-24, a fox",
        960,
        544,
        97,
    )
    assert tasks[0].files == {"image": batch.file_digest(tmp_path / "a.png")}


@pytest.mark.parametrize("name", BAD_REMOTE)
def test_what_wiro_does_not_make_is_refused(tmp_path, name):
    changes, sentence = BAD_REMOTE[name]
    (line,) = remote_lines(tmp_path, {**REMOTE, **changes})
    assert sentence in line.error


def test_without_a_limit_no_job_goes_to_wiro(tmp_path, capsys):
    (line,) = remote_lines(tmp_path, REMOTE, options=())
    assert "cost money, and there is no limit: give --wiro-limit" in line.error
    jobs = write(tmp_path / "jobs.jsonl", {"prompt": PROMPT})
    code, told, _ = run(capsys, jobs, tmp_path / "out", "--wiro-limit", "much")
    assert (code, "'much' is not an amount" in told["error"]) == (1, True)


def test_jobs_for_wiro_are_made_beside_the_others(tmp_path, capsys, monkeypatch):
    from comfyui_skyreels.skyreels.pipeline import remote

    calls = itertools.count()

    def call(self, command, *words):
        assert "--param=prompt=FPS-24, a fox" in words
        clip = tmp_path / f"paid-{next(calls)}.mp4"  # several are made at the same time
        clip.write_bytes(b"paid")
        return {"price": "0.40", "was_sent": False, "cost": "0.40", "files": [str(clip)]}

    monkeypatch.setattr(remote.RemoteRuns, "_call", call)
    save_picture(tmp_path / "a.png", 1)
    wide = {**REMOTE, "width": 960, "height": 544, "frames": 97}
    jobs = write(tmp_path / "jobs.jsonl", {"prompt": PROMPT}, wide, {**wide, "steps": 9})
    code, told, _ = run(capsys, jobs, tmp_path / "out", "--wiro-limit", "0.50")
    assert (code, told["made"], told["failed"]) == (1, 2, 1)
    assert {job["worker"] for job in told["jobs"]} == {"this process", "wiro.ai"}
    assert (tmp_path / "out" / told["jobs"][1]["file"] if told["jobs"][1]["file"] else
            tmp_path / "out" / told["jobs"][2]["file"]).read_bytes() == b"paid"  # fmt: skip
    assert "of --wiro-limit $0.50 the clips of this folder have taken $0.40" in str(told)


# --- what the driver makes of its workers' answers ----------------------------------------------


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
    assert ray_workers.is_fit(answer(**changes), {"vae": "1"}, said.append) == is_used
    assert [line[: len(sentence)] for line in said] == ([sentence] if sentence else [])


class Rehearsed:
    """`Workers` that do what was written down: each answers, in turn, or is lost.

    script: of each worker that is started, what is heard of it.
    """

    def __init__(self, *script: list):
        self.script, self.heard, self.sent = [*script], [], []

    def start(self):
        member = driver.Member(iter(self.script.pop(0)))
        self.heard.append(member)
        return member

    def send(self, member, task):
        if task.digest == "unreadable":
            raise SkyReelsError("a.png is gone")
        self.sent.append((member.name, task.digest))
        self.heard.append(member)

    def hear(self):
        member = self.heard.pop(0)
        return [(member, next(member.handle))]


READY, GONE = {"name": "box"}, driver.Lost("gone")
MADE = {"clip": b"", "error": "", "seconds": 1.0}


def drive(workers, digests, count=1, admit=lambda found: True):
    said, saved = [], []
    ended = driver.drive(
        [batch.Task(digest, None) for digest in digests], workers, count, admit=admit,
        save=lambda task, clip: saved.append(task.digest), tell=said.append, check=lambda: None,
    )  # fmt: skip
    return list(ended), saved, said


def test_a_lost_workers_job_is_the_next_and_has_three_tries():
    lost = [READY, GONE]
    workers = Rehearsed(lost, lost, lost, [READY, MADE, MADE])
    (first, *others), saved, said = drive(workers, ["0", "1", "2"])
    assert (first.digest, first.tries, first.worker) == ("0", 3, "box")
    assert "Its worker was lost 3 times" in first.error
    assert [(each.digest, each.tries, each.error) for each in others] == [
        ("1", 1, ""),
        ("2", 1, ""),
    ]
    assert saved == ["1", "2"]
    assert [digest for _, digest in workers.sent] == ["0", "0", "0", "1", "2"]
    assert said == ["box was lost; 0.mp4 is tried again."] * 2


def test_workers_that_only_end_are_not_started_for_ever():
    with pytest.raises(OptionError, match=r"workers were lost and made nothing.*\(gone\)"):
        drive(Rehearsed(*[[GONE]] * 10), ["0"], count=1)


def test_a_worker_that_makes_something_forgives_those_that_were_lost():
    script = [[GONE], [GONE], [GONE], [READY, MADE, GONE], [GONE], [GONE], [READY, MADE]]
    ended, saved, _ = drive(Rehearsed(*script), ["0", "1"])
    assert saved == ["0", "1"]
    assert [each.tries for each in ended] == [1, 2]


def test_a_task_that_cannot_be_sent_ends_and_its_worker_goes_on():
    (bad, good), saved, _ = drive(Rehearsed([READY, MADE]), ["unreadable", "1"])
    assert (bad.error, bad.worker, bad.tries) == ("a.png is gone", "this process", 1)
    assert (good.digest, saved) == ("1", ["1"])


def test_without_a_worker_that_is_used_the_batch_ends():
    workers = Rehearsed([{"name": "a"}], [{"name": "b", "is": "fit"}, MADE, MADE])
    assert drive(workers, ["0", "1"], 2, admit=lambda found: "is" in found)[1] == ["0", "1"]
    with pytest.raises(OptionError, match="No worker can make a clip, for the reasons above"):
        drive(Rehearsed([READY], [READY]), ["0", "1"], 2, admit=lambda found: False)


def test_a_folder_that_fills_up_ends_the_batch_with_what_is_whole(tmp_path, monkeypatch):
    replace_, room = os.replace, [2]  # clips that fit

    def replace_while_there_is_room(part, path):
        if str(path).endswith(".mp4"):
            if not room[0]:
                full()
            room[0] -= 1
        replace_(part, path)

    monkeypatch.setattr(os, "replace", replace_while_there_is_room)
    lines = [batch.Line(n, batch.Task(f"{n:032x}", None)) for n in range(4)]

    def work(tasks):
        return driver.drive(
            tasks, Rehearsed([READY, *[MADE] * 4]), 1, admit=lambda found: True,
            save=lambda task, clip: batch.write_whole(task.place(tmp_path), clip),
            tell=lambda line: None, check=lambda: None,
        )  # fmt: skip

    with pytest.raises(OSError, match="No space"):
        batch.run_lines(lines, tmp_path, work, lambda line: None)
    assert clips(tmp_path) == [f"{n:032x}.mp4" for n in range(2)]
    summary = json.loads((tmp_path / batch.SUMMARY).read_text())
    assert (summary["made"], summary["left"]) == (2, 2)


def test_no_more_workers_are_started_than_there_are_tasks():
    workers = Rehearsed([READY, MADE])
    assert drive(workers, ["0"], count=5)[1] == ["0"]


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
