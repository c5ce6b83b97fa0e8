"""Says what a run does after its iterations and when: reports, checkpoints, the export."""

from __future__ import annotations

import dataclasses
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from corl_jax.config.schema import Config
from corl_jax.errors import InputError, Preempted, SaveError
from corl_jax.runs import same_files
from corl_jax.runs.directory import SUMMARY, RunDir, to_json
from corl_jax.runs.json_lines import read_lines
from corl_jax.runs.outputs import Outputs
from corl_jax.runs.pace import EVALUATION
from corl_jax.runs.signals import Interruption
from corl_jax.tasks import image_tasks
from corl_jax.train import reports
from corl_jax.train.export import refresh_export
from corl_jax.train.reference import use_whole_state
from corl_jax.train.run import Run
from corl_jax.train.showing import SAMPLES
from corl_jax.train.step import TrainState


@dataclasses.dataclass(frozen=True)
class Milestone:
    """An action after some steps of a run."""

    name: str
    due: Callable[[int], bool]  # steps done; called once after each step
    run: Callable[[TrainState, int], None]  # (state, steps done)


# ---- what is due when


def make_reports(config: Config, run: Run, outputs: Outputs) -> list[Milestone]:
    """Returns the milestones that show what the policy can do: images and an evaluation."""
    every = config.eval.every

    def are_images_due(step: int) -> bool:
        return bool(image_tasks(run.tasks)) and reports.are_samples_due(
            config.log.images_every, run, step
        )

    def is_evaluation_due(step: int) -> bool:
        return bool(run.evaluations) and (
            step in (0, run.steps) or (every > 0 and step % every == 0)
        )

    def report(what: str, name: str, function: Callable[..., None]) -> Callable[..., None]:
        def run_report(state: TrainState, step: int) -> None:
            outputs.watchdog.beat()
            outputs.log.announce_compilation(what)
            with outputs.log.pace.time_milestone(name):
                function(config, run, outputs, state, step)

        return run_report

    draw = report("image grid", "images", reports.draw_fixed_prompts)
    evaluate = report("evaluation", EVALUATION, reports.evaluate)
    return [
        Milestone("images", are_images_due, draw),
        Milestone(EVALUATION, is_evaluation_due, evaluate),
    ]


def make_milestones(
    config: Config,
    run: Run,
    outputs: Outputs,
    report_milestones: Sequence[Milestone],
    interruption: Interruption,
    steps: range,
) -> list[Milestone]:
    """Returns what happens after the iterations `steps` of this process, in this order.

    `report_milestones` come before the save, which counts the lines of `metrics.jsonl`.
    """

    def prepare_saves(state: TrainState, step: int) -> None:
        # Now, because a save that a signal asks for has no time to compile the fingerprints.
        with outputs.watchdog.paused():
            outputs.fingerprint()

    def stop(state: TrainState, step: int) -> None:
        # The reports of this step are left to the process that resumes.
        unreported = any(report.due(step) for report in report_milestones)
        save_state(config, run, outputs, state, step, unreported)
        outputs.saver.finish()
        raise Preempted(
            f"stopped by {interruption.reason} after step {step} of {run.steps}, which is "
            f"saved in {outputs.saver.directory}; the same command continues from there"
        )

    def is_save_due(step: int) -> bool:
        return step % config.checkpoint.every == 0 or step in (run.steps, steps.stop)

    def save(state: TrainState, step: int) -> None:
        with outputs.log.pace.time_milestone("save"):
            save_state(config, run, outputs, state, step)

    return [
        Milestone("prepare saves", lambda step: step == steps.start + 1, prepare_saves),
        # Before the reports, which may take longer than a scheduler waits.
        Milestone("stop", interruption.is_reached, stop),
        *report_milestones,
        Milestone("save", is_save_due, save),
    ]


def make_ending(config: Config, run: Run, outputs: Outputs, model_dir: Path) -> Milestone:
    """Returns the milestone of a finished run: its export, `summary.json` and `report.html`.

    `model_dir` has the tokenizer and processor files for the export.
    """
    return Milestone(
        "ending",
        lambda step: step >= run.steps,
        lambda state, step: finish_run(config, run, outputs, model_dir, state, step),
    )


def run_due(milestones: Sequence[Milestone], state: TrainState, step: int) -> None:
    """Runs the milestones that are due after `step` steps."""
    for milestone in milestones:
        if milestone.due(step):
            milestone.run(state, step)


def count_milestones(config: Config, run: Run, step: int) -> dict[str, int]:
    """Returns how many images, evaluations and saves are due from `step` on, `step` included."""
    every = {"save": config.checkpoint.every}
    if image_tasks(run.tasks) and config.log.images_every:
        every["images"] = config.log.images_every
    if run.rewards and config.log.samples_every:
        every[SAMPLES] = config.log.samples_every
    if run.evaluations:
        every[EVALUATION] = config.eval.every
    return {name: count_due(number, step, run.steps) for name, number in every.items()}


def count_due(every: int, first: int, last: int) -> int:
    """Counts the steps from `first` to `last` that are multiples of `every`, or the last one.

    `every` 0 has no multiples.
    """
    # every = 4, steps 3 to 10: the multiples 4 and 8, and the last step 10 -> 3.
    multiples = last // every - (first - 1) // every if every else 0
    return multiples + (first <= last and (not every or last % every != 0))


# ---- saves, and the end


def save_state(
    config: Config, run: Run, outputs: Outputs, state: TrainState, step: int,
    unreported: bool = False,
) -> None:  # fmt: skip
    """Starts to save all that the next iterations depend on.

    `unreported`: the process that resumes makes the reports of `step`.
    """
    meta = {
        "data": run.train_loader.get_state() | {"step": step},
        "seed": run.seed,
        "config": config.model_dump(mode="json"),
        "seconds": time.perf_counter() - outputs.began,
        "working_directory": same_files.find_working_directory(),
        "weights": outputs.fingerprint(),
        "metric_lines": outputs.log.num_lines,
        "num_tokens": outputs.progress.num_tokens,
        "unreported": unreported,
        "sources": outputs.sources,
        "saved_at": time.time(),
        "guards": outputs.guards.get_state(),
    }
    with use_whole_state(run.moving, state) as whole:
        outputs.saver.save(step, {"state": whole}, meta)
    outputs.watchdog.beat()


def finish_run(
    config: Config, run: Run, outputs: Outputs, model_dir: Path, state: TrainState, step: int
) -> None:
    """Writes the export, `summary.json` and `report.html` of a finished run.

    Files that are up to date stay as they are, byte for byte.

    Raises:
        SaveError: the export could not be written.
    """
    beat = outputs.watchdog.beat
    beat()  # the time limit of the watchdog starts anew for the export
    try:
        notes = refresh_export(
            outputs.directory.export, config, run, state, step,
            outputs.fingerprint()["model.path"], model_dir, outputs.primary,
            read_evaluations(outputs.directory) if outputs.primary else (), beat,
        )  # fmt: skip
    except InputError as error:  # the config was checked before, so it is not to blame
        raise SaveError(
            f"{error}\nall steps are done and saved; the same command exports again"
        ) from error
    for note in notes:
        outputs.log.say(note)
    if outputs.primary:
        write_summary(outputs, state, step)
        write_report(outputs)


def write_summary(outputs: Outputs, state: TrainState, step: int) -> None:
    """Writes `summary.json`, unless it is up to date."""
    evaluations = read_evaluations(outputs.directory)
    summary = to_json({
        "steps": step,
        "optimizer_steps": int(state.step),
        "skipped_updates": outputs.guards.skipped,
        "first_evaluation": evaluations[0] if evaluations else None,
        "last_evaluation": evaluations[-1] if evaluations else None,
    })  # fmt: skip
    before = outputs.directory.read_json(SUMMARY) or {}
    # Without `seconds`, which would change each time a finished run is started again.
    if {name: before.get(name) for name in summary} != summary:
        seconds = time.perf_counter() - outputs.began
        outputs.directory.write_json(SUMMARY, {**summary, "seconds": seconds})


def write_report(outputs: Outputs) -> None:
    """Writes `report.html`; a failure is printed and does not fail the run."""
    root = outputs.directory.root
    try:
        # Imported here, because a run can do without all that draws a page.
        from corl_jax.report.command import write_run_report

        write_run_report(root)
    # Whatever is wrong with the page, the run is complete without it.
    except Exception as error:
        outputs.log.say(
            f"warning: report.html: cannot be written ({type(error).__name__}: {error}); the "
            f"results are complete, and `corl-jax report {shlex.quote(str(root))}` tries again"
        )


def read_evaluation_seconds(directory: RunDir) -> dict[str, float]:
    """Returns the seconds of the newest evaluation for the run's pace; {} if none is typical."""
    # The first one of a run compiles.
    seconds = [row.get("eval/seconds") for row in read_evaluations(directory)[1:]]
    return {EVALUATION: seconds[-1]} if seconds and seconds[-1] else {}


def read_evaluations(directory: RunDir) -> list[dict[str, Any]]:
    """Returns every evaluation so far, in order of steps."""
    records = (record for _, record in read_lines(directory.metrics))
    return [
        {k: v for k, v in record.items() if k == "step" or k.startswith("eval/")}
        for record in records
        if any(key.startswith("eval/") for key in record)
    ]
