"""Renders the page of a report from the records of runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from corl_jax.estimates import Estimate
from corl_jax.report import curves
from corl_jax.report.changes import Change, compare
from corl_jax.report.gallery import MAX_CARDS, Gallery, read_galleries
from corl_jax.report.groups import TaskGroups, read_groups
from corl_jax.report.labels import describe_metric
from corl_jax.report.options import Start, list_options, read_start
from corl_jax.report.read import RunRecord
from corl_jax.runs.terminal import format_duration

TEMPLATE = "template.html"
UNKNOWN = "not recorded"


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a table: a label and a text for each run."""

    label: str
    texts: list[str]


@dataclasses.dataclass(frozen=True)
class ChangeCell:
    """A metric of the first and the last evaluation of a run."""

    first: Estimate | None
    last: Estimate | None
    change: Change | None


@dataclasses.dataclass(frozen=True)
class ChangeRow:
    """A metric of evaluations, with a cell for each run."""

    label: str
    is_headline: bool
    cells: list[ChangeCell]


@dataclasses.dataclass(frozen=True)
class Section:
    """What the page shows of a single run."""

    name: str
    galleries: dict[str, Gallery]
    groups: list[TaskGroups]
    phases: curves.Phases | None
    start: Start | None
    notes: list[str]


def render_page(records: Sequence[RunRecord]) -> bytes:
    """Returns the HTML file of a report. The same files give the same bytes."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # prompts, options and metrics are texts of other people
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    options = list_options([record.config for record in records])
    text = environment.get_template(TEMPLATE).render(
        title=", ".join(record.name for record in records),
        names=[record.name for record in records],
        summary=summarize(records),
        changes=list_changes(records),
        training_charts=[Markup(svg) for svg in curves.draw_training(records)],
        evaluation_charts=[Markup(svg) for svg in curves.draw_evaluations(records, True)],
        category_charts=[Markup(svg) for svg in curves.draw_evaluations(records, False)],
        health_charts=[Markup(svg) for svg in curves.draw_health(records)],
        gaps=curves.list_gaps(records),
        sections=make_sections(records),
        options=options,
        varying=[row for row in options if row.varies],
        differing=[row for row in options if row.differs],
        config_changes=[(r.name, change) for r in records for change in r.changes],
        versions=list_versions(records),
        metric=describe_metric,
        number=format_reward,
    )
    # A text may have half of a surrogate pair, which no UTF-8 file can hold.
    return text.encode("utf-8", "replace")


def format_reward(value: float | None) -> str:
    """Returns a reward or advantage; a dash where it does not apply."""
    return "–" if value is None or value != value else f"{value:.3g}"


def make_sections(records: Sequence[RunRecord]) -> list[Section]:
    """Reads and draws what each run shows alone."""
    sections = []
    for record in records:
        notes = list(record.notes)
        galleries = read_galleries(record.root / "images", notes, MAX_CARDS // min(len(records), 3))
        groups = read_groups(record.root, notes)
        phases = curves.measure_phases(record)
        start = read_start(record.provenance)
        sections.append(Section(record.name, galleries, groups, phases, start, notes))
    return sections


# ---- tables


def summarize(records: Sequence[RunRecord]) -> list[Row]:
    """Returns what was trained, how long, and the headline of the evaluations."""
    describe: dict[str, Callable[[RunRecord], str]] = {
        "state": describe_state,
        "model": describe_model,
        "algorithm": describe_algorithm,
        "rewards": describe_rewards,
        "batch": describe_batch,
        "hardware": lambda record: str(record.provenance.get("devices", UNKNOWN)),
        "time": describe_time,
    }
    rows = [Row(label, [function(r) for r in records]) for label, function in describe.items()]
    for row in list_changes(records):
        if row.is_headline and len(records) > 1:  # a single run has tiles for them
            rows.append(Row(row.label, [describe_cell(cell) for cell in row.cells]))
    return rows


def describe_state(record: RunRecord) -> str:
    """Returns whether the run is finished, and how many steps it has done."""
    total = record.total_steps
    if record.is_finished:
        return f"finished, {record.summary['steps']:,} steps"
    of_total = f" of {total:,}" if total else ""
    return f"not finished: step {record.last_step:,}{of_total} is the newest in the log"


def describe_model(record: RunRecord) -> str:
    """Returns the model's path, and how many parameters are trained."""
    model = record.provenance.get("model")
    path = record.get_option("model", "path") or UNKNOWN
    if not isinstance(model, dict):
        return str(path)
    total, trained = (_format_count(model.get(name)) for name in ("parameters", "trained"))
    return f"{path} ({model.get('family')}), {total} parameters, {trained} trained"


def _format_count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "unknown"


def describe_algorithm(record: RunRecord) -> str:
    """Returns algorithm, tasks and advantages; the stage without rewards."""
    name, stage = record.get_option("algorithm", "name"), record.get_option("stage")
    if not record.get_option("rewards"):
        return f"stage {stage}" if stage else UNKNOWN
    tasks = record.get_option("algorithm", "tasks")
    return (
        f"{name}, tasks: {tasks}, learning rate {record.get_option('optimizer', 'learning_rate')}"
    )


def describe_rewards(record: RunRecord) -> str:
    """Returns the names of the rewards with their weights."""
    rewards = record.get_option("rewards")
    if not isinstance(rewards, list):
        return "none"
    texts = []
    for reward in rewards:
        if isinstance(reward, dict):
            name, weight = reward.get("name") or reward.get("use"), reward.get("weight", 1)
            texts.append(str(name) if weight == 1 else f"{weight} x {name}")
    return ", ".join(texts) or "none"


def describe_batch(record: RunRecord) -> str:
    """Returns how many prompts a step has, and how many completions a prompt."""
    prompts = record.get_option("train", "prompts_per_step")
    group = record.get_option("rollout", "group_size")
    if not record.get_option("rewards"):
        return f"{prompts} rows a step"
    return f"{prompts} prompts a step, {group} completions a prompt and task"


def describe_time(record: RunRecord) -> str:
    """Returns the duration of a finished run, and the seconds of a step."""
    texts = []
    seconds = record.summary.get("seconds")
    if record.is_finished and isinstance(seconds, int | float):
        texts.append(format_duration(seconds))
    phases = curves.measure_phases(record)
    if phases is not None:
        texts.append(f"{phases.step_seconds:.3g} s a step")
    return ", ".join(texts) or UNKNOWN


def describe_cell(cell: ChangeCell) -> str:
    """Returns a metric before and after, with the change."""
    if cell.last is None:
        return "not measured"
    if cell.first is None or cell.change is None:
        return cell.last.format()
    return f"{cell.first.format()} → {cell.last.format()}; change {cell.change.format()}"


def list_changes(records: Sequence[RunRecord]) -> list[ChangeRow]:
    """Returns a row for each metric of the evaluations that has an interval."""
    names = curves.list_estimated_metrics(records)
    headline = curves.choose_headline(names)
    return [
        ChangeRow(describe_metric(name), name in headline, [_read_cell(r, name) for r in records])
        for name in names
    ]


def _read_cell(record: RunRecord, name: str) -> ChangeCell:
    estimates = record.read_estimates(name)
    if not estimates:
        return ChangeCell(None, None, None)
    if len(estimates) == 1:
        return ChangeCell(None, estimates[0][1], None)
    first, last = estimates[0][1], estimates[-1][1]
    return ChangeCell(first, last, compare(first, last))


def list_versions(records: Sequence[RunRecord]) -> list[Row]:
    """Returns the versions and the commit that each run was made with."""
    versions = [record.provenance.get("versions") for record in records]
    known = [value if isinstance(value, dict) else {} for value in versions]
    names = dict.fromkeys(["corl_jax", "jax", "python", *(n for of_run in known for n in of_run)])
    rows = [Row(name, [str(of_run.get(name, UNKNOWN)) for of_run in known]) for name in names]
    commits = [str(record.provenance.get("commit") or UNKNOWN) for record in records]
    return [Row("commit", commits), *rows]
