"""Says what a finished run has come to, and recognises one before its model is loaded."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from corl_jax.config.chains import STAGES_KEY, list_folders
from corl_jax.config.schema import Config
from corl_jax.devices import processes
from corl_jax.errors import InputError
from corl_jax.estimates import read_estimate
from corl_jax.evaluation import SUITES
from corl_jax.runs import fingerprints, same_files
from corl_jax.runs.checkpoints import Checkpoints
from corl_jax.runs.directory import REPORT, SUMMARY, RunDir, list_differences
from corl_jax.runs.export_record import is_up_to_date, read_record
from corl_jax.runs.terminal import format_duration
from corl_jax.tasks import image_tasks, plan_tasks, text_tasks
from corl_jax.train.average import has_average
from corl_jax.train.banner import Row, align_rows, suggest_tensorboard
from corl_jax.train.export import describe_sampling, make_record
from corl_jax.train.milestones import read_evaluations
from corl_jax.train.reports import HEADLINE
from corl_jax.train.resolve import ResolvedRun
from corl_jax.train.resume import hash_reward_files

MAX_SHOWN = 80  # characters of a prompt or question in a suggested command
MAX_METRICS = 8


# ---- is there anything left to do


def stamp_sources(planned: ResolvedRun) -> str:
    """Returns a stamp of the files that the weights of a run are read from."""
    networks = [Path(network.path) for network in planned.networks]
    return same_files.stamp_files([Path(planned.model_dir), *networks])


def is_finished(
    planned: ResolvedRun, directory: RunDir, checkpoints: Checkpoints, steps: list[int]
) -> bool:
    """Returns whether all steps are saved, all results written, and nothing has changed since.

    `steps`: the saved ones. Where it is not certain the answer is no: then the run is resumed,
    which checks weights and arrays bit by bit. All processes must call it.
    """
    finished = False
    if jax.process_index() == 0 and steps[-1:] == [planned.steps]:
        try:
            record = checkpoints.read_record(planned.steps)
            finished = _is_record_current(planned, directory, record)
        except Exception:  # orbax raises errors of many types
            # The run is resumed, which reads the record again and says what is wrong.
            finished = False
    # The first process decides, because another one may not yet see its files.
    return bool(processes.broadcast_first(int(finished)))


def _is_record_current(planned: ResolvedRun, directory: RunDir, record: dict[str, Any]) -> bool:
    """Returns whether the record of the last step, its results and the config fit together."""
    config, meta, step = planned.config, record["run"], planned.steps
    if record["schema_version"] != fingerprints.SCHEMA_VERSION or meta["unreported"]:
        return False
    start = meta["working_directory"]
    if list_differences(meta["config"], config.model_dump(mode="json"), start):
        return False
    if meta.get("sources") != stamp_sources(planned):
        return False
    if any(meta["weights"].get(file) != mark for file, mark in hash_reward_files(config).items()):
        return False
    planned.train_loader.set_state(meta["data"])  # an InputError if the data has changed
    summary = directory.read_json(SUMMARY) or {}
    return summary.get("steps") == step and _is_export_current(planned, directory, record)


def _is_export_current(planned: ResolvedRun, directory: RunDir, record: dict[str, Any]) -> bool:
    config, before = planned.config, read_record(directory.export)
    if config.export.layout == "none":
        return before is None
    part = "state/average" if has_average(config) else "state/params"
    trained = fingerprints.fingerprint_saved_tree(record, part)
    untrained = record["run"]["weights"]["model.path"]
    generation = describe_sampling(config, planned)
    evaluations = read_evaluations(directory)
    return is_up_to_date(
        before, make_record(config, generation, planned.steps, trained, untrained, evaluations)
    )


# ---- what a run has come to


def describe_stop(planned: ResolvedRun, directory: RunDir, done: int) -> str:
    """Returns the results of a run with `done` steps; less before its end."""
    if done >= planned.steps:
        return describe_end(planned, directory)
    return (
        f"stopped after step {done}/{planned.steps}, as train.stop_after asks; the same command "
        "continues from there"
    )


def describe_end(planned: ResolvedRun, directory: RunDir, nothing_to_do: bool = False) -> str:
    """Returns the results of a finished run: time, metrics, files, and commands to type next.

    `nothing_to_do`: the run was finished before this process.
    """
    summary = directory.read_json(SUMMARY) or {}
    duration = format_duration(summary.get("seconds") or 0)
    steps = f"all {summary.get('steps', planned.steps):,} steps in {duration}"
    rows = [("finished", f"{steps}, before now; nothing is left to do" if nothing_to_do else steps)]
    rows += describe_change(summary.get("first_evaluation"), summary.get("last_evaluation"))
    if planned.config.export.layout != "none":
        rows.append(("export", describe_export(planned.config, directory)))
    if (report := directory.path(REPORT)).exists():
        rows.append(("report", f"{report}, for a browser"))
    rows += [("next", command) for command in suggest_commands(planned, directory)]
    # A stage that is extended after the next one has begun is no longer what that one began from.
    if nothing_to_do and directory.root not in list_folders(directory.root.parent)[:-1]:
        rows.append(("extend", suggest_extension(planned)))
    return align_rows(rows)


def describe_export(config: Config, directory: RunDir) -> str:
    """Returns the place and the layout of an export."""
    if config.export.lora == "adapter":
        return f"{directory.export}, adapters for PEFT"
    return f"{directory.export}, in the layout {config.export.layout}"


def describe_change(first: Mapping | None, last: Mapping | None) -> list[Row]:
    """Returns a row for each headline metric of the evaluations before and after the training.

    A metric without an interval or a standard error is no headline.
    """
    if first is None or last is None:
        return []
    names = [name for name in last if f"{name}_low" in last or f"{name}_stderr" in last]
    headline = [name for name in names if name in HEADLINE] or names
    rows = []
    for name in headline[:MAX_METRICS]:
        text = _format_value(last, name)
        if first.get("step") != last.get("step"):
            text = f"{_format_value(first, name)} -> {text}"
        rows.append((name.removeprefix("eval/"), text))
    return rows


def _format_value(evaluation: Mapping[str, Any], name: str) -> str:
    """Returns a rate or a mean with its 95% interval, as far as the evaluation has them."""
    estimate = read_estimate(evaluation, name)
    return estimate.format() if estimate else "none"


def suggest_commands(planned: ResolvedRun, directory: RunDir) -> list[str]:
    """Returns commands for the trained model and the curves of the run."""
    config, export = planned.config, str(directory.export)
    commands = []
    if config.export.layout != "none" and config.export.lora != "adapter":
        commands += suggest_samples(planned, export, directory.path("drawings"))
        suite = SUITES.get(config.eval.suite)
        # A suite that makes no rows needs a run, and the command knows no split.
        whole = isinstance(config.eval.path, str) and config.eval.split is None
        if suite and suite.make_rows is not None and whole:
            commands.append(_quote(
                "evaluate", "--model", export, "--suite", config.eval.suite,
                "--data", str(config.eval.path), "--rows", str(config.eval.rows),
            ))  # fmt: skip
    return [*commands, suggest_tensorboard(directory)]


def suggest_samples(planned: ResolvedRun, export: str, out: Path) -> list[str]:
    """Returns commands that generate an image, and answer a question about that image."""
    prompt, question = read_example(planned)
    commands, image = [], "IMAGE"
    if image_tasks(planned.tasks):
        commands.append(_quote(
            "generate", "image", "--model", export, "--prompt", prompt, "--out", str(out),
            *(["--think"] if plan_tasks(planned.tasks) else []),
        ))  # fmt: skip
        image = str(out / "00000_00.png")
    if text_tasks(planned.tasks):
        commands.append(_quote(
            "generate", "text", "--model", export, "--image", image, "--question", question
        ))  # fmt: skip
    return commands


def read_example(planned: ResolvedRun) -> tuple[str, str]:
    """Returns prompt and question of the first row, or words that stand for them."""
    row: Mapping[str, Any] = {}
    with contextlib.suppress(InputError):  # a row that cannot be read
        row = planned.train_loader.source[0]
    # Without the instruction, which the export states and `generate` adds.
    prompt, question = (
        str(row.get(name) or "").partition("\n")[0] for name in ("prompt", "qa_problem")
    )
    return (
        prompt if 0 < len(prompt) <= MAX_SHOWN else "PROMPT",
        question if 0 < len(question) <= MAX_SHOWN else "QUESTION",
    )


def suggest_extension(planned: ResolvedRun) -> str:
    """Returns how the same command trains for longer."""
    train, folder = planned.config.train, Path(planned.config.output_dir)
    option = f"train.max_steps={2 * planned.steps}"
    if train.max_steps is None:
        option = f"train.epochs={2 * train.epochs:g}"
    if folder in list_folders(folder.parent):
        option = f"{STAGES_KEY}.{folder.name}.{option}"
    return f"the same command with, for example, {option} --allow-changed-config"


def _quote(*words: str) -> str:
    return shlex.join(("corl-jax", *words))
