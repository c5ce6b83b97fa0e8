"""Locks a directory. The kernel releases the lock when the process ends in any way."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from corl_jax.errors import InputError


@contextlib.contextmanager
def lock_directory(directory: Path, key: str = "output_dir") -> Iterator[None]:
    """Locks the directory of option `key` by its file `.lock` while the block lasts.

    Raises:
        InputError: another process has locked it, or the file cannot be locked.
    """
    path = directory / ".lock"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; name a writable {key}") from None
    # A flock belongs to the open file, which a forked child shares: a child that outlives this
    # process would keep the lock. So each child closes the file. The list is emptied at the end,
    # because Python cannot unregister the function.
    locked = [descriptor]
    os.register_at_fork(after_in_child=lambda: locked and os.close(locked.pop()))
    try:
        try:
            # Without waiting: a second run should say so at once.
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{key}: {directory} is being written by {_describe_holder(descriptor)}; "
                "wait for it, stop it, or choose another directory"
            ) from None
        except OSError as error:
            raise InputError(
                f"{path}: cannot be locked ({error.strerror}); put {key} on a file system "
                "with flock"
            ) from None
        # For the message of the next process that tries; the lock does not depend on the text.
        os.ftruncate(descriptor, 0)
        holder = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)
        yield
        os.ftruncate(descriptor, 0)
    finally:
        locked.clear()
        os.close(descriptor)


def _describe_holder(descriptor: int) -> str:
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"  # which has locked the file but not yet written its name
