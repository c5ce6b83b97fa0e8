"""Writes the table of a study as Markdown, and all its numbers as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator

from corl_jax.estimates import format_digits
from corl_jax.runs.terminal import format_duration
from corl_jax.study.results import COMPLETIONS, COSTS, SECONDS, STEPS, Results
from corl_jax.study.seed_statistics import SeedMean

NOTHING = "–"
HEAD = ("kind", "variant", "seed", "metric", "value", "low", "high", "seeds")
RUN, MEAN, DIFFERENCE = "run", "mean", "difference"
"""Kinds of rows of the CSV file."""


def list_heads(results: Results) -> list[str]:
    """Returns the heads of the columns of the table."""
    study = results.study
    labels = [study.choose_metric(metric).label for metric in study.metrics]
    against = [f"{label}, less {study.baseline}" for label in labels] if study.baseline else []
    return ["variant", "seeds", *labels, *against, "steps", "completions", "time of a run"]


def list_rows(results: Results) -> Iterator[list[str]]:
    """Yields the cells of each variant."""
    study = results.study
    for variant in study.variants:
        num_finished = sum(name == variant for name, _ in results.records)
        whole = num_finished == len(study.seeds)
        cells = [variant, str(num_finished) if whole else f"{num_finished} of {len(study.seeds)}"]
        for metric in study.metrics:
            cells.append(format_mean(results.summarize(variant, metric), metric in results.rates))
        for metric in study.metrics if study.baseline else ():
            difference = results.compare(variant, metric)
            cells.append(format_difference(difference, metric in results.rates))
        for cost in (STEPS, COMPLETIONS):
            mean = results.summarize(variant, cost)
            cells.append(f"{mean.mean:,.0f}" if mean else NOTHING)
        seconds = results.summarize(variant, SECONDS)
        yield [*cells, format_duration(seconds.mean) if seconds else NOTHING]


def format_mean(value: SeedMean | None, is_rate: bool) -> str:
    """Returns a mean with its interval, as 64.3% (60.0 - 68.3); alone with one seed."""
    if value is None:
        return NOTHING
    text = f"{format_digits(value.mean, is_rate)}{'%' if is_rate else ''}"
    if value.half_width is None:
        return text
    low, high = (format_digits(end, is_rate) for end in (value.low, value.high))
    return f"{text} ({low} {'to' if value.low < 0 else '-'} {high})"


def format_difference(value: SeedMean | None, is_rate: bool) -> str:
    """Returns a difference with its interval, as +1.2 (-0.3 to +2.7); rates in points."""
    if value is None:
        return NOTHING
    text = format_digits(value.mean, is_rate, "+")
    if value.half_width is None:
        return text
    low, high = (format_digits(end, is_rate, "+") for end in (value.low, value.high))
    return f"{text} ({low} to {high})"


def explain_table(results: Results) -> list[str]:
    """Returns sentences on how to read the table."""
    study = results.study
    seeds = ", ".join(map(str, study.seeds))
    if len(study.seeds) > 1:
        spread = f"Means over the seeds {seeds} with 95% intervals (Student's t over the seeds)."
    else:
        spread = f"One seed ({seeds}), so there is no interval."
    lines = [spread]
    if study.baseline:
        lines.append(f"Differences from {study.baseline} are of runs with the same seed.")
    for metric in study.metrics:
        choice = study.choose_metric(metric)
        part = f"mean of the last {choice.steps} steps" if choice.steps else "last value"
        lines.append(f"{choice.label}: `{metric}`, {part}.")
    if any(variant.sources for variant in study.variants.values()):
        lines.append(
            "Steps, completions and time include those of the models that a run starts from."
        )
    devices = {str(r.provenance.get("devices", "not recorded")) for r in results.records.values()}
    if devices:
        lines.append(f"Devices: {'; '.join(sorted(devices))}.")
    if results.missing:
        lines.append(f"**Missing runs: {', '.join(results.missing)}.**")
    return lines


def make_markdown(results: Results) -> str:
    """Returns the table of a study as Markdown."""
    rows = [list_heads(results), *list_rows(results)]
    rows.insert(1, ["---"] * len(rows[0]))
    table = "".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |\n" for row in rows)
    return table + "\n" + "".join(f"- {line}\n" for line in explain_table(results))


def make_csv(results: Results) -> str:
    """Returns all numbers of a study in the long format: a value for each run, mean, difference."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(HEAD)
    for variant in results.study.variants:
        for metric in (*results.study.metrics, *COSTS):
            for seed, value in results.list_values(variant, metric).items():
                writer.writerow([RUN, variant, seed, metric, repr(value), "", "", 1])
            kinds = {MEAN: results.summarize(variant, metric)}
            kinds[DIFFERENCE] = results.compare(variant, metric)
            for kind, mean in kinds.items():
                if mean is not None:
                    writer.writerow([kind, variant, "", metric, *list_numbers(mean)])
    return file.getvalue()


def list_numbers(mean: SeedMean) -> list[str]:
    """Returns value, low, high and seeds of a row; ends are empty without an interval."""
    has_interval = mean.half_width is not None
    ends = [repr(mean.low), repr(mean.high)] if has_interval else ["", ""]
    return [repr(mean.mean), *ends, str(mean.num_seeds)]
