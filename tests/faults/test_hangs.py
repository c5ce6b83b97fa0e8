"""T4, T22, T23: a run that hangs ends itself, and a run that is killed leaves nothing alive."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import psutil
import pytest

from corl_jax.data.dataset import Loader, LoaderOptions
from corl_jax.data.parquet import ParquetSource
from corl_jax.policies.janus.checkpoint import KIND
from corl_jax.weights.checkpoint import load_config, load_params
from tests.faults.harness import PATIENCE, SUPERVISED, Job
from tests.support import tiny_runs
from tests.support.tiny_models import tiny_parquet
from tests.support.tiny_runs import metric_lines, write_config

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}


def start(*arguments: str, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *arguments], env=ENVIRONMENT, text=True, stderr=subprocess.PIPE, **options
    )


def wait_until(condition: Callable[[], bool], process: subprocess.Popen, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end, "took too long"
        time.sleep(0.05)


# ---- the watchdog alone

WATCHED = """
import ctypes, sys, threading, time
from pathlib import Path
from corl_jax.runs.watchdog import Watchdog

def hang_here():
    {hang}

with Watchdog({timeout}, Path("stacks.txt")) as watchdog:
    for _ in range(5):
        time.sleep(0.05)
        watchdog.beat(compiled={compiled})
    hang_here()
print("ended by itself")
"""
HANGS = {
    "waits": "threading.Event().wait()",
    "reads": "sys.stdin.read()",
    "holds the interpreter": "ctypes.PyDLL(None).sleep(3600)",
}


@pytest.mark.parametrize("kind", HANGS)
def test_a_hang_is_ended_and_shown(tmp_path, kind, figure):
    script = WATCHED.format(hang=HANGS[kind], timeout=1.0, compiled=True)
    began = time.monotonic()
    process = start("-c", script, cwd=tmp_path, stdin=subprocess.PIPE)
    assert process.wait(PATIENCE) == 1
    seconds = time.monotonic() - began
    err = process.stderr.read()
    assert "hang_here" in err and "most recent call first" in err
    if kind != "holds the interpreter":  # then not even the watchdog can say more
        assert "error: no iteration, evaluation batch or save has ended for 1 s" in err
        assert "hang_here" in (tmp_path / "stacks.txt").read_text()
    figure("T4", fault=f"hang: {kind}", tries=1, losses=0, note=f"limit 1 s, exit {seconds:.1f} s")


def test_compiling_gets_more_time(tmp_path):
    script = WATCHED.format(hang="time.sleep(2.5)", timeout=2.0, compiled=False)
    process = start("-c", script, cwd=tmp_path, stdout=subprocess.PIPE)
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out) == (0, "ended by itself\n"), err
    script = WATCHED.format(hang="time.sleep(600)", timeout=1.0, compiled=True)
    process = start("-c", script, cwd=tmp_path)
    assert process.wait(PATIENCE) == 1
    process.communicate()


def test_a_pause_does_not_count_and_ends(tmp_path):
    wait = "\n    with watchdog.paused(): time.sleep(4)"
    script = WATCHED.format(hang=wait, timeout=1.0, compiled=True)
    process = start("-c", script, cwd=tmp_path, stdout=subprocess.PIPE)
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out) == (0, "ended by itself\n"), err
    script = WATCHED.format(hang=f"{wait}\n    time.sleep(600)", timeout=1.0, compiled=True)
    process = start("-c", script, cwd=tmp_path)
    assert process.wait(PATIENCE) == 1
    process.communicate()


def test_a_process_that_was_stopped_has_not_hung(tmp_path):
    hang = "print('now', flush=True); time.sleep(0.5); watchdog.beat(); time.sleep(0.5)"
    # Stopped for longer than the limit, and for much less than what faulthandler's clock allows.
    script = WATCHED.format(hang=hang, timeout=5.0, compiled=True)
    process = start("-c", script, cwd=tmp_path, stdout=subprocess.PIPE)
    assert process.stdout.readline() == "now\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(6)
    process.send_signal(signal.SIGCONT)
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out) == (0, "ended by itself\n"), err


def test_a_process_that_was_stopped_for_long_goes_on_or_ends(tmp_path):
    """faulthandler's timer has run out and may be the first to wake: never a silent death."""
    hang = "print('now', flush=True); time.sleep(0.5); watchdog.beat(); time.sleep(0.5)"
    script = WATCHED.format(hang=hang, timeout=1.0, compiled=True)
    process = start("-c", script, cwd=tmp_path, stdout=subprocess.PIPE)
    assert process.stdout.readline() == "now\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(4)
    process.send_signal(signal.SIGCONT)
    out, err = process.communicate(timeout=PATIENCE)
    ended = process.returncode == 1 and "Timeout (" in err and "most recent call first" in err
    assert ended or (process.returncode, out) == (0, "ended by itself\n"), err


def test_no_limit_no_watchdog(tmp_path):
    script = WATCHED.format(hang="print(threading.active_count())", timeout=None, compiled=True)
    process = start("-c", script, cwd=tmp_path, stdout=subprocess.PIPE)
    assert process.communicate(timeout=PATIENCE)[0] == "1\nended by itself\n"


# ---- the train command

HANGING = """
import dataclasses, sys, threading
from corl_jax.train import __main__ as command
from corl_jax.train.image_tokenizer import tokenizer_iteration
from corl_jax.train.stages import STAGES

def iteration(run, state, prompts, step):
    if step == 4:
        threading.Event().wait()
    return tokenizer_iteration(run, state, prompts, step)

STAGES["vq"] = dataclasses.replace(STAGES["vq"], iterate=iteration)
command.main(sys.argv[1:])
"""


@pytest.fixture
def config(tmp_path, model):
    """A run without an end, as long as nobody ends it."""
    rows = tiny_runs.rows_file(tmp_path / "rows.parquet", 8)
    tree = tiny_runs.options(
        model, rows, tmp_path / "run", stage="vq", rewards=[],
        train={"max_steps": 10**6, "trainable": ["vqmodel/.*"]},
        checkpoint={"every": 3}, guards={"step_timeout_s": 20.0},
    )  # fmt: skip
    return write_config(tmp_path / "run.yaml", tree)


SLOW = """
import time
import orbax.checkpoint as ocp
from corl_jax.devices import batches
from corl_jax.runs.saving import Saver
gather, wait = batches.all_gather_array, ocp.CheckpointManager.wait_until_finished
finish, last = Saver.finish, []
def slow_gather(leaf):
    time.sleep({leaf_s})
    return gather(leaf)
def slow_wait(self):
    if last:
        time.sleep(last.pop())
    return wait(self)
def slow_finish(self):
    last.append({wait_s})
    return finish(self)
batches.all_gather_array, ocp.CheckpointManager.wait_until_finished = slow_gather, slow_wait
Saver.finish = slow_finish
"""


@pytest.mark.slow
def test_an_export_and_a_last_save_may_outlast_the_limit(tmp_path, model, figure):
    limit, leaf_s = 8.0, 0.2
    rows = tiny_runs.rows_file(tmp_path / "rows.parquet", 8)
    leaves = len(jax.tree.leaves(load_params(model, KIND, load_config(model, KIND))))
    assert leaves * leaf_s > 2 * limit
    job = Job.make(
        tmp_path / "job", model, rows, guards={"step_timeout_s": limit},
        driver=SLOW.format(leaf_s=leaf_s, wait_s=2 * limit), **SUPERVISED,
    )  # fmt: skip
    job.finish()
    assert (job.output / "export").is_dir()
    figure("T4", fault="export and last save longer than the limit", tries=2, losses=0)


def relatives(marker: str) -> list[int]:
    """Processes that have inherited the environment of a run."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("FAULT_TEST") == marker:
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def shared_memory() -> set[str]:
    """What has a name in /dev/shm; other programs may use it too."""
    return {path.name for path in Path("/dev/shm").iterdir()}


@pytest.mark.slow
def test_a_hung_step_ends_the_run_and_a_killed_one_leaves_nothing(
    config, tmp_path, monkeypatch, figure
):
    monkeypatch.setitem(ENVIRONMENT, "FAULT_TEST", str(tmp_path))
    output, shared_before = tmp_path / "run", shared_memory()
    hung = start("-c", HANGING, "--config", str(config))
    began = time.monotonic()
    assert hung.wait(PATIENCE) == 1
    err = hung.stderr.read()
    assert f"(also in {output / 'stacks_0.txt'})" in err
    assert "in iteration" in (output / "stacks_0.txt").read_text()
    assert [line["step"] for line in metric_lines(output)][-1] == 4  # all that have ended
    seconds = time.monotonic() - began
    figure("T4", fault="train: a step hangs", tries=1, losses=0, note=f"exit {seconds:.0f} s")

    again = start("-m", "corl_jax.train", "--config", str(config))
    try:
        wait_until(lambda: metric_lines(output)[-1]["step"] >= 20, again, 300)
        assert metric_lines(output)[3]["step"] == 4  # resumed at the checkpoint of 3
        children = psutil.Process(again.pid).children(recursive=True)
        made = shared_memory() - shared_before
    finally:
        again.kill()
    again.wait()
    end = time.monotonic() + 60  # the kernel tells a child of its parent's end at once
    while (alive := relatives(str(tmp_path))) and time.monotonic() < end:
        time.sleep(0.1)
    shared = sorted(made & shared_memory())
    figure("T22", fault="loader processes that could be killed", tries=1, losses=len(children))
    figure("T23", fault="kill -9: alive after it", tries=1, losses=len(alive))
    figure("T23", fault="kill -9: kept in /dev/shm", tries=1, losses=len(shared))
    assert (children, alive, shared) == ([], [], [])


# ---- the loader's threads


class Failing(ParquetSource):
    """Fails at a row as nothing in the loader expects."""

    error: BaseException

    def __getitem__(self, row: int):
        if row == 11:
            raise self.error
        return super().__getitem__(row)


@pytest.mark.parametrize("error", [MemoryError("no more"), RuntimeError("a bug"), OSError(5, "io")])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_loader_thread_that_dies_ends_the_run(tmp_path, error, threads, figure):
    source = Failing(tiny_parquet(tmp_path / "rows.parquet", 16))
    source.error = error
    loader = Loader(source, None, LoaderOptions(tasks=(), batch_size=4, seed=0, threads=threads))
    with pytest.raises(type(error)):
        for _ in loader.iterate(0, 8):
            pass
    figure("T22", fault="loader thread dies", tries=1, losses=0, note="error reaches the loop")
