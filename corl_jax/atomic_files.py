"""Writes a file or a folder whole or not at all: beside its place first, then renamed."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from corl_jax.errors import InputError


@contextlib.contextmanager
def replace_file(path: Path) -> Iterator[IO[bytes]]:
    """Yields a binary file that replaces `path` when the block ends without an error."""
    # In the same folder, because a rename is atomic only inside one file system. With the process's
    # number, so that two processes do not write one file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            # Before the rename: after a power cut the new name must not be of an empty file.
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def create_folder(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty folder that becomes `out` when the block ends without an error.

    Raises: InputError if `out` holds files (unless `overwrite`), or cannot be written.
    """
    # Before the block, which may take hours.
    check_output_folder(out, overwrite=overwrite)
    place, temporary = out.absolute(), None
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(
            tempfile.mkdtemp(prefix=f".{place.name}.", suffix=".partial", dir=place.parent)
        )
        yield temporary
        temporary.chmod(0o777 & ~_read_umask())  # mkdtemp makes it private
        # Names are data of their folder: without this a power cut could lose files that are whole.
        for folder in (path for path in [temporary, *temporary.rglob("*")] if path.is_dir()):
            _flush_folder(folder)
        _move_folder(temporary, place)
    except OSError as error:
        raise InputError(
            f"{error.filename or out}: cannot be written ({error.strerror or error}); nothing was "
            f"left at {out}; make room or choose another folder"
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def check_output_folder(out: Path, option: str = "", *, overwrite: bool = False) -> None:
    """Checks that `out`, which an option names, is an empty folder or can be made.

    Raises: InputError if not; a folder that holds files is no problem with `overwrite`.
    """
    place = f"{option} {out}".lstrip()
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise InputError(f"{place}: is no folder; name a new or an empty one")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise InputError(f"{place}: holds files; remove it, or name a new or an empty folder")
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"{place}: {parent} cannot be written to; name another place")


def check_not_read(out: Path, folders: Iterable[Path], option: str = "") -> None:
    """Checks that a folder that replaces `out` replaces none of the folders that are read.

    Raises: InputError if `out` is one of them or holds one.
    """
    for folder in folders if out.exists() else ():
        relation = "is" if out.samefile(folder) else "holds"
        if relation == "is" or out.resolve() in folder.resolve().parents:
            raise InputError(
                f"{f'{option} {out}'.lstrip()}: {relation} a model to read, or a part of it "
                f"({folder}); name another folder"
            )


def _move_folder(temporary: Path, out: Path) -> None:
    """Renames the folder to `out`, and removes the old one."""
    # The old folder goes last, so that a whole one exists at every moment.
    if out.exists():
        old = temporary.with_suffix(".old")
        out.rename(old)
        temporary.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    else:
        temporary.rename(out)
    _flush_folder(out.parent)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_umask() -> int:
    # The mask can only be read by setting it.
    mask = os.umask(0)
    os.umask(mask)
    return mask
