"""The scheduler with processes that only count how often they were asked."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from corl_jax.study import scheduler
from corl_jax.study.scheduler import StopSignal, run_jobs
from corl_jax.study.study_runs import Job


class FakeProcess:
    """Ends after `polls` questions with a code, or with 75 after `terminate`."""

    def __init__(self, polls: int, code: int, saves: bool = True):
        self.polls, self.code, self.saves, self.calls = polls, code, saves, []

    def poll(self) -> int | None:
        self.polls -= 1
        return self.code if self.polls < 0 else None

    def terminate(self) -> None:
        self.calls.append("terminate")
        if self.saves:
            self.polls, self.code = 1, 75

    def kill(self) -> None:
        self.calls.append("kill")
        self.polls, self.code = 0, -9


class Machine:
    """Starts processes as a script says: name -> (polls, code) of each start."""

    def __init__(self, script: dict[str, list[tuple[int, int]]] | None = None):
        self.script = script or {}
        self.starts: list[tuple[str, int]] = []
        self.processes: dict[str, FakeProcess] = {}
        self.most = 0

    def start(self, job: Job, slot: int) -> FakeProcess:
        self.starts.append((job.name, slot))
        plan = self.script.get(job.name) or [(2, 0)]
        self.processes[job.name] = FakeProcess(*plan[0])
        self.script[job.name] = plan[1:]
        self.most = max(self.most, sum(p.polls >= 0 for p in self.processes.values()))
        return self.processes[job.name]


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(scheduler, "POLL_SECONDS", 0.0)


def make_job(name: str, *after: str) -> Job:
    return Job(name, ["x"], Path("logs", f"{name}.log"), after)


def run(machine: Machine, jobs: list[Job], limit: int = 1, stop: StopSignal | None = None):
    lines: list[str] = []
    outcomes = run_jobs(jobs, machine.start, limit, stop or StopSignal(), lines.append)
    return outcomes, lines


def test_a_job_waits_for_its_predecessors():
    machine = Machine({"slow": [(9, 0)], "quick": [(0, 0)]})
    jobs = [
        make_job("slow"),
        make_job("quick"),
        make_job("both", "slow", "quick"),
        make_job("free"),
    ]
    outcomes, _ = run(machine, jobs, limit=3)
    names = [name for name, _ in machine.starts]
    assert names[-1] == "both" and outcomes.done[-1] == "both"
    assert set(outcomes.done) == {job.name for job in jobs}


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_no_more_than_the_limit_run_at_once(limit):
    machine = Machine()
    run(machine, [make_job(str(number)) for number in range(7)], limit)
    assert machine.most == limit
    assert {slot for _, slot in machine.starts} == set(range(limit))


def test_a_crashed_job_is_repeated_alone_and_the_others_go_on():
    machine = Machine({"b": [(1, 1), (1, 0)]})
    outcomes, lines = run(machine, [make_job("a"), make_job("b"), make_job("c", "b")], 2)
    assert [name for name, _ in machine.starts].count("b") == 2 and len(machine.starts) == 4
    assert not outcomes.failed and set(outcomes.done) == {"a", "b", "c"}
    assert any("repeat" in line and "exit code 1" in line and "b.log" in line for line in lines)


@pytest.mark.parametrize(("code", "starts"), [(1, 2), (-9, 2), (137, 2), (75, 2), (2, 1), (3, 1)])
def test_what_fails_again_is_named_and_what_waits_for_it_left_out(code, starts):
    machine = Machine({"b": [(1, code), (1, code)]})
    jobs = [make_job("b"), make_job("c", "b"), make_job("d", "c"), make_job("a")]
    outcomes, lines = run(machine, jobs, 2)
    assert [name for name, _ in machine.starts].count("b") == starts
    assert outcomes.failed == {"b": code} and outcomes.done == ["a"]
    assert outcomes.blocked.keys() == {"c", "d"}
    assert any(f"FAILED   b: exit code {code}" in line and "b.log" in line for line in lines)


def test_a_signal_stops_each_process_once_and_starts_no_other():
    stop, machine = StopSignal(), Machine({"a": [(99, 0)], "b": [(99, 0)]})
    begin = machine.start

    def start(job: Job, slot: int) -> FakeProcess:
        if job.name == "b":
            stop.count += 1
        return begin(job, slot)

    jobs = [make_job("a"), make_job("b"), make_job("c")]
    outcomes = run_jobs(jobs, start, 2, stop, lambda line: None)
    assert [process.calls for process in machine.processes.values()] == [["terminate"]] * 2
    assert set(outcomes.stopped) == {"a", "b", "c"} and not outcomes.failed


def test_a_second_signal_ends_them_at_once():
    stop, process = StopSignal(1), FakeProcess(10**6, 0, saves=False)
    asked = process.terminate

    def terminate() -> None:
        asked()
        stop.count = 2

    process.terminate = terminate  # type: ignore[method-assign]
    stop.count = 0

    def start(job: Job, slot: int) -> FakeProcess:
        stop.count = 1
        return process

    outcomes = run_jobs([make_job("a")], start, 1, stop, lambda line: None)
    assert process.calls == ["terminate", "kill"] and outcomes.stopped == ["a"]


def test_an_error_of_the_study_itself_stops_its_processes():
    machine = Machine({"a": [(99, 0)], "b": [(0, 0)]})

    def fail(job: Job) -> None:
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        run_jobs(
            [make_job("a"), make_job("b")], machine.start, 2, StopSignal(), print, note_done=fail
        )
    assert machine.processes["a"].calls == ["terminate"]


def test_signals_are_counted_and_the_handlers_given_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal().listen() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.count == 2
    assert signal.getsignal(signal.SIGTERM) is before
