"""`corl_jax.train(config)`: a training as a call, for scripts and notebooks."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from corl_jax.config.chains import Stages, make_stages
from corl_jax.config.origins import record_call
from corl_jax.config.schema import Config
from corl_jax.config.shipped import find_config


@dataclasses.dataclass(frozen=True)
class TrainingResult:
    """The state of a run when its training has ended."""

    output_dir: Path  # docs/reference/run_directory.md lists its files; of several stages the last
    steps: int  # done since the run began; fewer than planned after train.stop_after
    export: Path | None  # the trained model; None before the last step, or without an export
    first_evaluation: dict[str, Any] | None  # step, and metrics eval/...; None without evaluation
    last_evaluation: dict[str, Any] | None


def train(
    config: str | os.PathLike[str] | Mapping[str, Any] | Config,
    overrides: Mapping[str, Any] | None = None,
    /,
    *,
    allow_changed_config: bool = False,
    **options: Any,
) -> TrainingResult:
    """Trains as `corl-jax train` does; resumes a run that its output_dir holds.

    `config` is a YAML file, the name of a config of the package, a dict or a Config. `overrides`
    and `options` win over it: `{"train.max_steps": 20}`, or `seed=1, train={"max_steps": 20}`.
    `allow_changed_config` resumes with options that differ from those of the run.

    SIGTERM or Ctrl-C raises Preempted after the step that runs is saved; the same call resumes.
    Preempted is a BaseException, so `except Exception` does not catch it. A second Ctrl-C raises
    KeyboardInterrupt at once. Two things end the process: a step that hangs longer than
    guards.step_timeout_s, and, where a run has several processes, a failure of one of them.

    Raises:
        InputError: listing everything that is wrong with config, data, model and directory.
        Preempted: as above.
        GuardError, RewardError, SaveError: as described in corl_jax.errors.
    """
    from corl_jax.train.chain import run_stages

    changes = {**(overrides or {}), **options}
    output_dir, steps = run_stages(
        read_stages(config, changes), record_call(config, changes),
        allow_changes=allow_changed_config, ends_process=False,
    )  # fmt: skip
    return describe_result(Path(output_dir), steps)


def read_stages(
    config: str | os.PathLike[str] | Mapping[str, Any] | Config, options: Mapping[str, Any]
) -> Stages:
    """Returns the stages of a call of `train`. Raises: InputError listing every problem."""
    if isinstance(config, Config):
        if not options:
            return {"": config}
        return make_stages(config.model_dump(mode="json"), options)
    base = config if isinstance(config, Mapping) else find_config(os.fspath(config))
    return make_stages(base, options)


def describe_result(output_dir: Path, steps: int) -> TrainingResult:
    """Reads the result of a run of `steps` steps from its directory."""
    from corl_jax.runs.directory import RunDir
    from corl_jax.runs.export_record import read_record
    from corl_jax.train.milestones import read_evaluations

    directory = RunDir(output_dir)
    evaluations = read_evaluations(directory)
    # An export of fewer steps stays in its place while an extended run goes on.
    is_exported = (read_record(directory.export) or {}).get("step") == steps
    return TrainingResult(
        output_dir,
        steps,
        directory.export if is_exported else None,
        evaluations[0] if evaluations else None,
        evaluations[-1] if evaluations else None,
    )
