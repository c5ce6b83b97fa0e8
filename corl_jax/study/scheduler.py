"""Runs the processes of a study: several at once, each after those that it waits for."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Protocol

from corl_jax.errors import FAILED_EXIT_CODE, PREEMPTED_EXIT_CODE
from corl_jax.study.study_runs import Job

REPEATS = 1
"""How often a crashed process is started again at once. It goes on from its last checkpoint."""
POLL_SECONDS = 0.2


class Process(Protocol):
    """What the scheduler needs of a `subprocess.Popen`."""

    def poll(self) -> int | None:
        """Returns the exit code; None while the process runs."""
        ...

    def terminate(self) -> None:
        """Asks the process to save and stop."""
        ...

    def kill(self) -> None:
        """Ends the process at once."""
        ...


@dataclasses.dataclass(frozen=True)
class Outcomes:
    """What became of the jobs, by name."""

    done: list[str]
    failed: dict[str, int]  # name -> exit code
    blocked: dict[str, str]  # name -> the failed job that it waits for
    stopped: list[str]  # by Ctrl-C, or not started because of it


@dataclasses.dataclass
class StopSignal:
    """Counts SIGINT and SIGTERM while a `with listen()` block lasts."""

    count: int = 0

    @contextlib.contextmanager
    def listen(self) -> Iterator[StopSignal]:
        """Handles both signals in the block."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self._note) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.count += 1


@dataclasses.dataclass
class _Queue:
    """The jobs that wait and that run."""

    waiting: list[Job]
    limit: int
    running: dict[str, tuple[Job, int, Process]] = dataclasses.field(default_factory=dict)
    starts: dict[str, int] = dataclasses.field(default_factory=dict)
    outcomes: Outcomes = dataclasses.field(default_factory=lambda: Outcomes([], {}, {}, []))

    def choose_slot(self) -> int | None:
        """Returns the first slot without a process; None if all have one."""
        used = {slot for _, slot, _ in self.running.values()}
        return next((slot for slot in range(self.limit) if slot not in used), None)


def run_jobs(
    jobs: Sequence[Job], start: Callable[[Job, int], Process], limit: int, stop: StopSignal,
    say: Callable[[str], None] = print, note_done: Callable[[Job], None] = lambda job: None,
) -> Outcomes:  # fmt: skip
    """Runs jobs, at most `limit` at once; `start(job, slot)` starts a process in a slot from 0 on.

    A job whose predecessor failed is not started. A crashed process (exit code 1, or ended by
    a signal) is started again once. After a signal all processes are asked to stop, and after
    a second one they are ended. `note_done` is called with each job that has succeeded.
    """
    queue, signals = _Queue(list(jobs), limit), 0
    try:
        while queue.waiting or queue.running:
            if stop.count > signals:
                signals = stop.count
                _stop_running(queue, signals, say)
            for job in _collect_ended(queue, bool(signals), say):
                note_done(job)
            _start_ready(queue, start, say)
            if queue.running:
                time.sleep(POLL_SECONDS)
    except BaseException:
        # Processes of sessions of their own would go on without the study.
        for _, _, process in queue.running.values():
            process.terminate()
        raise
    return queue.outcomes


def _stop_running(queue: _Queue, signals: int, say: Callable[[str], None]) -> None:
    queue.outcomes.stopped.extend(job.name for job in queue.waiting)
    queue.waiting.clear()
    names = ", ".join(queue.running) or "nothing runs"
    say(f"stopping {names}" if signals > 1 else f"stopping after the running step: {names}")
    for _, _, process in queue.running.values():
        process.kill() if signals > 1 else process.terminate()


def _collect_ended(queue: _Queue, is_stopped: bool, say: Callable[[str], None]) -> list[Job]:
    """Takes ended processes out of the running ones; returns the jobs that have succeeded."""
    outcomes, done = queue.outcomes, []
    for name, (job, _, process) in list(queue.running.items()):
        code = process.poll()
        if code is None:
            continue
        del queue.running[name]
        if code == 0:
            outcomes.done.append(name)
            done.append(job)
            say(f"done     {name}")
        elif is_stopped:
            outcomes.stopped.append(name)
        elif queue.starts[name] <= REPEATS and is_crash(code):
            say(f"repeat   {name}: exit code {code}, see {job.log}")
            queue.waiting.insert(0, job)
        else:
            outcomes.failed[name] = code
            say(f"FAILED   {name}: exit code {code}, see {job.log}")
    return done


def is_crash(code: int) -> bool:
    """Returns whether the same command may succeed now; a wrong input or a guard stays."""
    return code < 0 or code in (FAILED_EXIT_CODE, PREEMPTED_EXIT_CODE) or code > 128


def _start_ready(
    queue: _Queue, start: Callable[[Job, int], Process], say: Callable[[str], None]
) -> None:
    """Starts the jobs whose predecessors have ended, and gives up those that wait in vain."""
    lost = {**dict.fromkeys(queue.outcomes.failed), **queue.outcomes.blocked}
    for job in list(queue.waiting):
        if culprit := next((name for name in job.after if name in lost), None):
            queue.waiting.remove(job)
            queue.outcomes.blocked[job.name] = lost[job.name] = culprit
            say(f"LEFT OUT {job.name}: {culprit} has failed")
            continue
        slot = queue.choose_slot()
        unfinished = {other.name for other in queue.waiting} | queue.running.keys()
        if slot is None or unfinished.intersection(job.after):
            continue
        queue.waiting.remove(job)
        queue.starts[job.name] = queue.starts.get(job.name, 0) + 1
        say(f"start    {job.name}")
        queue.running[job.name] = (job, slot, start(job, slot))
