"""Reads the results of a study from its run directories."""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path

from corl_jax.nearest import find_near_name
from corl_jax.report.read import RunRecord, read_run
from corl_jax.study.schema import Study
from corl_jax.study.seed_statistics import SeedMean, mean_over_seeds, paired_difference
from corl_jax.study.study_runs import count_completions, name_run

SECONDS, STEPS, COMPLETIONS = "seconds", "steps", "completions"
REDRAWN_BATCHES = "redraw/batches"
COSTS = (SECONDS, STEPS, COMPLETIONS)
"""Names of the costs of a run, in the place of a metric."""


@dataclasses.dataclass(frozen=True)
class Results:
    """What the finished runs of a study have come to."""

    study: Study
    records: dict[tuple[str, int], RunRecord]  # by variant and seed; finished runs only
    rates: set[str]  # metrics that are fractions, shown in percent

    @property
    def missing(self) -> list[str]:
        """The names of the runs that are not finished."""
        return [
            name_run(variant, seed)
            for variant in self.study.variants
            for seed in self.study.seeds
            if (variant, seed) not in self.records
        ]

    def list_values(self, variant: str, metric: str) -> dict[int, float]:
        """Returns seed -> value of a metric or a cost, for the runs that have one."""
        values = {
            seed: self.read_value(variant, seed, metric)
            for seed in self.study.seeds
            if (variant, seed) in self.records
        }
        return {seed: value for seed, value in values.items() if value is not None}

    def read_value(self, variant: str, seed: int, metric: str) -> float | None:
        """Returns a metric or a cost of a finished run; None if its log has none."""
        record = self.records[variant, seed]
        if metric in COSTS:
            return self.read_cost(variant, seed, metric)
        points, steps = record.read_points(metric), self.study.choose_metric(metric).steps
        if steps is not None:
            points = [(step, value) for step, value in points if step > record.last_step - steps]
            return statistics.fmean(value for _, value in points) if points else None
        return points[-1][1] if points else None

    def read_cost(self, variant: str, seed: int, cost: str) -> float | None:
        """Returns a cost of a run and of all runs whose models it starts from; None if unknown."""
        record = self.records.get((variant, seed))
        costs = [read_costs(record).get(cost) if record else None]
        for source in self.study.variants[variant].sources:
            costs.append(self.read_cost(source, seed, cost))
        known = [value for value in costs if value is not None]
        return sum(known) if len(known) == len(costs) else None

    def summarize(self, variant: str, metric: str) -> SeedMean | None:
        """Returns the mean of a metric over the seeds of a variant; None without a value."""
        values = self.list_values(variant, metric)
        return mean_over_seeds([*values.values()]) if values else None

    def compare(self, variant: str, metric: str) -> SeedMean | None:
        """Returns how a variant differs from the baseline with the same seeds."""
        baseline = self.study.baseline
        if baseline is None or variant == baseline:
            return None
        return paired_difference(
            self.list_values(variant, metric), self.list_values(baseline, metric)
        )

    def average_curve(self, variant: str, metric: str) -> list[tuple[int, SeedMean]]:
        """Returns (step, mean over seeds) at the steps that all finished runs have logged."""
        curves = [
            dict(record.read_points(metric))
            for (name, _), record in self.records.items()
            if name == variant
        ]
        steps = set.intersection(*map(set, curves)) if curves else set()
        return [
            (step, mean_over_seeds([curve[step] for curve in curves])) for step in sorted(steps)
        ]


def read_results(study: Study) -> Results:
    """Reads the finished runs of a study."""
    records = {}
    for variant in study.variants:
        for seed in study.seeds:
            name = name_run(variant, seed)
            record = read_run(Path(study.output_dir, name), name)
            if record.is_finished:
                records[variant, seed] = record
    rates = {
        metric
        for metric in study.metrics
        if any(value.is_rate for r in records.values() for _, value in r.read_estimates(metric))
    }
    return Results(study, records, rates)


def read_costs(record: RunRecord) -> dict[str, float]:
    """Returns seconds, steps and completions of a finished run, as far as its files say."""
    steps, seconds = record.summary["steps"], record.summary.get("seconds")
    costs = {STEPS: float(steps)}
    if isinstance(seconds, int | float):
        costs[SECONDS] = float(seconds)
    if record.config:
        # Each further batch of a step costs what the step itself samples.
        batches = [value for _, value in record.read_points(REDRAWN_BATCHES)]
        sampled = float(count_completions(record.config, steps))
        costs[COMPLETIONS] = sampled * (1 + (statistics.fmean(batches) if batches else 0))
    return costs


def find_unknown_metrics(results: Results, prefix: str = "") -> list[str]:
    """Returns a line for each metric with a prefix that no finished run has logged."""
    known = {name for record in results.records.values() for name in record.list_metrics()}
    lines = []
    for name in results.study.metrics:
        if known and name.startswith(prefix) and name not in known:
            near = find_near_name(name, known)
            hint = f"did you mean {near}?" if near else "docs/reference/metrics.md lists all"
            lines.append(f"metrics.{name}: no finished run has logged it; {hint}")
    return lines
