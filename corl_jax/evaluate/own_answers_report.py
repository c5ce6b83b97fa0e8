"""The report of the suite `own_answers`: rates by category, the imbalance table, the units."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from corl_jax.evaluate.own_answers_files import AskedImage
from corl_jax.evaluation.answer_summary import AnswerSummary, summarize_answers
from corl_jax.evaluation.image_store import write_whole
from corl_jax.evaluation.imbalance import (
    Imbalance,
    Trial,
    collect_units,
    format_imbalance,
    measure_imbalance,
)
from corl_jax.evaluation.intervals import Rate
from corl_jax.evaluation.own_answers import BLANK, FOREIGN, OWN
from corl_jax.evaluation.units import REPORT_FILE, SCORES_FILE, Unit, format_units

ALL = "all"
"""Name of the row over the images of all categories."""
HEADS = {OWN: "own images", FOREIGN: "foreign images", BLANK: "grey image"}


@dataclasses.dataclass(frozen=True)
class Report:
    """The results of an evaluation."""

    answers: dict[str, dict[str, AnswerSummary]]  # by source, then by tag and ALL
    drawing: Rate | None  # own images that are right; None without verdicts
    imbalance: dict[str, Imbalance]  # by tag and their mean; empty without verdicts
    units: list[Unit]

    @property
    def hacking_gap(self) -> float | None:
        """How much more own images agree with their answers than are right."""
        return None if self.drawing is None else self._believed.mean - self.drawing.mean

    @property
    def _believed(self) -> Rate:
        return self.answers[OWN][ALL].accuracy

    def describe_gap(self) -> str:
        """Returns a sentence about the gap. Only with verdicts."""
        assert self.drawing is not None and self.hacking_gap is not None
        return (
            f"hacking gap {100 * self.hacking_gap:+.1f} points: by its own answers "
            f"{self._believed.mean:.1%} of its images show their prompts, by the verdicts "
            f"{self.drawing.mean:.1%}"
        )


def make_report(rows: Sequence[Mapping[str, Any]], images: Sequence[AskedImage]) -> Report:
    """Returns the results of the rows of answers, each with its image."""
    answers = {}
    for source in HEADS:
        chosen = [row for row in rows if row["source"] == source]
        if chosen:
            answers[source] = _summarize(chosen, [row["tag"] for row in chosen])
            answers[source] |= _summarize(chosen, [ALL] * len(chosen))
    trials = _make_trials(rows, images)
    drawn = [trial.drawn for trial in trials if trial.drawn is not None]
    return Report(
        answers,
        Rate.of(sum(drawn), len(drawn)) if drawn else None,
        measure_imbalance(trials) if drawn else {},
        collect_units(trials),
    )


def _summarize(
    rows: Sequence[Mapping[str, Any]], categories: Sequence[str]
) -> dict[str, AnswerSummary]:
    names = ("answer", "correct", "tokens", "cut")
    texts, correct, lengths, is_cut = ([row[name] for row in rows] for name in names)
    return summarize_answers(texts, categories, correct, lengths, is_cut)


def _make_trials(rows: Sequence[Mapping[str, Any]], images: Sequence[AskedImage]) -> list[Trial]:
    foreign = {
        image.place: row["correct"]
        for row, image in zip(rows, images, strict=True)
        # A foreign image that is wrong says nothing about the model.
        if row["source"] == FOREIGN and image.is_right is not False
    }
    return [
        Trial(
            f"{image.prompt:05d}", row["tag"], image.is_right, row["correct"],
            foreign.get(image.place),
        )
        for row, image in zip(rows, images, strict=True)
        if row["source"] == OWN
    ]  # fmt: skip


def write_files(
    out: Path, report: Report, settings: Mapping[str, Any], counts: Mapping[str, Any]
) -> None:
    """Writes scores.jsonl and report.json, each whole."""
    content = {
        "settings": settings,
        "counts": counts,
        "answers": {
            source: {tag: dataclasses.asdict(row) for tag, row in tags.items()}
            for source, tags in report.answers.items()
        },
        "drawing": None if report.drawing is None else dataclasses.asdict(report.drawing),
        "hacking_gap": report.hacking_gap,
        "imbalance": {tag: row.as_json() for tag, row in report.imbalance.items()},
    }
    write_whole(out, SCORES_FILE, format_units(report.units).encode(errors="backslashreplace"))
    write_whole(out, REPORT_FILE, format_json(content))


def format_json(content: Mapping[str, Any]) -> bytes:
    """Returns the content of a JSON file."""
    text = json.dumps(content, indent=1, ensure_ascii=False)
    return f"{text}\n".encode(errors="backslashreplace")


def format_report(report: Report, judge: str) -> str:
    """Returns the tables for people, in per cent."""
    parts = [f"right answers in %, judged by {judge}\n{format_answers(report.answers)}"]
    if report.imbalance:
        parts += [format_imbalance(report.imbalance), report.describe_gap()]
    else:
        parts.append("no imbalance table: it needs --verdicts on the own images")
    return "\n\n".join(parts)


def format_answers(answers: Mapping[str, Mapping[str, AnswerSummary]]) -> str:
    """Returns a table: a line a category, with the length and entropy of answers on own images."""
    tags_of_own = answers[OWN]
    width = max(map(len, [*tags_of_own, "category"]))
    heads = "".join(f" {HEADS[source]:>23}" for source in answers)
    lines = [f"{'category':{width}}{heads}  tokens  empty    cut  entropy"]
    for tag, row in tags_of_own.items():
        cells = [
            _format_rate(tags[tag].accuracy) if tag in tags else "-" for tags in answers.values()
        ]
        numbers = f"{row.mean_length:8.1f} {100 * row.empty.mean:6.1f} {100 * row.cut.mean:6.1f}"
        texts = "".join(f" {cell:>23}" for cell in cells)
        lines.append(f"{tag:{width}}{texts}{numbers} {row.entropy:8.2f}")
    return "\n".join(lines)


def _format_rate(rate: Rate) -> str:
    return f"{100 * rate.mean:.1f} ({100 * rate.low:.1f} .. {100 * rate.high:.1f})"
