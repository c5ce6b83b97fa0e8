"""Rates answers, prints and writes the report of the suite `tsv`."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from corl_jax.atomic_files import replace_file
from corl_jax.data.questions import to_json_line
from corl_jax.evaluation.intervals import format_rates
from corl_jax.evaluation.tsv.kinds import EXACT_MATCHING, KINDS, can_be_rated
from corl_jax.evaluation.tsv.rating import Rating, RatingOptions
from corl_jax.evaluation.tsv.table import PREDICTION, Table, Values
from corl_jax.evaluation.units import SCORES_FILE, format_units

REPORT, VERDICTS, NEXT = "report.json", "verdicts.jsonl", "NEXT.txt"
MAX_UNREAD_SHARE = 0.02
NUM_EXAMPLES = 5
EXAMPLE_LENGTH = 160  # characters of an answer that are shown


@dataclasses.dataclass(frozen=True)
class Report:
    """A rating with what it was made of."""

    settings: Mapping[str, Any]
    counts: Mapping[str, Any]
    rating: Rating
    examples: list[dict[str, Any]]  # answers that no rule reads
    judge: str  # of the official command

    @property
    def unread_share(self) -> float:
        """The share of answers that no rule reads."""
        verdicts = self.rating.verdicts
        return len(self.rating.unread) / len(verdicts) if verdicts else 0.0

    def as_json(self) -> dict[str, Any]:
        """Returns the report as plain values."""
        rating = self.rating
        return {
            "settings": dict(self.settings),
            "counts": dict(self.counts),
            "rates": {name: dataclasses.asdict(rate) for name, rate in rating.rates.items()},
            "scores": {name: dataclasses.asdict(score) for name, score in rating.scores.items()},
            "table": rating.table,
            "unread": {
                "count": len(rating.unread), "share": self.unread_share, "examples": self.examples,
            },
            "notes": rating.notes,
            "needs_judge": None if rating.is_final else self.judge,
        }  # fmt: skip


def rate_rows(
    table: Table, kind: str, rows: Sequence[Values], options: RatingOptions,
    settings: Mapping[str, Any], counts: Mapping[str, Any],
) -> Report:  # fmt: skip
    """Rates rows with predictions."""
    if can_be_rated(table, kind):
        rating = KINDS[kind].rate(rows, options)
    else:
        rating = Rating(is_final=False, notes=[f"{table.path} states no answers; nothing is rated"])
    predictions = {row["index"]: row[PREDICTION] for row in rows}
    examples = [
        {"index": index, "prediction": predictions[index]} for index in rating.unread[:NUM_EXAMPLES]
    ]
    return Report(settings, counts, rating, examples, KINDS[kind].judge)


def describe_command(predictions: Path, table: Table, kind: str) -> str:
    """Returns the content of NEXT.txt: the official command for a prediction file."""
    judge = KINDS[kind].judge
    suffix = predictions.suffix[1:]
    words = [f"LMUData={shlex.quote(str(table.path.absolute().parent))}"]
    words += [f"PRED_FORMAT={suffix}"] if suffix != "xlsx" else []
    words += ["vlmutil", "eval", shlex.quote(str(predictions.absolute()))]
    words += ["--judge", judge] if judge else []
    lines = [
        f"# VLMEvalKit rates the same file, with the data set {table.name} in the folder LMUData.",
        "# It compares known data sets with its own copies, and may download them.",
    ]
    if judge not in ("", EXACT_MATCHING):
        lines.append("# The judge needs an OpenAI key: export OPENAI_API_KEY=...")
    return "\n".join([*lines, " ".join(words), ""])


def print_report(report: Report) -> None:
    """Prints rates, scores, warnings and the judge."""
    rating, settings = report.rating, report.settings
    shown = {key: settings[key] for key in ("kind", "matcher", "answer_tag")}
    print(", ".join(f"{key} {value}" for key, value in shown.items()))
    if rating.rates:
        print(format_rates(rating.rates))
    if rating.scores:
        width = max(map(len, rating.scores))
        print(f"{'score':{width}}    value   95% interval      n")
        for name, score in rating.scores.items():
            interval = f"{score.low:6.1f} .. {score.high:6.1f}"
            print(f"{name:{width}} {score.value:8.2f} {interval} {score.n:4}")
    if rating.verdicts:
        print(
            f"no rule reads {len(rating.unread)} of {len(rating.verdicts)} answers "
            f"({report.unread_share:.1%})"
        )
    for note in rating.notes:
        print(f"note: {note}", file=sys.stderr)
    for name, count in report.counts.items():
        if name != "rows" and count:
            print(f"note: {count} {name.replace('_', ' ')}", file=sys.stderr)
    # Of judged sets a small share is what rules read; their rate says it.
    if rating.is_final and report.unread_share > MAX_UNREAD_SHARE:
        print(
            f"warning: answers that no rule reads count as wrong; {report.unread_share:.1%} are "
            f"more than {MAX_UNREAD_SHARE:.0%}, such as:",
            file=sys.stderr,
        )
        for example in report.examples:
            text = example["prediction"][:EXAMPLE_LENGTH]
            print(f"  index {example['index']}: {text!r}", file=sys.stderr)
    if not rating.is_final:
        command = f"vlmutil eval FILE --judge {report.judge}" if report.judge else "vlmutil eval"
        print(f"no final score: rules read only a part; {command} rates all answers")


def write_files(folder: Path, report: Report, command: str) -> None:
    """Writes report.json, scores.jsonl, verdicts.jsonl and NEXT.txt, each whole or not at all."""
    content = json.dumps(replace_nan(report.as_json()), indent=1, ensure_ascii=False) + "\n"
    verdicts = "".join(to_json_line(dataclasses.asdict(v)) for v in report.rating.verdicts)
    files = {REPORT: content, VERDICTS: verdicts, NEXT: command}
    if report.rating.units:
        files[SCORES_FILE] = format_units(report.rating.units)
    for name, text in files.items():
        with replace_file(folder / name) as file:
            file.write(text.encode(errors="backslashreplace"))


def replace_nan(value: Any) -> Any:
    """Returns a value in which None stands for NaN, which JSON lacks."""
    if isinstance(value, dict):
        return {key: replace_nan(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [replace_nan(entry) for entry in value]
    return None if isinstance(value, float) and math.isnan(value) else value
