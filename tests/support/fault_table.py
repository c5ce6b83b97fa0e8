"""The figures that tests of faults measure, printed as one table at the end.

def test_kills(figure):
    ...
    figure("T1", fault="kill -9 in a save", tries=20, hits=19, losses=mismatches, note="...")
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import pytest

COLUMNS = ("id", "fault", "tries", "hits", "losses", "seconds", "result", "note")


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Records a row of the table; rows of one `row` and `fault` are added up over tests.

    `row`: the fault's name in the docs, as `T7b`. `tries`: faults made. `hits`: those
    that met what they were aimed at (a kill that fell into a save). `losses`: wrong outcomes, of
    which the promise is 0; the test itself asserts that. Seconds are since the last call, or
    since the test began.
    """
    began = time.perf_counter()

    def record(
        row: str,
        *,
        fault: str,
        tries: int,
        hits: int | None = None,
        losses: int,
        note: str = "",
        seconds: float | None = None,
    ) -> None:
        nonlocal began
        now = time.perf_counter()
        values = {
            "id": row, "fault": fault, "tries": int(tries),
            "hits": int(tries if hits is None else hits), "losses": int(losses),
            "seconds": now - began if seconds is None else seconds, "note": note,
        }  # fmt: skip
        began = now
        # Properties travel with a test's report, from a worker's process too.
        request.node.user_properties.append(("figure", values))

    return record


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Prints the figures of every test that recorded some, and the tests that failed without."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for result in ("passed", "failed"):
        for report in terminalreporter.stats.get(result, []):
            if report.when != "call" and result == "passed":
                continue
            figures = [value for name, value in report.user_properties if name == "figure"]
            if not figures and result == "failed" and "tests/faults/" in report.nodeid:
                figures = [{"id": "?", "fault": report.nodeid.partition("faults/")[2]}]
            for values in figures:
                _add(rows, values, result)
    if rows:
        terminalreporter.section("faults")
        for line in _table(sorted(rows.values(), key=_order)):
            terminalreporter.write_line(line)


def _add(rows: dict[tuple[str, str], dict[str, Any]], values: dict[str, Any], result: str) -> None:
    row = rows.setdefault((values["id"], values["fault"]), {"result": "passed"})
    for name, value in values.items():
        if isinstance(value, int | float):
            row[name] = row.get(name, 0) + value
        elif name == "note":
            row[name] = "; ".join(filter(None, dict.fromkeys([row.get(name, ""), value])))
        else:
            row[name] = value
    if result == "failed":
        row["result"] = "FAILED"


def _order(row: dict[str, Any]) -> tuple[int, str, str]:
    number = re.search(r"\d+", row["id"])
    return int(number.group()) if number else 99, row["id"], row["fault"]


def _table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of a markdown table, so that they can be pasted into the docs."""

    def cell(value: Any) -> str:
        return f"{value:.1f}" if isinstance(value, float) else str(value).replace("|", "/")

    cells = [COLUMNS, *([cell(row.get(name, "")) for name in COLUMNS] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]

    def line(texts: Any) -> str:
        padded = (
            text.rjust(width) if re.fullmatch(r"[\d.]+", text) else text.ljust(width)
            for text, width in zip(texts, widths, strict=True)
        )
        return f"| {' | '.join(padded)} |"

    return [line(cells[0]), f"|{'|'.join('-' * (w + 2) for w in widths)}|", *map(line, cells[1:])]
