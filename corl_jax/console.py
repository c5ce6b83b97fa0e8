"""Prints text to consoles whose encoding is not UTF-8, without errors."""

from __future__ import annotations

import codecs
import io
import json
import re
import sys


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
