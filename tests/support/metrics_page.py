"""docs/reference/metrics.md as the tests read it: which metrics it lists, by section."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "metrics.md"
STANDS_FOR = {
    "TASK": "(t2i|mm2t|think|self_qa|caption)",
    "SEGMENT": "(t2i|mm2t|think/text|think/codes|self_qa/codes|self_qa/text)",
    "TEXT": "(mm2t|think/text|self_qa/text)", "IMAGE": "(t2i|think/codes|self_qa/codes)",
    "NAME": "[^/]+",
    "ALARM": "[a-z_]+", "KIND": "[a-z_]+",
}  # fmt: skip


@functools.cache
def listed() -> dict[str, dict[str, re.Pattern]]:
    """Section -> name as it is written -> what it matches."""
    found: dict[str, dict[str, re.Pattern]] = {}
    section = ""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ")
        if line.startswith("| `"):
            for name in re.findall(r"`([^`]+)`", line.split("|")[1]):
                found.setdefault(section, {})[name] = _pattern(name)
    return found


def _pattern(name: str) -> re.Pattern:
    for word, expression in STANDS_FOR.items():
        name = re.sub(rf"(?<![A-Z]){word}(?![A-Z])", lambda _: expression, name)  # noqa: B023
    return re.compile(name)


def missing(names: Iterable[str]) -> list[str]:
    """The metrics that the page lacks."""
    patterns = [pattern for of in listed().values() for pattern in of.values()]

    def is_listed(name: str) -> bool:
        # eval/mmstar/accuracy of `eval.suites` is listed as eval/accuracy
        short = re.sub(r"^eval/[^/]+/", "eval/", name)
        return any(p.fullmatch(text) for p in patterns for text in (name, short))

    return sorted(name for name in set(names) if not is_listed(name))


def never(sections: Iterable[str], names: Iterable[str]) -> list[str]:
    """What the page lists in these sections and none of the metrics is."""
    found = list(names)
    return [
        written
        for section in sections
        for written, pattern in listed()[section].items()
        if not any(map(pattern.fullmatch, found))
    ]
