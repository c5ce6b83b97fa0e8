"""SIGTERM and Ctrl-C: saved at the end of the step, exit code 75, resumed to the same bits (T2)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import jax
import pytest

from corl_jax.runs import saving
from corl_jax.runs.log import StepLog
from corl_jax.train import reports
from tests.faults.harness import PATIENCE, ROOT, SUPERVISED, Job, outcome
from tests.support import tiny_runs


@pytest.fixture
def job(model, rows, tmp_path, one_device):
    return Job.make(tmp_path, model, rows, **SUPERVISED | {"checkpoint": {"every": 100}})


def signalled(patch, number: int, call: int, target=StepLog, name="add") -> None:
    """This process gets a signal at the n-th call of a method."""
    original, calls = getattr(target, name), []

    def method(*args, **options):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return original(*args, **options)

    patch.setattr(target, name, method)


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGTERM, id="SIGTERM"),
        pytest.param(signal.SIGINT, id="SIGINT", marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_exits_with_75(job, straight, monkeypatch, capfd, figure, number):
    # Whoever runs the tests in the background may ignore Ctrl-C.
    before = signal.signal(number, signal.default_int_handler)
    with monkeypatch.context() as patch:
        signalled(patch, number, call=3)
        code = job.here()
    assert signal.signal(number, before) is signal.default_int_handler
    text = capfd.readouterr().err
    steps = job.steps()
    assert (code, steps) == (75, [3]), text
    assert f"{number.name}: saves after this step and stops" in text
    assert f"stopped by {number.name} after step 3 of 6, which is saved in" in text
    assert job.here() == 0
    found = outcome(job)
    wrong = [name for name, value in straight.items() if found[name] != value]
    figure("T2", fault=f"{number.name}, one process", tries=1, losses=len(wrong))
    assert not wrong


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_before_anything_is_loaded(job, monkeypatch, capfd, figure, number):
    before = signal.signal(number, signal.default_int_handler)
    place = "corl_jax.train.command.resolve_run"
    monkeypatch.setattr(place, lambda *_: os.kill(os.getpid(), number))
    code = job.here()
    signal.signal(number, before)
    figure("T2", fault="signal while nothing is at stake", tries=1, losses=code != 75)
    assert code == 75 and not job.output.exists()
    assert capfd.readouterr().err.startswith(f"stopped by {number.name}; the same command")


@pytest.mark.slow
def test_a_second_signal_leaves_the_save_alone(job, straight, monkeypatch, capfd, figure):
    with monkeypatch.context() as patch:
        signalled(patch, signal.SIGTERM, call=2)
        signalled(patch, signal.SIGTERM, 1, saving.Saver, "finish")  # the save has begun
        assert job.here() == 75
    assert "SIGTERM: saves already" in capfd.readouterr().err
    assert job.steps() == [2] and not job.partial()
    assert job.here() == 0
    lost = outcome(job) != straight
    figure("T2", fault="second SIGTERM in the save", tries=1, losses=lost)
    assert not lost


@pytest.mark.slow
def test_what_was_due_at_the_step_is_made_by_the_next_process(model, rows, tmp_path, one_device,
                                                              monkeypatch, figure):  # fmt: skip
    """An evaluation could outlast the grace time; logged once, also if that process dies too."""
    changes = SUPERVISED | {
        "rewards": [{"name": "format"}], "log": {"images_every": 0},
        "eval": {"suite": "rewards", "every": 2, "rows": 4, "batch_prompts": 4},
        "checkpoint": {"every": 100},
    }  # fmt: skip

    def evaluate(config, run, outputs, state, step):
        total = float(sum(x.sum() for x in jax.tree.leaves(state.params)))
        outputs.log.add_metrics(step, {"eval/t2i/parameters": total}, is_evaluation=True)

    monkeypatch.setattr(reports, "evaluate", evaluate)
    calm = Job.make(tmp_path / "calm", model, rows, **changes)
    assert calm.here() == 0
    job = Job.make(tmp_path / "stopped", model, rows, **changes)
    with monkeypatch.context() as patch:
        signalled(patch, signal.SIGTERM, call=2)
        assert job.here() == 75 and job.steps() == [2]
    with monkeypatch.context() as patch:  # dies after the evaluation and before the next save
        patch.setattr(StepLog, "add", _dies)
        with pytest.raises(KeyboardInterrupt):
            job.here()
    assert [line["step"] for line in tiny_runs.metric_lines(job.output)] == [0, 1, 2, 2]
    assert job.here() == 0
    lost = outcome(job) != outcome(calm)
    figure("T2", fault="SIGTERM where an evaluation is due", tries=1, losses=lost)
    assert not lost


def _dies(*args):
    raise KeyboardInterrupt


ALONE = """
import signal, sys, time
from corl_jax.errors import exit_on_input_error
from corl_jax.runs.signals import Interruption

@exit_on_input_error
def main():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # children of a background job ignore it
    with Interruption() as interruption:
        if sys.argv[1] == "loop":
            with interruption.deferred():
                print("ready", flush=True)
                while not interruption.is_reached(0):
                    time.sleep(0.01)
                print("asked", flush=True)
                time.sleep(600)
        print("ready", flush=True)
        for _ in range(6000):
            time.sleep(0.1)  # a signal that comes just before a sleep waits for its end

main()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_outside_of_the_loop_a_signal_ends_the_process_at_once(number, figure):
    process = _alone("load")
    process.send_signal(number)
    _, errors = process.communicate(timeout=PATIENCE)
    figure("T2", fault="signal while nothing is at stake", tries=1, losses=process.returncode != 75)
    assert process.returncode == 75, "or it would have gone on to its end, with 0"
    assert "the same command continues from the last checkpoint" in errors


def test_ctrl_c_twice_ends_the_process_at_once(figure):
    process = _alone("loop")
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "asked\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE)
    figure("T2", fault="Ctrl-C twice", tries=1, losses=process.returncode != 130)
    assert process.returncode == 130 and "stopped at once" in errors


def _alone(mode: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", ALONE, mode], cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.slow
def test_the_command_of_a_user_is_preempted(model, rows, tmp_path, figure):
    """Five times in a run, at random; each step is done once."""
    straight = Job.make(tmp_path / "straight", model, rows, train={"max_steps": 12})
    straight.finish()
    changes = {"train": {"max_steps": 12}, "checkpoint": {"every": 100}}
    job = Job.make(tmp_path / "preempted", model, rows, **changes)
    seconds = []
    for _ in range(5):
        offset = len(job.log)
        job.start()
        job.until(lambda: "\nstep " in "\n" + job.log[offset:])  # noqa: B023
        began, logged = time.monotonic(), job.logged()
        assert job.stop() == 75, job.log[-2000:]
        seconds.append(time.monotonic() - began)
        assert max(job.steps()) <= logged + 2
    job.finish()
    found = outcome(job)
    wrong = [name for name, value in outcome(straight).items() if found[name] != value]
    note = f"signal to exit: mean {sum(seconds) / 5:.1f} s, max {max(seconds):.1f} s"
    figure("T2", fault="SIGTERM, the command", tries=5, losses=len(wrong), note=note)
    assert not wrong
