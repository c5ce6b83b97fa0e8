"""A disk that is full: said at the step that met it, borne, and never taken for a save (T7)."""

from __future__ import annotations

import json
import resource
import shutil
import time
from types import SimpleNamespace

import pytest

from corl_jax.errors import InputError, SaveError
from corl_jax.runs import checkpoints as run_checkpoints
from corl_jax.runs.checkpoints import Checkpoints
from corl_jax.runs.log import StepLog
from corl_jax.runs.saving import Saver
from corl_jax.train import export
from tests.faults.harness import PATIENCE, SUPERVISED, Job, outcome

# Writes that were under way beside a failed one find the event loop closed: Python complains.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

SMALL = 64 * 1024  # bytes: less than the arrays of a checkpoint, more than any log

FULL = """
import os, resource, subprocess, time
from corl_jax.runs.checkpoints import Checkpoints
from corl_jax.runs.log import StepLog
# The console is behind a pipe, so that the test can read it.
os.dup2(subprocess.Popen(["cat"], stdin=subprocess.PIPE).stdin.fileno(), 2)
opened, original, begin = [], StepLog.add, Checkpoints.__enter__
def enter(self):
    opened.append(self)
    return begin(self)
def add(self, step, result):
    while step in ({full_from}, {room_again}) and opened[-1].saving:
        time.sleep(0.01)
    if step in ({full_from}, {room_again}):
        room = 0 if step == {full_from} else -1
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, -1))
    return original(self, step, result)
StepLog.add, Checkpoints.__enter__ = add, enter
"""  # not a byte for any file: checkpoints, logs and pictures


@pytest.fixture
def job(model, rows, tmp_path, one_device):
    return Job.make(tmp_path, model, rows, **SUPERVISED)


@pytest.fixture
def disk(monkeypatch):
    """Lets files grow no more from one logged step on, until another; Python gets EFBIG."""

    opened, original, begin = [], StepLog.add, Checkpoints.__enter__

    def enter(self):
        opened.append(self)
        return begin(self)

    def limit(full_from: int, room_again: int = 99):
        def add(self, step, result):
            while step in (full_from, room_again) and opened[-1].saving:
                time.sleep(0.01)  # a save of before has the disk of before
            if step == full_from:
                resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL, -1))
            elif step == room_again:
                resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
            return original(self, step, result)

        monkeypatch.setattr(StepLog, "add", add)
        monkeypatch.setattr(Checkpoints, "__enter__", enter)

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))


def reported(text: str) -> dict[int, int]:
    """Step that could not be saved -> steps logged before the report."""
    found, logged = {}, 0
    for line in text.splitlines():
        if line.startswith("step "):
            logged = int(line.split()[1].split("/")[0])
        elif "could not be written" in line:
            found[int(line.partition("checkpoint of step ")[2].split()[0])] = logged
    return found


def test_training_goes_on_while_the_disk_is_full(job, straight, disk, capsys, figure):
    disk(full_from=2, room_again=4)
    assert job.here() == 0
    text = capsys.readouterr().err
    late = reported(text)
    assert late.keys() == {2, 3} and all(logged <= step + 1 for step, logged in late.items()), text
    assert "1 of at most 3 failures in a row" in text and "2 of at most 3 failures" in text
    assert "checkpoint of step 2 saved" not in text and "checkpoint of step 4 saved" in text
    assert job.steps() == [5, 6] and not job.partial()
    lost = outcome(job) != straight
    figure(
        "T7", fault="disk full for two of six saves", tries=2, hits=len(late), losses=lost,
        note=f"reported {max(logged - step for step, logged in late.items())} step(s) later",
    )  # fmt: skip
    assert not lost


@pytest.mark.parametrize(
    "changes", [{}, pytest.param({"log": {"images_every": 1}}, marks=pytest.mark.slow)]
)
def test_training_goes_on_while_nothing_can_be_written(
    model, rows, tmp_path, changes, straight, figure
):
    driver = FULL.format(full_from=2, room_again=4)
    job = Job.make(tmp_path, model, rows, driver=driver, **SUPERVISED | changes)
    job.finish()
    assert job.steps() == [5, 6] and not job.partial()
    for what in ("metrics.jsonl", "tensorboard", *(["images"] if changes else [])):
        assert f"warning: {what}: cannot be written" in job.log, job.log
        assert f"\n{what}: can be written again" in job.log, job.log
    assert "2 of at most 3 failures" in job.log and "step None" not in job.log, job.log
    found = outcome(job)
    lost = [name for name, value in straight.items() if found[name] != value]
    if changes:  # of a picture that could not be written there is TensorBoard's copy alone
        lost.remove("images")
    figure("T7", fault="disk full for everything, two of six steps", tries=2, losses=len(lost))
    assert not lost


@pytest.mark.slow
def test_a_disk_that_stays_full_for_everything_ends_the_run(model, rows, tmp_path, figure):
    driver = FULL.format(full_from=2, room_again=99)
    job = Job.make(tmp_path, model, rows, driver=driver, **SUPERVISED)
    began = time.monotonic()
    code = job.start().wait(PATIENCE)
    assert code == 1 and job.steps() == [1] and job.logged() == 1, (code, job.log)
    figure(
        "T7", fault="disk full for everything, for good", tries=1, losses=0,
        note=f"exit 1 after {time.monotonic() - began:.0f} s",
    )  # fmt: skip
    job.driver = ""
    job.finish()


@pytest.mark.slow
def test_a_disk_that_stays_full_ends_the_run(job, straight, disk, capsys, figure):
    disk(full_from=2)
    assert job.here() == 1
    text = capsys.readouterr().err
    assert sorted(reported(text)) == [2, 3, 4] and "error: " in text, text
    assert "finished ones are intact, so make room" in text
    assert job.steps() == [1] and not job.partial()
    resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
    disk(full_from=99)
    assert job.here() == 0
    lost = outcome(job) != straight
    figure("T7", fault="disk full until room is made", tries=3, losses=lost)
    assert not lost


@pytest.mark.slow
def test_the_last_save_has_to_succeed(model, rows, tmp_path, one_device, straight, disk, figure):
    job = Job.make(tmp_path, model, rows, **SUPERVISED | {"checkpoint": {"every": 100}})
    disk(full_from=6)
    code = job.here()
    assert code == 1 and not job.steps() and not (job.output / "export").exists()
    resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
    disk(full_from=99)
    assert job.here() == 0
    lost = outcome(job) != straight
    figure("T7", fault="disk full at the last save", tries=1, losses=lost)
    assert not lost


@pytest.mark.slow
def test_an_export_without_room_is_made_up_for(job, straight, monkeypatch, capsys, figure):
    def full(*args, **options):
        raise InputError("export: cannot be written (No space left on device)")

    with monkeypatch.context() as patch:
        patch.setattr(export, "save_checkpoint", full)
        assert job.here() == 1
    assert "the same command exports again" in capsys.readouterr().err
    assert job.here() == 0
    lost = outcome(job) != straight
    figure("T7", fault="disk full at the export", tries=1, losses=lost)
    assert not lost


@pytest.mark.slow
def test_room_is_looked_for_before_anything_is_written(job, monkeypatch, capsys, figure):
    usage = shutil.disk_usage

    def little(path):
        return usage(path)._replace(free=100_000)

    monkeypatch.setattr(run_checkpoints.shutil, "disk_usage", little)
    assert job.here("checkpoint.max_failures=1") == 1
    text = capsys.readouterr().err
    assert "GiB and 9.31e-05 GiB are free" in text
    assert "warning: " in text and "may come to hold" in text and "has room for" in text
    assert not job.steps() and not job.partial()
    figure("T7", fault="too little room, seen before", tries=1, losses=0)


def saver(outcomes: list, limit: int) -> tuple[Saver, list[str]]:
    """A Saver of saves that end as listed: by a step, by an error, or not yet (None)."""

    def end():
        result = outcomes.pop(0) if outcomes else None
        if isinstance(result, str):
            raise SaveError(result)
        return result

    said: list[str] = []
    checkpoints = SimpleNamespace(poll=end, wait=end, save=lambda *args: True)
    return Saver(checkpoints, said.append, limit), said


def test_only_failures_in_a_row_add_up():
    one, said = saver(["a", 2, "b", None, "c"], limit=2)
    for _ in range(4):
        one.poll()
    assert [line[:10] for line in said] == ["warning: a", "checkpoint", "warning: b"]
    with pytest.raises(SaveError, match="c"):
        one.poll()


def test_the_last_failure_is_an_error_however_early_it_was_told():
    one, _ = saver(["a"], limit=3)
    one.poll()
    with pytest.raises(SaveError, match="a"):
        one.finish()
    one, said = saver([None, 4], limit=3)
    one.save(4, {}, {})
    one.finish()
    assert said == ["checkpoint of step 4 saved"]


@pytest.mark.slow
def test_a_reader_of_the_log_sees_what_was_saved(job, one_device, capsys):
    assert job.here("train.stop_after=1") == 0
    assert "checkpoint of step 1 saved" in capsys.readouterr().err
    record_path = job.checkpoints / "1/meta/metadata"
    assert json.loads(record_path.read_text())["run"]["metric_lines"] == 1
