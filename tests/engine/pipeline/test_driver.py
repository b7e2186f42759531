"""A thousand workers of which some are lost, in a simulated time: each clip once."""

import pytest
from comfyui_skyreels.skyreels.pipeline.batch import MAX_TRIES
from support.simulated import Costs, simulate

CLIPS = 3_000


def check_each_clip_once(folder, *outcomes):
    written = [digest for outcome in outcomes for digest in outcome.written]
    assert len(written) == len(set(written))
    jobs = outcomes[-1].summary["jobs"]
    assert [job["line"] for job in jobs] == list(range(1, CLIPS + 1))
    there = {path.name: path.read_text() for path in folder.iterdir() if path.suffix == ".mp4"}
    assert there == {f"{digest}.mp4": digest for digest in written}
    assert [job["file"] for job in jobs if not job["error"]] == sorted(there)
    return jobs


@pytest.mark.parametrize("seed", range(2))
def test_a_thousand_workers_of_which_one_in_a_hundred_is_lost_an_hour(tmp_path, seed):
    outcome = simulate(tmp_path, CLIPS, 1000, Costs(clip=1800.0), seed=seed)
    jobs = check_each_clip_once(tmp_path, outcome)
    assert all(job["error"] is None for job in jobs)
    workers = outcome.workers
    # 1,000 workers for one and a half hours
    assert 5 <= workers.lost <= 35
    assert workers.started == 1000 + workers.lost
    assert max(job["tries"] for job in jobs) <= MAX_TRIES
    # a worker that was lost when its clip was just finished costs that clip
    assert sum(job["tries"] - 1 for job in jobs) == workers.lost
    assert outcome.driver_share < 0.02
    assert workers.useful / workers.now / 1000 > 0.7  # the last round makes what was lost


def test_a_task_that_is_lost_three_times_is_said_and_the_others_go_on(tmp_path):
    costs = Costs(clip=60.0, start=1.0, load=0.0, notice=1.0)
    outcome = simulate(tmp_path, CLIPS, 1000, costs, lost_per_hour=20.0)
    jobs = check_each_clip_once(tmp_path, outcome)
    failed = [job for job in jobs if job["error"]]
    assert 0 < len(failed) < CLIPS / 20
    for job in failed:
        assert (job["tries"], job["error"][:32]) == (MAX_TRIES, "Its worker was lost 3 times: loo")
    assert outcome.summary["made"] == CLIPS - len(failed)


def test_a_driver_that_is_killed_goes_on_where_it_was(tmp_path):
    costs = Costs(clip=600.0)
    first = simulate(tmp_path, CLIPS, 1000, costs, stop_after=1234)
    then = simulate(tmp_path, CLIPS, 1000, costs, seed=1, stop_after=1000)
    last = simulate(tmp_path, CLIPS, 1000, costs, seed=2)
    check_each_clip_once(tmp_path, first, then, last)
    assert last.summary["found"] == 1234 + 1000
    assert last.summary["made"] == CLIPS - 2234


def test_the_driver_is_the_limit_where_clips_are_short(tmp_path):
    costs = Costs(clip=2.0, spread=0.0, load=0.0, start=0.0)
    outcome = simulate(tmp_path, CLIPS, 1000, costs, lost_per_hour=0.0)
    per_clip = costs.send + costs.take + costs.wait + costs.wait_each * 1000
    assert outcome.driver_share > 0.98
    assert outcome.workers.now == pytest.approx(CLIPS * per_clip, rel=0.1)
