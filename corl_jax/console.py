"""Prints text to consoles of any encoding, without errors and without advice of other libraries."""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterator

TRANSFORMERS_QUIET = "TRANSFORMERS_NO_ADVISORY_WARNINGS"


def escape_unprintable_text() -> None:
    """Makes standard output and error print missing characters as escapes such as \\u2265."""
    # Another handler is the user's choice by PYTHONIOENCODING, and stays. `surrogateescape` is
    # Python's choice for the C locale.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")


def write_json_lines(text: str) -> None:
    """Writes JSON to standard output, with JSON's escapes if its encoding is not UTF-8."""
    # JSON has no escape like Python's \U0001f600, and its readers expect UTF-8 or ASCII.
    if codecs.lookup(sys.stdout.encoding or "ascii").name != "utf-8":
        text = re.sub(r"[^\x00-\x7f]", lambda match: json.dumps(match[0])[1:-1], text)
    sys.stdout.write(text)


def print_status(text: str) -> None:
    """Prints to standard error; a console that cannot be written, as on a full disk, is ignored."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def hide_import_advice() -> Iterator[None]:
    """Imports transformers in the block without its advice to install PyTorch.

    Only tokenizers are used here, and they need no PyTorch. Warnings after the block are printed.
    """
    before = os.environ.get(TRANSFORMERS_QUIET)
    os.environ[TRANSFORMERS_QUIET] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(TRANSFORMERS_QUIET, None)
        else:
            os.environ[TRANSFORMERS_QUIET] = before


@contextlib.contextmanager
def show_progress(what: str) -> Iterator[Callable[[int], None] | None]:
    """Shows a byte counter on a terminal; nothing elsewhere, so that logs stay readable."""
    if not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    with tqdm(desc=what, unit="B", unit_scale=True, unit_divisor=1000) as bar:

        def advance(count: int) -> None:
            bar.update(count)

        yield advance
