"""Text on consoles whose encoding is not UTF-8: nothing that is printed ends a command."""

from __future__ import annotations

import codecs
import io
import json
import re
import sys


def escape_unprintable_text() -> None:
    """Lets standard output and error print what their encoding lacks as an escape such as \\u2265.

    Another handling of errors than `strict`, which PYTHONIOENCODING can name, stays as it is.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")


def write_json_lines(text: str) -> None:
    """Writes JSON to standard output, where that is not UTF-8 with JSON's own escapes.

    JSON has no escape like Python's \\U0001f600, and its readers expect UTF-8 or ASCII.
    """
    if codecs.lookup(sys.stdout.encoding or "ascii").name != "utf-8":
        text = re.sub(r"[^\x00-\x7f]", lambda match: json.dumps(match[0])[1:-1], text)
    sys.stdout.write(text)
