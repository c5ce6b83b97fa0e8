"""A directory that appears whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from corl_jax.errors import InputError


@contextlib.contextmanager
def whole_directory(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary sibling to write into; renamed to `out` when the block ends well.

    Raises: InputError when `out` is taken, or cannot be written.
    """
    _check_free(out, overwrite)
    temp = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temp = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
        yield temp
        temp.chmod(0o777 & ~_umask())  # mkdtemp makes it private
        for folder in (path for path in [temp, *temp.rglob("*")] if path.is_dir()):
            _sync(folder)
        _move(temp, out)
    except OSError as error:
        raise InputError(
            f"{error.filename or out}: cannot be written ({error.strerror or error}); nothing was "
            f"left at {out}; make room or choose another folder"
        ) from error
    finally:
        if temp is not None:
            shutil.rmtree(temp, ignore_errors=True)


def _check_free(out: Path, overwrite: bool) -> None:
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise InputError(f"{out}: is not a folder; choose another place for the output")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise InputError(f"{out}: already exists and is not empty; remove it or choose another")


def _move(temp: Path, out: Path) -> None:
    """Renames, keeping what stood at `out` until the new folder is in place."""
    if out.exists():
        aside = temp.with_suffix(".old")
        out.rename(aside)
        temp.rename(out)
        shutil.rmtree(aside, ignore_errors=True)
    else:
        temp.rename(out)
    _sync(out.parent)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
