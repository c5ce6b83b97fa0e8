"""Draws the figure of a study: two metrics against each other, and each metric over steps."""

from __future__ import annotations

from collections.abc import Iterator

from corl_jax.report.charts import Cross, Line, draw_crosses, draw_lines, tile_charts
from corl_jax.study.results import Results
from corl_jax.study.seed_statistics import SeedMean

COLUMNS = 3


def draw_charts(results: Results) -> list[str]:
    """Returns the charts as SVG: the crosses of the first two metrics, then the curves."""
    return [*draw_comparison(results), *draw_curves(results)]


def draw_figure(results: Results) -> str | None:
    """Returns all charts as one SVG file; None if no finished run has a value."""
    charts = draw_charts(results)
    return tile_charts(charts, COLUMNS) if charts else None


def draw_comparison(results: Results) -> Iterator[str]:
    """Yields the first metric on x against the second on y, a cross of intervals per variant."""
    study, metrics = results.study, list(results.study.metrics)[:2]
    crosses = []
    for variant in study.variants:
        means = [mean for metric in metrics if (mean := results.summarize(variant, metric))]
        if len(means) == 2:
            crosses.append(Cross(variant, *map(list_ends, means)))
    if crosses:
        x_label, y_label = (study.choose_metric(metric).label for metric in metrics)
        is_rate = results.rates.issuperset(metrics)
        yield draw_crosses(f"{x_label} and {y_label}", crosses, x_label, y_label, is_rate)


def list_ends(mean: SeedMean) -> tuple[float, float, float]:
    """Returns low, mean, high."""
    return mean.low, mean.mean, mean.high


def draw_curves(results: Results) -> Iterator[str]:
    """Yields each metric over steps: the mean of each variant, and its interval as a band."""
    for metric in results.study.metrics:
        lines = []
        for variant in results.study.variants:
            curve = results.average_curve(variant, metric)
            # A single evaluation is no curve, and that of a merged model is at step 0.
            curve = curve if len(curve) > 1 else []
            points = [(step, mean.mean) for step, mean in curve]
            has_band = any(mean.half_width is not None for _, mean in curve)
            band = [(step, mean.low, mean.high) for step, mean in curve] if has_band else []
            lines.append(Line(variant, points, band))
        if any(line.points for line in lines):
            label = results.study.choose_metric(metric).label
            yield draw_lines(label, lines, metric in results.rates)
