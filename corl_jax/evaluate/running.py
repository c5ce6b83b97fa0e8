"""What the suites that run a model share: their locked folder, signals, and lack of memory."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import jax

from corl_jax.devices.exhausted_memory import explain_memory
from corl_jax.errors import InputError
from corl_jax.runs.append_log import AppendLog
from corl_jax.runs.locking import lock_directory


@contextlib.contextmanager
def open_folder(out: Path) -> Iterator[None]:
    """Makes the folder of --out, and locks it while the block lasts.

    Raises: InputError if it cannot be made, or another process writes to it.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be made ({error.strerror}); name another") from error
    with lock_directory(out, "--out"):
        yield


def require_one_process(suite: str) -> None:
    """Raises: InputError if several processes run a suite that needs a single one."""
    if jax.process_count() > 1:
        raise InputError(
            f"--suite {suite}: found {jax.process_count()} processes; start one, which uses all "
            "devices of its host"
        )


def append_line(record: AppendLog, line: bytes) -> None:
    """Appends a line. Raises: InputError if the disk takes it not."""
    try:
        record.add(line)
    except OSError as error:
        raise InputError(
            f"{record.path}: cannot be written ({error.strerror}); make room and give the same "
            "command again, which continues"
        ) from error


@contextlib.contextmanager
def watch_signals() -> Iterator[list[str]]:
    """Yields a list that gets the name of a SIGTERM or SIGINT; a second one stops at once."""
    # `runs.signals.Interruption` lets several processes agree on a step, and here each process
    # has its own number of images.
    received: list[str] = []

    def note_signal(number: int, frame: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(signal.Signals(number).name)

    is_main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGTERM, signal.SIGINT) if is_main else ()
    previous = {number: signal.signal(number, note_signal) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            # None: a handler that C code has set, which Python cannot set again.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def explain_batch(
    batch_size: int, what: str, remedy: str
) -> contextlib.AbstractContextManager[None]:
    """Returns a context that raises an InputError if its block uses up the memory of a device.

    `what` names what a batch has, `remedy` what to do besides a smaller batch.
    """
    return explain_memory(
        f"--batch-size: {batch_size} {what} at once do not fit into the memory of the devices; "
        f"give fewer, or {remedy}; finished {what} are kept"
    )
