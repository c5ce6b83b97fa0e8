"""Train a Janus: GRPO on both tasks, the supervised stage, or the image tokenizer.

python -m corl_jax.train --config FILE [key=value ...]

Rerunning the same command resumes from the newest sound checkpoint of its output_dir. SIGTERM or
Ctrl-C saves after the step that runs, and exits with 75.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path

import jax

from corl_jax import startup
from corl_jax.config import files as config_files
from corl_jax.config.schema import Config
from corl_jax.devices import processes
from corl_jax.errors import InputError, exit_on_input_error
from corl_jax.runs import directory as run_directory
from corl_jax.runs import export_record, fingerprints, same_files
from corl_jax.runs.checkpoints import Checkpoints, Restored, abstract_of
from corl_jax.runs.directory import RunDir
from corl_jax.runs.log import Metrics, Phases
from corl_jax.runs.signals import Interruption
from corl_jax.runs.watchdog import Watchdog
from corl_jax.train import check
from corl_jax.train.build import build
from corl_jax.train.loop import train
from corl_jax.train.milestones import Recorder
from corl_jax.train.resolve import ResolvedRun, resolve_run
from corl_jax.train.run import Run
from corl_jax.train.step import TrainState

MEASURED_WITH = ("eval.", "rollout.", "rewards.", "data.", "model.", "networks.", "compat.")
"""Beginnings of the options that pictures and evaluations depend on."""


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m corl_jax.train",
        description=__doc__,
        epilog="Every option with its default, range and source:\n\n" + config_files.describe(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file")
    parser.add_argument(
        "--check",
        action="store_true",
        help="check config, data, weights and mesh, print sizes and steps, and exit",
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print the resolved config and exit"
    )
    parser.add_argument(
        "--allow-changed-config",
        action="store_true",
        help="resume with options that differ from the run's; they are listed and recorded",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. train.max_steps=10")
    return parser.parse_intermixed_args(argv)


@exit_on_input_error
def main(argv: list[str] | None = None) -> None:
    """The command."""
    args = parse(argv)
    config = config_files.load(args.config, args.overrides)
    if args.print_config:
        print(config_files.dump(config), end="")
        return
    startup.prepare_devices(config.distributed)
    with Interruption() as interruption, processes.fail_together():
        planned = resolve_run(config)
        if not args.check:
            run_training(planned, interruption, args.allow_changed_config)
        elif jax.process_index() == 0:
            print(check.describe(planned))


def run_training(
    planned: ResolvedRun, interruption: Interruption, allow_changes: bool = False
) -> None:
    """Resumes or starts the planned run, to its end or to train.stop_after."""
    config, primary = planned.config, jax.process_index() == 0
    with (
        run_directory.opened(config, primary, allow_changes) as directory,
        run_directory.checkpoints_locked(directory, config.checkpoint.directory, primary) as place,
        Checkpoints(place, config.checkpoint.keep) as checkpoints,
        jax.set_mesh(planned.mesh),
        processes.fail_together(checkpoints.settle),  # before the above waits for the others
    ):
        steps = checkpoints.steps()  # by all: their managers may wait for each other
        if primary:
            directory.require_saved(steps, config.checkpoint.directory, place)
        run, state = build(planned, Phases())
        files = reward_files(config)  # now: users may mend them while the run goes on
        weights = functools.cache(lambda: untrained_digests(run) | files)
        resumed = resume(planned, checkpoints, state, weights, allow_changes)
        if primary:
            directory.keep_config(config)
            if resumed is not None:
                directory.note_saved(resumed.step, config.checkpoint.directory)
        start, meta = 0, {}
        if resumed is not None:
            start, meta, state = resumed.step, resumed.meta, resumed.tree["state"]
        stop = min(run.steps, start + (config.train.stop_after or run.steps))
        lines = meta.get("metric_lines")
        stacks = directory.path(f"stacks_{jax.process_index()}.txt")
        with (
            Metrics(directory, start or None, run.steps, primary, resumed_lines=lines) as metrics,
            Watchdog(config.guards.step_timeout_s, stacks) as watchdog,
        ):
            tell(planned, resumed, directory, metrics)
            recorder = Recorder(
                config, directory, metrics, checkpoints, planned.model_dir, primary,
                meta.get("seconds", 0.0), weights=weights, interruption=interruption,
                watchdog=watchdog,
            )  # fmt: skip
            metrics.pace.count_milestones = functools.partial(recorder.count_milestones, run)
            recorder.guards.restore(meta.get("guards", {}))
            with interruption.waits():
                if start == 0 or meta["unreported"] or measures_otherwise(resumed, run):
                    recorder.milestone(run, state, start)
                state = train(run, state, recorder, start, stop)
                if start < stop < run.steps:
                    recorder.save(run, state, stop)
                recorder.saver.finish()
            interruption.leave_if_asked(f"after step {stop}; the same command goes on from there")
            if stop == run.steps:
                recorder.finish(run, state, max(start, stop))
        processes.barrier("the end")  # jax gives the last to leave no time for its export


def measures_otherwise(resumed: Restored | None, run: Run) -> bool:
    """True for a finished run whose last pictures and evaluation other options would give now."""
    if resumed is None or resumed.step < run.steps:
        return False
    return any(change.startswith(MEASURED_WITH) for change in resumed.changes)


def untrained_digests(run: Run) -> dict[str, str]:
    """Of what checkpoints leave out because it is read from files at each start, by its option.

    Takes seconds in a run's first process, since each shape of an array is a program to compile.
    """
    with run.reference.use() if run.reference else contextlib.nullcontext() as reference:
        found = {"model.path": fingerprints.summary({"frozen": run.frozen, "reference": reference})}
    for name, network in run.networks.items():
        with network.use() as lent:
            found[f"networks.{name}"] = fingerprints.summary(lent.params)
    return found


def reward_files(config: Config) -> dict[str, str]:
    """Digests of the files of the user's rewards."""
    files = (Path((reward.use or "").rpartition(":")[0]) for reward in config.rewards)
    return {
        str(file): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
        if file.suffix == ".py"
    }


def resume(
    planned: ResolvedRun, checkpoints: Checkpoints, state: TrainState,
    weights: Callable[[], dict[str, str]], allow_changes: bool,
) -> Restored | None:  # fmt: skip
    """The newest sound checkpoint, with the data where it was; None for a run without any.

    The fresh `state` says what is wanted, and is gone when something is restored. `weights`
    are the digests of what checkpoints leave out; a reward's file that was mended is told, not
    refused.
    """
    if not processes.broadcast_first(len(checkpoints.steps())):
        return None
    wanted = abstract_of({"state": state})
    for leaf in jax.tree.leaves(state):
        leaf.delete()  # the devices have room for one state
    config = planned.config.model_dump(mode="json")
    resumed = checkpoints.newest(wanted, config, allow_changes)
    now, start = weights(), resumed.meta.get("working_directory")
    before = {_as_file(name, start): mark for name, mark in resumed.meta["weights"].items()}
    changed = [name for name in now if before.get(_as_file(name), now[name]) != now[name]]
    problems = [
        f"{name}: its weights are not those that the run began with; bring them back, or "
        "--allow-changed-config to go on with these"
        for name in changed
        if not name.endswith(".py")
    ]
    resumed.changes.extend(
        f"{name}: the file is not the one of the last save"
        for name in changed
        if name.endswith(".py")
    )
    try:
        planned.train_loader.set_state(resumed.meta["data"])
    except InputError as error:
        problems += error.problems
    if problems and not allow_changes:
        raise InputError(problems)
    resumed.changes.extend(problems)
    return resumed


def _as_file(name: str, start: str | None = None) -> str:
    """The file of a user's reward without links and relative parts; another name as it is."""
    return same_files.resolve_path(name, start) if name.endswith(".py") else name


def tell(
    planned: ResolvedRun, resumed: Restored | None, directory: RunDir, metrics: Metrics
) -> None:
    """What a user should know before the first step."""
    if chosen := check.attention(planned):
        metrics.say(chosen)
    if resumed is not None:
        for text in resumed.warnings:
            metrics.say(f"warning: {text}")
        for text in resumed.changes:
            metrics.say(f"warning: changed config: {text}")
        if resumed.changes and metrics.primary:
            directory.note_changes(resumed.step, resumed.changes)
        if resumed.step > planned.steps:
            metrics.say(f"step {resumed.step} is done already, past the {planned.steps} of the run")
    if metrics.primary and (line := export_record.describe_age(directory.export, planned.steps)):
        metrics.say(line)
    if shortage := check.disk_shortage(planned):
        metrics.say(f"warning: {shortage}")
    for line in check.inapplicable(planned):
        metrics.say(f"warning: {line}")


if __name__ == "__main__":
    main()
