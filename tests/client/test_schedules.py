"""Programs on one key whose Runs are lost, slow, late, refused or cut off, in any order.

Whatever happens: nobody gets the video of another job, no job is sent twice unasked, and each
attempt ends in the job's own task, in a plain refusal, or in a question.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from comfyui_skyreels.wiro_api.client import Client
from comfyui_skyreels.wiro_api.errors import (
    BalanceError,
    RunOutcomeUnknownError,
    TransportError,
    WiroError,
)
from comfyui_skyreels.wiro_api.jobs import Job, start
from comfyui_skyreels.wiro_api.journal import Journal
from comfyui_skyreels.wiro_api.signing import Credentials
from support.wiro_client import MODEL, PARAMETERS
from support.wiro_replies import URL
from support.wiro_sim import FATES, KilledError, Service, World

pytestmark = pytest.mark.usefixtures("calls_at_once")
#: fates of a Run that was not sent, or surely made nothing
FREE = ("never left", "refused")
SCHEDULES = 200
#: how far the clock of a machine is off
SKEWS_S = (600.0, -86_400.0)


@dataclass
class Program:
    """One program: what it runs, on which machine, and how its attempts have ended."""

    machine: int
    picture: bytes
    take: int
    steps: int
    ends: list[Any] = field(default_factory=list)

    @property
    def job(self) -> tuple[Any, ...]:
        return self.picture, self.take, self.steps

    @property
    def inputs(self) -> tuple[Any, ...]:
        return self.picture, self.steps

    def attempt(self, world: World, service: Service, folder: Path, fates: list[str]) -> None:
        def now() -> float:
            return 1.7e9 + world.now_s + SKEWS_S[self.machine]

        client = Client(
            Credentials("test-key"), base_url=URL, sleep=world.pause, clock=lambda: world.now_s,
            now=now, session=service.session(self, lambda: fates.pop(0) if fates else "answered"),
        )  # fmt: skip
        journal = Journal(folder / f"{self.machine}.sqlite", now=now)
        files = [("inputImage", ("a.png", self.picture, "image/png"))] if self.picture else []
        try:
            entry = start(
                client,
                journal,
                Job(MODEL, {**PARAMETERS, "steps": self.steps}, files, take=self.take),
            )
            self.ends.append(entry.taskid)
        except (KilledError, WiroError) as error:
            self.ends.append(error)


def play(seed: int, folder: Path) -> tuple[list[Program], Service]:
    """One schedule: two or three programs, one or two machines, up to three attempts each."""
    world = World(seed)
    dice = world.rng
    service = Service(world, reencodes=dice.random() < 0.1)
    has_files = dice.random() < 0.75
    pictures = (b"picture A", b"picture B") if has_files else (b"",)
    programs = [
        Program(
            machine=dice.randrange(dice.choice((1, 2))), picture=dice.choice(pictures),
            take=dice.choice((1, 1, 2)), steps=dice.choice((20, 30)) if not has_files else 30,
        )
        for _ in range(dice.choice((2, 2, 3)))
    ]  # fmt: skip
    for number in range(3):
        for program in programs:
            if number and isinstance(program.ends[-1], str):
                continue  # has its video
            fates = [dice.choice(FATES) for _ in range(3)]
            killed_at = world.now_s + (dice.uniform(0, 60) if dice.random() < 0.2 else 1e9)
            world.start(
                world.now_s + dice.choice((0.0, 0.0, dice.uniform(0, 40))),
                lambda p=program, f=fates: p.attempt(world, service, folder, f), killed_at,
            )  # fmt: skip
        world.play()
    return programs, service


def check(programs: list[Program], service: Service, folder: Path) -> None:
    makers = {sent.taskid: sent.who for sent in service.runs if sent.taskid}
    for program in programs:
        for end in program.ends:
            if not isinstance(end, str):
                plain = BalanceError | TransportError | RunOutcomeUnknownError | KilledError
                assert isinstance(end, plain), end
                assert not isinstance(end, TransportError) or not end.was_sent
                continue
            maker = makers[end]
            assert maker.inputs == program.inputs, "another job's video"
            if maker.machine == program.machine:
                assert maker.job == program.job, "another take's video"
        mine = [
            sent for sent in service.runs
            if (sent.who.machine, sent.who.job) == (program.machine, program.job)
        ]  # fmt: skip
        assert sum(sent.fate not in FREE for sent in mine) <= 1, "sent twice"
    for path in folder.glob("*.sqlite"):
        taskids = [entry.taskid for entry in Journal(path).newest(1000) if entry.taskid]
        assert len(taskids) == len(set(taskids)), "a task of two rows"


@pytest.mark.slow
def test_no_schedule_gives_a_wrong_video_or_pays_twice(tmp_path):
    found = asked = 0
    for seed in range(SCHEDULES):
        folder = tmp_path / str(seed)
        programs, service = play(seed, folder)
        try:
            check(programs, service, folder)
        except AssertionError as error:
            pytest.fail(f"schedule {seed}: {error}")
        answers = {
            sent.taskid for sent in service.runs if sent.fate in ("answered", "slow", "late")
        }
        for program in programs:
            last = program.ends[-1]
            found += isinstance(last, str) and last not in answers
            asked += isinstance(last, RunOutcomeUnknownError)
    assert found > SCHEDULES // 10, "lost Runs are found"
    assert asked > SCHEDULES // 10, "and some have to be asked about"
