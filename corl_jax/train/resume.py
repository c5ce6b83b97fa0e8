"""Resumes a run: the newest sound checkpoint, the data's position, and fingerprints of the rest."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path

from corl_jax.config.schema import Config
from corl_jax.errors import Problems
from corl_jax.runs import fingerprints, same_files
from corl_jax.runs.checkpoints import Checkpoints, Restored
from corl_jax.train.ahead import compile_meanwhile
from corl_jax.train.reference import rest_state
from corl_jax.train.resolve import ResolvedRun
from corl_jax.train.run import Run
from corl_jax.train.stages import scores_rewards
from corl_jax.train.step import TrainState

REPORT_OPTIONS = ("eval.", "rollout.", "rewards.", "data.", "model.", "networks.", "compat.")
"""Beginnings of the options that images and evaluations depend on."""


def resume(
    planned: ResolvedRun, checkpoints: Checkpoints, run: Run, state: TrainState,
    fingerprint: Callable[[], dict[str, str]], allow_changes: bool,
) -> Restored:  # fmt: skip
    """Restores the newest sound checkpoint and the position in the data.

    `state`: shapes and shardings of the state to restore. `fingerprint` returns the fingerprints of
    the weights that checkpoints leave out. The programs of the next step are compiled meanwhile.

    Raises:
        InputError: no checkpoint is sound; or, without `allow_changes`, weights, data or options
            differ. A changed file of a reward is only reported.
    """
    config = planned.config.model_dump(mode="json")
    with compile_meanwhile(planned.stage.compile_step, run, state) as begin:
        resumed = checkpoints.restore_newest({"state": state}, config, allow_changes, begin)
        now, start = fingerprint(), resumed.meta.get("working_directory")
    resumed.tree["state"] = rest_state(run.moving, resumed.tree["state"])
    # A resumed run may name the same reward file from another working directory.
    before = {_resolve_reward_file(n, start): mark for n, mark in resumed.meta["weights"].items()}
    # Names that the checkpoint lacks count as unchanged: the comparison of options reports them.
    changed = [n for n in now if before.get(_resolve_reward_file(n), now[n]) != now[n]]
    problems = Problems()
    for name in changed:
        if _is_reward_file(name):
            resumed.changes.append(f"{name}: the file is not the one of the last save")
        else:
            problems.add(
                f"{name}: its weights are not those that the run began with; bring them back, or "
                "--allow-changed-config to go on with these"
            )
    problems.attempt(planned.train_loader.set_state, resumed.meta["data"])
    if not allow_changes:
        problems.raise_any()
    resumed.changes.extend(problems)
    return resumed


def needs_new_reports(resumed: Restored | None, run: Run) -> bool:
    """Returns whether a finished run was resumed with options that change its last reports."""
    if resumed is None or resumed.step < run.steps:
        return False
    return any(change.startswith(REPORT_OPTIONS) for change in resumed.changes)


def fingerprint_untrained(run: Run) -> dict[str, str]:
    """Returns option -> fingerprint of the weights that checkpoints leave out."""
    # These weights are read from files at each start, so checkpoints need not hold them.
    # Seconds in a run's first process: each shape of an array is a program to compile.
    with run.reference.use() if run.reference else contextlib.nullcontext() as reference:
        frozen = {"frozen": run.frozen, "reference": reference}
        marks = {"model.path": fingerprints.fingerprint_tree(frozen)}
    for name, network in run.networks.items():
        with network.use() as loaded:
            marks[f"networks.{name}"] = fingerprints.fingerprint_tree(loaded.params)
    return marks


def hash_reward_files(config: Config) -> dict[str, str]:
    """Returns file -> SHA-256 of the files of the user's rewards."""
    rewards = config.rewards if scores_rewards(config) else []
    files = (Path((reward.use or "").rpartition(":")[0]) for reward in rewards)
    return {
        str(file): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
        if _is_reward_file(str(file))
    }


def _is_reward_file(name: str) -> bool:
    """Returns whether a fingerprint's name is the file of a reward; other names are options."""
    return name.endswith(".py")


def _resolve_reward_file(name: str, start: str | None = None) -> str:
    """Returns a reward's file without links and relative parts; other names as they are."""
    return same_files.resolve_path(name, start) if _is_reward_file(name) else name
