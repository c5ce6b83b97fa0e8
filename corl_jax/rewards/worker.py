"""Runs a file of user's rewards in a separate process, from its import to the end of the run.

`user_process` starts it and sends requests over a socket. The user's code has the main thread, as
in a script, and one event loop. The module imports neither JAX nor numpy, so that the process
starts in a few hundredths of a second.
"""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import math
import os
import select
import signal
import sys
import threading
import traceback
import types
from collections.abc import Awaitable
from multiprocessing.connection import Connection
from typing import Any

from corl_jax.errors import InputError
from corl_jax.rewards.signature import read_parameters
from corl_jax.rewards.user_code import Source, find_function, import_module

LATE_SIGNAL = signal.SIGUSR2
"""The signal that the run's process sends when a call takes too long."""

STOPPING = (signal.SIGINT, signal.SIGTERM)
"""Signals that a scheduler or a terminal sends to all processes of a job."""

MACHINERY = (__file__, os.path.dirname(asyncio.__file__), "<string>")
"""Files whose frames are cut from tracebacks of the user's code."""


@dataclasses.dataclass(frozen=True)
class RawImage:
    """An image on its way to the user's code."""

    size: tuple[int, int]  # width, height
    pixels: bytes  # RGB


@dataclasses.dataclass(frozen=True)
class Failure:
    """The reason why a call has no result."""

    line: str  # the last one of the traceback
    trace: str


@dataclasses.dataclass(frozen=True)
class Refusal:
    """The reasons why code cannot be imported or a function cannot be used."""

    lines: list[str]


@dataclasses.dataclass(frozen=True)
class Stack:
    """The stack of a call when its time was over; the reply itself follows."""

    lines: str


@dataclasses.dataclass(frozen=True)
class Interrupt:
    """The user's code raised KeyboardInterrupt."""


def serve_calls(descriptor: int) -> None:
    """Serves requests until the run's process ends."""
    connection = Connection(descriptor)
    _end_with_run(connection)
    # What the user's code prints goes to standard error. It must accept any character.
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    Server(connection).serve()


class Server:
    """Runs the functions of one module in the main thread, one call after the other."""

    def __init__(self, connection: Connection):
        self._connection = connection
        self._loop = asyncio.new_event_loop()
        self._module: types.ModuleType | None = None
        self._source: Source | None = None
        self._running = self._awaiting = False
        self._timeout_s = math.inf
        self._handle_signals()

    def serve(self) -> None:
        """Answers requests (name of a method, its arguments) in turn; None ends the loop."""
        while True:
            self._wait_for_request()
            request = self._connection.recv()
            if request is None:
                return
            # asyncio.run in a plain function leaves the thread without a loop.
            asyncio.set_event_loop(self._loop)
            name, *arguments = request
            try:
                reply = getattr(self, name)(*arguments)
            except InputError as error:
                reply = Refusal(error.problems)
            self._connection.send(reply)

    def load(self, source: Source) -> None:
        """Imports the user's code."""
        self._source, self._module = source, import_module(source)

    def inspect(self, name: str, options: dict[str, Any]) -> Any:
        """Returns a function's parameters, and checks its options."""
        return read_parameters(self._find(name), options)

    def call(self, name: str, arguments: dict[str, Any], count: int, timeout_s: float) -> Any:
        """Returns the `count` scores of a call, or a Failure or Interrupt."""
        if "images" in arguments and isinstance(arguments["images"][0], RawImage):
            from PIL import Image

            arguments["images"] = [
                Image.frombytes("RGB", image.size, image.pixels) for image in arguments["images"]
            ]
        function = self._find(name)
        # `_running` is true from here to the end of `convert_scores`, which runs the user's code
        # too, such as an array's conversion. Outside of it a late signal raises nothing.
        self._timeout_s = timeout_s
        try:
            self._running = True
            values = function(**arguments)
            if inspect.isawaitable(values):
                self._awaiting = True
                values = self._loop.run_until_complete(self._await(values))
            scores = convert_scores(values, count)
            self._running = False
            return scores
        except KeyboardInterrupt:
            return Interrupt()
        except BaseException as error:  # SystemExit too
            return _describe(error)
        finally:
            self._running = self._awaiting = False

    def _find(self, name: str) -> Any:
        assert self._module is not None and self._source is not None
        return find_function(self._module, self._source.name, name)

    async def _await(self, values: Awaitable) -> Any:
        limit = asyncio.timeout(self._timeout_s)
        try:
            async with limit:
                return await values
        except TimeoutError as error:
            if limit.expired():
                raise self._make_timeout_error() from error.__cause__
            raise  # a TimeoutError of the function, not of the limit

    def _make_timeout_error(self) -> TimeoutError:
        return TimeoutError(f"no result after {self._timeout_s:g} s")

    def _wait_for_request(self) -> None:
        """Waits while the event loop runs, so that clients can keep their connections alive."""
        self._loop.add_reader(self._connection.fileno(), self._loop.stop)
        self._loop.run_forever()
        self._loop.remove_reader(self._connection.fileno())

    def _handle_signals(self) -> None:
        """Ends a plain call that takes too long; ignores the signals that stop a job."""

        def end_call(number: int, frame: types.FrameType | None) -> None:
            if not self._running:
                return
            self._connection.send(
                Stack("".join(_format_user_frames(traceback.extract_stack(frame))))
            )
            if not self._awaiting:  # otherwise the event loop cancels the call
                raise self._make_timeout_error()

        signal.signal(LATE_SIGNAL, end_call)
        # A scheduler that stops a job sends SIGTERM to all of its processes. The run's process
        # then finishes its step and still needs its rewards. These are handlers, because a
        # program that the user starts would inherit an ignored signal.
        for number in STOPPING:
            signal.signal(number, lambda number, frame: None)
        _restore_signals_in_forks()


def _restore_signals_in_forks() -> None:
    """Restores the signals in forks of the user's code, so that Pool.terminate can end them."""

    def restore() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(LATE_SIGNAL, signal.SIG_DFL)
        unblock()

    def unblock() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)

    # Blocked during the fork: Python drops a signal that comes between the fork and `restore`.
    os.register_at_fork(
        before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING),
        after_in_parent=unblock,
        after_in_child=restore,
    )


def convert_scores(values: Any, count: int) -> list[float]:
    """Returns the result of a user's function as `count` floats; None becomes NaN.

    Raises:
        TypeError: no sequence, or a value that is not a number.
        ValueError: not `count` values.
    """
    expected = f"expected a list or array of {count} numbers or None, one per sample"
    if hasattr(values, "__array__"):
        import numpy as np

        values = np.asarray(values)
        if values.ndim != 1:
            raise ValueError(f"returned an array of shape {values.shape}; {expected}")
        values = values.tolist()
    if not isinstance(values, list | tuple):
        raise TypeError(f"returned {type(values).__name__}; {expected}")
    if len(values) != count:
        raise ValueError(f"returned {len(values)} values; {expected}")
    scores = []
    for row, value in enumerate(values):
        try:
            if isinstance(value, str | bytes | bytearray) or getattr(value, "ndim", 0):
                raise TypeError
            scores.append(math.nan if value is None else float(value))
        except TypeError:
            raise TypeError(f"returned {value!r} for sample {row}; {expected}") from None
    return scores


def _describe(error: BaseException) -> Failure:
    """Returns the error's traceback from the user's first frame on."""
    # As text here: the exception itself may not be picklable, and its class may be the user's.
    trace = traceback.TracebackException.from_exception(error)
    part: traceback.TracebackException | None = trace
    # The error, then what caused it, as the traceback is printed: each part has its stack.
    while part is not None:
        part.stack[:] = _cut_to_user_frames(part.stack)
        part = part.__cause__ or (None if part.__suppress_context__ else part.__context__)
    text = "".join(trace.format())
    return Failure(text.rstrip().splitlines()[-1], text)


def _format_user_frames(stack: traceback.StackSummary) -> list[str]:
    return traceback.StackSummary.from_list(_cut_to_user_frames(stack)).format()


def _cut_to_user_frames(stack: list[traceback.FrameSummary]) -> list[traceback.FrameSummary]:
    """Returns the stack without the frames of this module and of event loops around the user's."""
    users = [number for number, frame in enumerate(stack) if not _is_machinery(frame)]
    return stack[users[0] : _count_user_frames(stack)] if users else []


def _count_user_frames(stack: list[traceback.FrameSummary]) -> int:
    """Returns the number of frames before those of this module's signal handler at the end."""
    count = len(stack)
    while count and stack[count - 1].filename == __file__:
        count -= 1
    return count


def _is_machinery(frame: traceback.FrameSummary) -> bool:
    return frame.filename.startswith(MACHINERY)


def _end_with_run(connection: Connection) -> None:
    """Ends this process and all that it has started as soon as the run's process has ended."""

    # In a thread, because the user's code can keep the main thread for long. SIGKILL to the group,
    # because programs that the user's code has started would go on without it.
    def watch() -> None:
        poller = select.poll()
        poller.register(connection.fileno(), 0)  # 0: reports only that the other end is closed
        poller.poll()
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, name="end of the run", daemon=True).start()
