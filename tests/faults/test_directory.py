"""Two runs on one directory, and directories that cannot be used (T20, T20b)."""

from __future__ import annotations

import os
import time

import pytest

from corl_jax.config import files as config_files
from corl_jax.errors import InputError
from corl_jax.runs import directory as run_directory
from corl_jax.runs.locking import lock_directory
from corl_jax.runs.log import StepLog
from tests.faults.harness import PATIENCE, SUPERVISED, Job, outcome, unsound
from tests.support import tiny_runs

NOBODY = 65534


@pytest.mark.slow
def test_a_second_run_on_one_directory(model, rows, tmp_path, one_device, straight, monkeypatch,
                                       figure):  # fmt: skip
    """Started in the middle of the first, twice; then the first is killed and its lock is free."""
    job = Job.make(tmp_path, model, rows, **SUPERVISED)
    seconds, codes = [], []
    original = StepLog.add

    def add(self, step, result):
        if step in (2, 4):
            second = Job(job.output, job.config)
            began = time.monotonic()
            codes.append(second.start().wait(PATIENCE))
            seconds.append(time.monotonic() - began)
        return original(self, step, result)

    monkeypatch.setattr(StepLog, "add", add)
    assert job.here() == 0
    assert codes == [2, 2], job.log
    assert job.log.count(f"is being written by process {os.getpid()}") == 2
    assert "checkpoint of" not in job.log
    lost = outcome(job) != straight
    figure(
        "T20", fault="second run on a directory in use", tries=2, losses=lost + len(unsound(job)),
        note=f"exit 2 after {max(seconds):.1f} s",
    )  # fmt: skip
    assert not lost and not unsound(job)


@pytest.mark.slow
def test_a_lock_does_not_outlive_its_process(model, rows, tmp_path, straight, figure):
    job = Job.make(tmp_path, model, rows, **SUPERVISED)
    for kill in range(3):
        job.start()
        assert job.until(lambda: max(job.steps(), default=0) > kill)  # noqa: B023
        job.kill()
    job.finish()
    lost = outcome(job) != straight
    figure("T20", fault="lock of a killed run", tries=3, losses=lost)
    assert not lost


def test_a_second_run_on_one_directory_of_checkpoints(model, rows, tmp_path, one_device, capsys,
                                                     figure):  # fmt: skip
    shared = tmp_path / "shared"
    partial = shared / "1.orbax-checkpoint-tmp"  # the first one's save under way
    partial.mkdir(parents=True)
    job = Job.make(tmp_path, model, rows, **SUPERVISED)
    with lock_directory(shared):
        code = job.here(f"checkpoint.directory={shared}")
    figure("T20", fault="second run on checkpoints in use", tries=1, losses=code != 2)
    assert code == 2 and partial.exists()
    assert f"checkpoint.directory: {shared} is being written by" in capsys.readouterr().err


def opened(root) -> str:
    """What the run directory says when it is opened."""
    tree = tiny_runs.options("weights", "rows.parquet", root)
    with (
        pytest.raises(InputError) as error,
        run_directory.open_run_directory(config_files.validate(tree, "test")),
    ):
        pass
    (line,) = error.value.problems
    return line


def test_directories_that_cannot_be_used(tmp_path, figure):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked/.lock").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "file" / "nowhere")
    cases = ["file", "file/below", "loop", "loop/below", "locked", "dangling", "x" * 300]
    lines = [opened(tmp_path / case) for case in cases] + [opened("/proc/run")]
    closed, written = tmp_path / "closed", tmp_path / "written"
    closed.mkdir(mode=0o555)
    tree = tiny_runs.options("weights", "rows.parquet", written)
    with run_directory.open_run_directory(config_files.validate(tree, "test")):
        pass
    (written / ".lock").chmod(0o666)
    tmp_path.chmod(0o755)
    for folder in tmp_path.parents[:3]:
        folder.chmod(0o755)
    root = os.geteuid() == 0  # whom no permission stops
    if root:
        os.seteuid(NOBODY)
    else:
        written.chmod(0o555)
    try:
        lines += [opened(closed), opened(closed / "below"), opened(written)]
    finally:
        if root:
            os.seteuid(0)
        written.chmod(0o755)
    figure("T20b", fault="unusable output_dir", tries=len(lines), losses=0)
    assert all("name a" in line or "choose another" in line for line in lines), lines


def test_a_symbolic_link_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    tree = tiny_runs.options("weights", "rows.parquet", tmp_path / "link")
    with run_directory.open_run_directory(config_files.validate(tree, "test")):
        assert "is being written" in opened(tmp_path / "real")
