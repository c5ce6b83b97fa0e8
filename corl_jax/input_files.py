"""Reads inputs of users: paths with `~` and `$VAR`, UTF-8 text, Git LFS pointers.

Every command reads inputs through this module, so that all accept and refuse the same.
It imports only `errors`.
"""

from __future__ import annotations

import argparse
import codecs
import os
import re
from pathlib import Path

from corl_jax.errors import InputError

LFS_PREFIX = b"version https://git-lfs.github.com/spec/"
LFS_POINTER_MAX_BYTES = 1024  # the size that git-lfs allows a pointer
BYTE_ORDER_MARK = codecs.BOM_UTF8  # that Windows editors put before a text
LONE_SURROGATE = (
    "holds a lone surrogate (half of a character, such as \\ud83d), which is no text; expected "
    "whole characters: write it again from its source"
)
"""The problem and the remedy for a text for which `has_lone_surrogate` is true."""
_VARIABLE = re.compile(r"\$(?:\{([^}]*)\}|(\w+))")


def expand_path(text: str | os.PathLike[str]) -> str:
    """Returns a path or URL with `~`, `$VAR` and `${VAR}` replaced, as a shell would do.

    Raises: InputError for a variable that is not set, and for a `~` whose home is unknown.
    """
    path = os.fspath(text)
    # expandvars leaves an unset variable in the text: "$DATA/x" would be in a folder named "$DATA".
    unset = sorted({a or b for a, b in _VARIABLE.findall(path) if (a or b) not in os.environ})
    if unset:
        raise InputError(
            f"{path}: ${', $'.join(unset)} is not set; export it, or write the path out"
        )
    expanded = os.path.expandvars(path)
    if not expanded.startswith("~"):
        return expanded
    with_home = os.path.expanduser(expanded)
    if with_home == expanded:  # expanduser does not raise for an unknown user or a missing home
        raise InputError(f"{path}: the home directory of `~` is not known; write the path out")
    return with_home


def parse_place(text: str) -> str:
    """Returns a command line's path, URL or hub id as `expand_path` does; argparse's `type`."""
    try:
        return expand_path(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parse_path(text: str) -> Path:
    """Returns a command line's path as `expand_path` does; argparse's `type`."""
    return Path(parse_place(text))


def is_lfs_pointer(path: Path) -> bool:
    """Returns whether a file is a Git LFS pointer, the text that git stores in place of the file.

    False for a missing or unreadable file; reading it gives the reason.
    """
    try:
        with path.open("rb") as file:
            start = file.read(len(LFS_PREFIX))
            size = file.seek(0, os.SEEK_END)
    except OSError:
        return False
    return start == LFS_PREFIX and size <= LFS_POINTER_MAX_BYTES


def describe_lfs_pointer(path: Path) -> str:
    """Returns the problem line of a file for which `is_lfs_pointer` is true."""
    return f"{path}: is a Git LFS pointer, not the file itself; run `git lfs pull` in its clone"


def read_text(path: Path, expected: str = "a text file", max_bytes: int | None = None) -> str:
    """Returns a file's UTF-8 text without a byte order mark; line ends stay as they are.

    `expected` completes "expected ..." in messages. A file of more than `max_bytes` is not read.

    Raises: InputError for a file that is missing, too large, not readable, not UTF-8 or a Git LFS
        pointer.
    """
    try:
        with path.open("rb") as file:
            # One byte more than allowed shows that a file is too large, without reading all of it.
            content = file.read(-1 if max_bytes is None else max_bytes + 1)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"{path}: cannot be read ({reason}); expected {expected}") from None
    if max_bytes is not None and len(content) > max_bytes:
        raise InputError(f"{path}: has more than {max_bytes:,} bytes; expected {expected}")
    if content.startswith(LFS_PREFIX) and len(content) <= LFS_POINTER_MAX_BYTES:
        raise InputError(describe_lfs_pointer(path))
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: is not UTF-8 at byte {error.start}; expected {expected} in UTF-8"
        ) from None


def has_lone_surrogate(text: str) -> bool:
    """Returns whether UTF-8 cannot hold a text, such as half of a \\ud83d\\ude00 pair from JSON."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
