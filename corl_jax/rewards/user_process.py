"""Starts, calls and ends the process of a user's code; used in the run's process."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from multiprocessing.connection import Connection
from typing import Any

# The state of jax.distributed before a device starts has no public function.
from jax._src import distributed

from corl_jax.errors import InputError
from corl_jax.rewards.signature import Parameters
from corl_jax.rewards.user_code import Source
from corl_jax.rewards.worker import LATE_SIGNAL, Failure, Refusal, Stack

INDEX_VARIABLE = "CORL_JAX_PROCESS_INDEX"
END_S = 1.0  # time that the user's code has at its exit
TICK_S = 0.5  # between checks whether the process lives
# The run's search path comes as arguments, and replaces the one that `python -P` makes.
_PROGRAM = """
import sys
descriptor, *sys.path = sys.argv[1:]
del sys.argv[1:]
from corl_jax.rewards.worker import serve_calls
serve_calls(int(descriptor))
"""


class UserProcess:
    """A process that has imported a user's file or module once and calls its functions.

    A call that takes too long first gets a signal. If it does not end then, its process is killed
    with everything that this process has started. The next call starts a new process with the same
    content.
    """

    def __init__(self, source: Source):
        """Starts the process and imports the code, without time limit.

        Raises: InputError for code that fails.
        """
        self._source, self._folder, self._path = source, os.getcwd(), list(sys.path)
        self._process: subprocess.Popen | None = None
        self._connection: Connection | None = None
        self._stack = ""
        self._one_at_a_time = threading.Lock()
        began = time.monotonic()
        _raise_input_error(self._start())
        self._import_s = time.monotonic() - began

    @property
    def pid(self) -> int | None:
        """The number of the process; None between its end and the next call."""
        return self._process and self._process.pid

    def inspect(self, name: str, options: dict[str, Any]) -> Parameters:
        """Returns a function's parameters, and checks its options.

        Raises: InputError for a function or options that cannot be used.
        """
        with self._one_at_a_time:
            if self._process is None:
                _raise_input_error(self._start())
            reply = self._ask(("inspect", name, options))
        _raise_input_error(reply)
        return reply

    def call(
        self, name: str, arguments: dict[str, Any], count: int, timeout_s: float, grace_s: float
    ) -> Any:
        """Returns `count` scores, a Failure or an Interrupt within `timeout_s + grace_s` seconds.

        After the end of the process, the call also waits for a new import. It waits at most
        `timeout_s` plus three times the duration of the first import.
        """
        # Three times: the disk's cache may be cold, or the machine busier than at the first import.
        with self._one_at_a_time:
            if self._process is None:
                failure = self._start(timeout_s + 3 * self._import_s)
                if failure is not None:
                    line = f"{failure.line} (in the import after its process had ended)"
                    return dataclasses.replace(failure, line=line)
            return self._ask(("call", name, arguments, count, timeout_s), timeout_s, grace_s)

    def _start(self, limit_s: float | None = None) -> Failure | None:
        """Starts the process and imports the code. Returns None, or why the import failed."""
        # Popen, not multiprocessing: its spawn imports the run's main module again, with JAX, and a
        # fork of a process with threads (JAX has some) can deadlock.
        ours, theirs = multiprocessing.Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-u", "-P", "-c", _PROGRAM, str(theirs.fileno()), *self._path],
                cwd=self._folder,
                env=_make_environment(),
                stdin=subprocess.DEVNULL,
                stdout=2,  # standard output is for the lines of the command
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for the run alone
            )  # fmt: skip
        self._connection = ours
        # Runs when the last reward of the file is gone, and at the interpreter's exit.
        self._end = weakref.finalize(self, _end_process, os.getpid(), self._process, ours)
        reply = self._ask(("load", self._source), limit_s)
        if isinstance(reply, Refusal):
            text = "\n".join(reply.lines)
            reply = Failure(text, f"{text}\n")
        if reply is not None:
            self._kill()
        return reply

    def _ask(self, request: tuple, limit_s: float | None = None, grace_s: float = 0.0) -> Any:
        """Returns the reply, or a Failure if the process ends or takes too long."""
        assert self._process is not None and self._connection is not None
        self._stack = ""
        try:
            self._connection.send(request)
            received, reply = self._receive(limit_s)
            if received:
                return reply
            # The signal raises a TimeoutError in the user's code, whose handlers can then run.
            self._process.send_signal(LATE_SIGNAL)
            received, reply = self._receive(grace_s)
        except (EOFError, ConnectionError):
            return self._describe_end()
        except BaseException:  # an interrupt: the reply is no longer needed
            self._kill()
            raise
        line = f"TimeoutError: no result after {limit_s:g} s"
        if received and isinstance(reply, Failure):
            return reply
        if not received:
            self._kill()
            line += "; its process did not stop and was ended, the next call starts it anew"
        stack = f"Traceback (most recent call last):\n{self._stack}" if self._stack else ""
        return Failure(line, f"{stack}{line}\n")

    def _receive(self, limit_s: float | None) -> tuple[bool, Any]:
        """Returns (True, reply), or (False, None) after the time limit.

        Raises: EOFError, ConnectionError if the process has ended.
        """
        assert self._process is not None and self._connection is not None
        deadline = None if limit_s is None else time.monotonic() + limit_s
        while True:
            rest = TICK_S if deadline is None else max(0.0, deadline - time.monotonic())
            # A fork of the user's code can keep the socket open after the process has ended.
            ended = self._process.poll() is not None
            if self._connection.poll(0 if ended else min(rest, TICK_S)):
                reply = self._connection.recv()
                if not isinstance(reply, Stack):
                    return True, reply
                self._stack = reply.lines
            elif ended:
                raise EOFError
            elif not rest:
                return False, None

    def _describe_end(self) -> Failure:
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_S)
        code = self._process.returncode
        self._kill()
        if code is None:
            reason = "closed its connection"
        elif code >= 0:
            reason = f"exited with code {code}"
        else:
            hint = "; has memory run out?" if code == -signal.SIGKILL else ""
            # SIGKILL is what Linux sends to a process when memory runs out.
            reason = f"was ended by {_name_signal(-code)}{hint}"
        line = f"ChildProcessError: the process of {self._source.name} {reason}"
        return Failure(line, f"{line}\n")

    def _kill(self) -> None:
        if self._process is not None:
            self._end.detach()  # its number may later belong to another process
            assert self._connection is not None
            _kill_process(self._process, self._connection)
            self._process = self._connection = None


def _raise_input_error(reply: Any) -> None:
    if isinstance(reply, Refusal):
        raise InputError(reply.lines)
    if isinstance(reply, Failure):
        raise InputError(reply.line)


def _make_environment() -> dict[str, str]:
    index = distributed.global_state.process_id
    # JAX in this process would take memory of the devices that the run uses.
    return os.environ | {"JAX_PLATFORMS": "cpu", INDEX_VARIABLE: str(index)}


def _name_signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


def _end_process(owner: int, process: subprocess.Popen, connection: Connection) -> None:
    """Ends a process: asks it to exit, waits for its exit code to run, and then kills it."""
    if os.getpid() != owner:  # a fork of the run's process ends, not the run
        return
    with contextlib.suppress(OSError):  # it may have ended already
        connection.send(None)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_S)
    _kill_process(process, connection)


def _kill_process(process: subprocess.Popen, connection: Connection) -> None:
    """Ends a process and all that it has started, unless they have left its process group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # nobody is left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    connection.close()
