"""kill -9, anywhere: the same command goes on and comes to the same bits (T1)."""

from __future__ import annotations

import random
import time

import pytest

from tests.faults.harness import PATIENCE, SUPERVISED, Job, outcome

# What one more kill falls into, as (object, function, which call of it). Two updates are made on
# each rollout, so an even call is the second of its iteration.
PHASES = {
    "before the first checkpoint": ("corl_jax.runs.log:StepLog", "add", 1),
    "evaluation before training": ("corl_jax.train.reports", "evaluate", 1),
    "rollout": ("corl_jax.train.iteration", "sample", 4),
    "reward": ("corl_jax.train.iteration", "score_rollout", 4),
    "old log-probs": ("corl_jax.train.iteration", "make_batch", 2),
    "between two updates of one rollout": ("corl_jax.train.run:Run", "train_step", 4),
    "log of a step": ("corl_jax.runs.log:JsonLines", "write", 1),
    "picture grid": ("corl_jax.runs.pictures", "save_png", 1),
    "evaluation": ("corl_jax.train.reports", "evaluate", 1),
    "start of a save": ("corl_jax.runs.fingerprints", "make_record", 2),
    "restoring": ("corl_jax.runs.fingerprints", "list_damaged_leaves", 1),
    "wait for the last save": ("corl_jax.runs.saving:Saver", "finish", 1),
    "export, before it has its name": ("corl_jax.atomic_files", "_move_folder", 1),
    "summary": ("corl_jax.runs.directory:RunDir", "write_json", 1),
}

STEPS = 3

DIES = """
import functools, importlib, os
module, _, owner = {where!r}.partition(":")
target = importlib.import_module(module)
target = getattr(target, owner) if owner else target
calls = 0
def dying(original):
    @functools.wraps(original)
    def call(*args, **options):
        global calls
        calls += 1
        if calls == {call}:
            os.kill(os.getpid(), 9)
        return original(*args, **options)
    return call
if {name!r} == "train_step":  # a field of each Run
    from corl_jax.train import build
    steps = build.make_steps
    def make_steps(*args):
        train_step, *rest = steps(*args)
        return dying(train_step), *rest
    build.make_steps = make_steps
else:
    setattr(target, {name!r}, dying(getattr(target, {name!r})))
"""


class Kills:
    """Kills of one job, and what each cost."""

    def __init__(self, job: Job, seed: int):
        self.job, self.random = job, random.Random(seed)
        self.tries = self.hits = 0
        self.lost: list[int] = []
        self.restarts: list[float] = []
        self.seconds = 0.0

    def _start(self) -> int:
        """Starts the command; where its part of the log begins."""
        offset = len(self.job.log)
        self.job.start()
        return offset

    def _kill(self) -> None:
        self.job.kill()
        self.tries += 1
        self.hits += bool(self.job.partial())
        self.lost.append(max(0, self.job.logged() - max(self.job.steps(), default=0)))

    def in_a_save(self) -> None:
        """At a time drawn from the duration of one of the next saves."""
        began = time.monotonic()
        offset = self._start()
        assert self.job.until(lambda: "\nstep " in "\n" + self.job.log[offset:]), self.job.log
        self.restarts.append(time.monotonic() - began)
        newest = max(self.job.steps(), default=0) + self.random.randrange(2)
        self.job.until(lambda: max(self.job.steps(), default=0) >= newest and self.job.partial())
        time.sleep(self.random.uniform(0, 0.05))
        self._kill()
        self.seconds += time.monotonic() - began

    def at_random(self, longest: float) -> None:
        """At a time drawn from that of a restart and a few steps, of which STEPS are the most."""
        began, logged = time.monotonic(), self.job.logged()
        end = began + self.random.uniform(0, longest)
        self._start()
        self.job.until(lambda: time.monotonic() >= end or self.job.logged() >= logged + STEPS)
        self._kill()
        self.seconds += time.monotonic() - began

    @property
    def note(self) -> str:
        parts = [f"steps lost: mean {sum(self.lost) / len(self.lost):.2f}, max {max(self.lost)}"]
        if self.restarts:
            mean = sum(self.restarts) / len(self.restarts)
            parts.append(f"restart to first step: mean {mean:.1f} s")
        return ", ".join(parts)


def mismatches(job: Job, straight: dict[str, str]) -> list[str]:
    """Parts of the outcome that differ from those of the run that nobody disturbed."""
    job.finish()
    found = outcome(job)
    return [name for name, value in straight.items() if found[name] != value]


def killed(make, figure, saves: int, randomly: int, hits: int) -> None:
    """`hits`: how many kills have to fall into a save, of four times `saves` at most."""
    straight = make("straight")
    assert straight.here() == 0
    expected = outcome(straight)
    job = make("killed")
    mid = Kills(job, seed=1)
    for _ in range(saves):
        mid.in_a_save()
    while mid.hits < hits and mid.tries < 4 * saves:  # a save may be short on another machine
        mid.in_a_save()
    elsewhere = Kills(job, seed=2)
    longest = sum(mid.restarts) / len(mid.restarts) + 4
    for _ in range(randomly):
        elsewhere.at_random(longest)
    assert not (job.output / "summary.json").exists(), "the run was over before the last kill"
    wrong = mismatches(job, expected)
    assert mid.hits >= hits, f"{mid.hits} of {mid.tries} kills fell into a save"
    for fault, kills in (("kill -9 in a save", mid), ("kill -9 at random", elsewhere)):
        figure(
            "T1", fault=fault, tries=kills.tries, hits=kills.hits, losses=len(wrong),
            note=kills.note, seconds=kills.seconds,
        )  # fmt: skip
    assert not wrong


def test_two_kills(model, rows, tmp_path, figure):
    def make(name):
        changes = SUPERVISED | {"train": {"max_steps": 28, "prompts_per_step": 8}}
        return Job.make(tmp_path / name, model, rows, devices=8, **changes)

    killed(make, figure, saves=1, randomly=1, hits=1)


@pytest.mark.slow
def test_forty_kills(model, rows, tmp_path, figure):
    def make(name):
        changes = {"train": {"max_steps": 150, "prompts_per_step": 8}}
        return Job.make(tmp_path / name, model, rows, devices=8, **changes)

    killed(make, figure, saves=20, randomly=20, hits=15)


@pytest.mark.slow
def test_a_kill_in_every_phase(model, rows, tmp_path, figure):
    """Two updates on each rollout: a kill between them repeats the whole iteration."""
    changes = {
        "train": {"max_steps": 8, "micro_batch": 2},
        "checkpoint": {"every": 3},
        "eval": {"suite": "rewards", "rows": 4, "batch_prompts": 4, "every": 2},
        "log": {"images_every": 2},
    }
    straight = Job.make(tmp_path / "straight", model, rows, **changes)
    straight.finish()
    job = Job.make(tmp_path / "killed", model, rows, **changes)
    hits = 0
    for where, name, call in PHASES.values():
        job.driver = DIES.format(where=where, name=name, call=call)
        code = job.start().wait(PATIENCE)
        hits += code == -9
        assert code in (-9, 0), job.log[-3000:]
    job.driver = ""
    wrong = mismatches(job, outcome(straight))
    figure("T1", fault="kill -9 in each phase", tries=len(PHASES), hits=hits, losses=len(wrong))
    assert not wrong and hits == len(PHASES), (wrong, hits)
