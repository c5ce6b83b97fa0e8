"""Runs the stages of a config one after the other, each as a run in its own directory.

Only the export goes from a stage to the next, so that the memory of a stage is free before the next
one begins, and each can be resumed, moved or reported by itself.
"""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator
from pathlib import Path

import jax

from corl_jax.config.chains import (
    RECORD,
    STAGES_KEY,
    Stages,
    find_folder,
    has_stages,
    list_folders,
    stand_in_starts,
)
from corl_jax.config.origins import Origin
from corl_jax.config.schema import Config
from corl_jax.console import print_status
from corl_jax.devices import processes, startup
from corl_jax.errors import InputError, Problems
from corl_jax.runs.directory import RunDir
from corl_jax.runs.export_record import read_record
from corl_jax.runs.signals import Interruption
from corl_jax.train import command
from corl_jax.train.resolve import resolve_run

START = "start.json"
"""File of a stage's run: the fingerprint of the weights that the stage before has handed on."""


def run_stages(
    stages: Stages, origin: Origin | None = None, *, check_only: bool = False,
    allow_changes: bool = False, ends_process: bool = True,
) -> tuple[str, int]:  # fmt: skip
    """Resumes or starts the stages of a config in their order, or only checks them.

    A stage that train.stop_after stops is the last one. Returns (the directory of the last run,
    the number of its steps); the arguments and the errors are those of `command.run_config`.

    Raises:
        InputError: listing everything that is wrong in all stages, before the first one starts.
    """
    options = {"check_only": check_only, "allow_changes": allow_changes}
    if not has_stages(stages):
        (config,) = stages.values()
        steps = command.run_config(config, origin, ends_process=ends_process, **options)
        return config.output_dir, steps
    startup.prepare_devices(next(iter(stages.values())).distributed)
    with Interruption(ends_process=ends_process) as interruption, processes.fail_together():
        if check_only:
            check_stages(stages, origin)
            return str(find_folder(stages)), 0
        resolve_stages(stages)
        keep_stages(stages, allow_changes)
        folder, done = "", 0
        for name, config in stages.items():
            if jax.process_index() == 0:
                print_status(describe_place(stages, name))
                if folder:  # not of the first one
                    check_start(config, allow_changes)
            folder, planned = config.output_dir, command.plan_run(config, origin)
            done = command.run_training(planned, interruption, allow_changes)
            if done < planned.steps:
                break
            del planned
            # What refers to itself keeps the stage's arrays on the devices until it is collected.
            gc.collect()
        return folder, done


def describe_place(stages: Stages, name: str) -> str:
    """Returns which of the stages one is."""
    return f"stage {[*stages].index(name) + 1} of {len(stages)}: {name}"


def resolve_stages(stages: Stages) -> None:
    """Resolves every stage, so that a mistake in the last one is found before the first one.

    Raises:
        InputError: listing everything that is wrong in all stages.
    """
    problems = Problems()
    for name, config in stand_in_starts(stages).items():
        with problems.collect(f"stage {name}: "):
            resolve_run(config)
    problems.raise_any()


def check_stages(stages: Stages, origin: Origin | None) -> None:
    """Checks all stages and prints what each would be; see `command.check_config`.

    Raises:
        InputError: listing everything that is wrong in all stages.
    """
    problems = Problems()
    for index, (name, config) in enumerate(stand_in_starts(stages).items()):
        if jax.process_index() == 0:
            start = "\n\n" if index else ""
            print(f"{start}{describe_place(stages, name)}", end="\n\n", flush=True)
        with problems.collect(f"stage {name}: "):
            command.check_config(config, origin)
    problems.raise_any()


def keep_stages(stages: Stages, allow_changes: bool) -> None:
    """Writes the names of the stages into their folder.

    Raises:
        InputError: it has a run without stages, cannot be written, or, without `allow_changes`,
            has other stages. More of them at the end are no change.
    """
    if jax.process_index():
        return
    run, names = RunDir(find_folder(stages)), [*stages]
    before = [folder.name for folder in list_folders(run.root)]
    if run.config.exists():
        raise InputError(
            f"output_dir: {run.root}: found a run without stages; choose another directory"
        )
    if names[: len(before)] != before and not allow_changes:
        raise InputError(
            f"stages: found {', '.join(names)}, but {run.root} has {', '.join(before)}; give the "
            "old ones, another output_dir, or --allow-changed-config to continue with the new ones"
        )
    with wrap_write_errors(run.root):
        run.root.mkdir(parents=True, exist_ok=True)
        run.write_json(RECORD, {STAGES_KEY: names})


@contextlib.contextmanager
def wrap_write_errors(folder: Path) -> Iterator[None]:
    """Makes an InputError of what keeps the block from writing into a folder."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"output_dir: {folder}: {error.strerror}; name a directory that can be written"
        ) from None


def check_start(config: Config, allow_changes: bool) -> None:
    """Requires that a stage that has begun did so from the export that is there now.

    Otherwise a stage that was trained again would end in a model that it has no part in.

    Raises:
        InputError: the weights are others, and that is not allowed.
    """
    run, export = RunDir(Path(config.output_dir)), Path(config.model.path)
    now, before = (read_record(export) or {}).get("trained"), run.read_json(START)
    if before is not None and before.get("trained") != now and not allow_changes:
        raise InputError(
            f"{run.root}: began from other weights than {export} has now; remove {run.root} to "
            "train this stage again, or --allow-changed-config to go on with it"
        )
    if before is None:
        with wrap_write_errors(run.root):
            run.root.mkdir(parents=True, exist_ok=True)
            run.write_json(START, {"model": str(export), "trained": now})
    elif before.get("trained") != now:
        print(f"warning: {run.root}: began from other weights than {export}", file=sys.stderr)
