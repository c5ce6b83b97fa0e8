"""Saves checkpoints in the background, whole or not at all, and restores them bit for bit.

A step is written to a temporary directory, which is renamed when it is complete. If a run dies
during a save, the previous step remains. Trees are stored as nested dicts of their paths. They are
restored into the containers and shardings of a given tree. Restored arrays are compared with the
fingerprints in the step's record. A damaged step is renamed, and the newest sound one is used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy

from corl_jax.devices import processes
from corl_jax.errors import InputError, SaveError
from corl_jax.params import leaf_paths, unflatten
from corl_jax.runs import fingerprints
from corl_jax.runs.directory import list_config_changes, to_json

GIB = 2**30
RUNNING_SAVE_WAIT_S = 60  # that a running save gets to end after a process has failed


class DamagedError(InputError):
    """A step differs from the saved one: incomplete, changed on the disk, or no checkpoint."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """A sound step, and what a user should know about how it was chosen."""

    step: int
    tree: Any
    meta: dict[str, Any]
    changes: list[str]  # options with another value than when it was saved
    warnings: list[str]  # newer, damaged steps that were renamed, and why


class Checkpoints:
    """The checkpoints of one run; the newest `keep` stay."""

    def __init__(self, directory: str | Path, keep: int = 2):
        """Opens or creates the directory and removes the parts of an interrupted save.

        Only the one run that writes here may open it, in all of its processes.

        Raises:
            InputError: the directory cannot be created or read.
        """
        self.directory = epath.Path(directory)  # for gs:// too
        if "://" not in str(directory):
            self.directory = self.directory.absolute()
        self._saving: int | None = None
        self._failed_steps: set[int] = set()
        # orbax logs through absl; see the filter.
        logging.getLogger("absl").addFilter(_is_not_of_orbax)
        try:
            # orbax makes only the last folder, and a run directory may not be there yet.
            self.directory.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(
                self.directory,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=preservation_policy.LatestN(keep),
                    cleanup_tmp_directories=True,
                ),
                item_handlers={
                    "state": ocp.StandardCheckpointHandler(),
                    "meta": ocp.JsonCheckpointHandler(),
                },
            )
        except OSError as error:
            raise InputError(
                f"{self.directory}: {error.strerror or error}; name a directory that can be used"
            ) from None

    def save(self, step: int, tree: Any, meta: dict[str, Any]) -> bool:
        """Starts to save arrays and JSON values. Returns False if the step is already there.

        First waits for the previous save. Returns when the arrays are copied to the host, so the
        caller may donate them.

        Raises:
            SaveError: this or the previous save could not be written, or there is no room.
        """
        if step in self.steps():
            return False
        self._saving = step
        self._failed_steps.discard(step)
        try:
            self._require_room(tree)
            # Hashed before orbax copies the arrays, so that the copy is checked too.
            record = fingerprints.make_record(step, tree, to_json(meta))
            args = ocp.args.Composite(
                state=ocp.args.StandardSave(unflatten(dict(leaf_paths(tree)))),
                meta=ocp.args.JsonSave(record),
            )
            # `force` skips orbax's rule of which steps to save: the caller has decided.
            return self._manager.save(step, args=args, force=True)
        except Exception as error:
            raise self._end_failed_save(error) from error

    @property
    def saving(self) -> bool:
        """True while a save runs."""
        return self._manager.is_saving_in_progress()

    def await_running_save(self) -> None:
        """Waits for a running save to end or fail, at most RUNNING_SAVE_WAIT_S seconds."""

        # In a thread, because `saving` may itself wait for other processes.
        def wait_for_end() -> None:
            while self.saving:
                time.sleep(0.1)

        thread = threading.Thread(target=wait_for_end, name="the save under way", daemon=True)
        thread.start()
        thread.join(RUNNING_SAVE_WAIT_S)

    def poll(self) -> int | None:
        """Returns the step that has been saved since the last call, if any; does not wait.

        Raises:
            SaveError: it could not be written.
        """
        if self._saving is None or self.saving:
            return None
        return self.wait()

    def wait(self) -> int | None:
        """Waits until no save runs. Returns the step that was saved; None if there was none.

        Raises:
            SaveError: it could not be written.
        """
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as error:
            if self._saving is not None:
                raise self._end_failed_save(error) from error
            # A thread of a failed save ends late. That failure was reported, so it is not counted
            # again.
            self._drain_errors()
        saved, self._saving = self._saving, None
        self._remove_parts()
        return saved

    def steps(self) -> list[int]:
        """Waits for a running save, and returns the finished steps, oldest first."""
        self.wait()
        # Without `reload` the manager counts a step as soon as its save has begun.
        self._manager.reload()
        return sorted(self._manager.all_steps())

    def restore_newest(
        self, abstract: Any, config: dict[str, Any], allow_changes: bool = False,
        begin: Callable[[int], None] = lambda step: None,
    ) -> Restored:  # fmt: skip
        """Restores the newest sound step, as `restore` does.

        Newer, damaged steps are renamed to STEP.corrupt-N: they no longer count, and their files
        stay. `allow_changes`: a different config is reported, not refused.

        Raises:
            InputError: no step is sound, or as in `restore`.
        """
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                tree, meta, changes = self.restore(step, abstract, config, allow_changes, begin)
            except DamagedError as error:
                damaged[step] = str(error)
                continue
            moved = [f"{why}; moved to {self._put_aside(bad)}" for bad, why in damaged.items()]
            warnings = [f"{why}, so step {step} is used" for why in moved]
            return Restored(step, tree, meta, changes, warnings)
        remedy = "bring one back from a copy, or choose another output_dir to start afresh"
        raise InputError([*damaged.values(), f"no checkpoint is sound; {remedy}"])

    def restore(
        self,
        step: int,
        abstract: Any,
        config: dict[str, Any] | None = None,
        allow_changes: bool = False,
        begin: Callable[[int], None] = lambda step: None,
    ) -> tuple[Any, dict[str, Any], list[str]]:
        """Restores a step; returns (tree, meta, changed options).

        `abstract`: a tree of arrays, or of jax.ShapeDtypeStruct with shardings. Its mesh may
        differ from that of the saved tree. `config` is compared with meta["config"]. `begin` is
        called with the step when all but the arrays is checked, before they are read.

        Raises:
            DamagedError: the step is missing, unreadable or not what was saved.
            InputError: another version of this code wrote it; options differ; or leaves are
                missing, unknown, or of another shape or dtype.
        """
        abstract = to_abstract(abstract)
        record = self._read_on_all(step, lambda: self._read_present_record(step))
        source = self.directory / str(step)
        if (version := record["schema_version"]) != fingerprints.SCHEMA_VERSION:
            raise InputError(
                f"{source}: found schema version {version}, expected "
                f"{fingerprints.SCHEMA_VERSION}; resume with the version of corl_jax that wrote it"
            )
        changes = []
        if config is not None:
            saved = record["run"].get("config", {})
            start = record["run"].get("working_directory")
            changes = list_config_changes(saved, to_json(config), str(source), allow_changes, start)
        _refuse(source, fingerprints.list_mismatches(record, abstract))
        begin(step)
        tree = self._read_on_all(step, lambda: self._read_arrays(step, abstract))
        self._read_on_all(step, lambda: self._require_saved_bits(step, tree, record))
        return tree, record["run"], changes

    def read_record(self, step: int) -> dict[str, Any]:
        """Reads the record of a step, without its arrays and without other processes.

        Raises:
            DamagedError: it is not the record that was saved. orbax raises other errors.
        """
        # Not read by the manager: its readers wait for each other, so a process whose reader
        # fails would make the others wait for ever.
        folder = self.directory / str(step) / "meta"
        record: Any = ocp.JsonCheckpointHandler().restore(folder)
        if damage := fingerprints.describe_damage(record, step):
            raise DamagedError(f"{self.directory / str(step)}: {damage}")
        return record

    def _read_present_record(self, step: int) -> dict[str, Any]:
        present = self.steps()
        if step not in present:
            known = ", ".join(map(str, present)) or "none"
            raise DamagedError(f"{self.directory}: no checkpoint of step {step}; present: {known}")
        return self.read_record(step)

    def _read_arrays(self, step: int, abstract: Any) -> Any:
        args = ocp.args.StandardRestore(unflatten(dict(leaf_paths(abstract))))
        folder = self.directory / str(step) / "state"
        arrays = dict(leaf_paths(ocp.StandardCheckpointHandler().restore(folder, args=args)))
        # Into the containers of `abstract`, such as the named tuples of optax.
        leaves = [arrays[name] for name, _ in leaf_paths(abstract)]
        return jax.tree.unflatten(jax.tree.structure(abstract), leaves)

    def _require_saved_bits(self, step: int, tree: Any, record: dict[str, Any]) -> None:
        if changed := fingerprints.list_damaged_leaves(record, tree):
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise DamagedError(
                f"{self.directory / str(step)}: the bits of {', '.join(changed[:3])}{more} are not "
                "those that were saved"
            )

    def _read_on_all(self, step: int, read: Callable[[], Any]) -> Any:
        """Returns what `read` returns, or raises DamagedError on all processes if one fails."""
        value, damage = None, None
        try:
            value = read()
        except DamagedError as error:
            damage = error
        # The machine is at fault, not the checkpoint: another step would fail too.
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:  # orbax and tensorstore raise errors of many types
            damage = DamagedError(
                f"{self.directory / str(step)}: unreadable checkpoint ({_shorten_error(error)})"
            )
        # All processes must choose the same step, so a failure of one counts for all.
        if not _is_true_on_all(damage is None) and damage is None:
            damage = DamagedError(f"{self.directory / str(step)}: not readable by every process")
        if damage is not None:
            raise damage
        return value

    def _put_aside(self, step: int) -> epath.Path:
        number = 0
        while (aside := self.directory / f"{step}.corrupt-{number}").exists():
            number += 1
        # All processes have chosen the same name before it is taken.
        processes.barrier(f"{aside} is free")
        if jax.process_index() == 0:
            (self.directory / str(step)).rename(aside)
        processes.barrier(f"{aside} is taken")
        return aside

    def _require_room(self, tree: Any) -> None:
        if "://" in str(self.directory):
            return  # a bucket has no limit
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
        free = shutil.disk_usage(self.directory).free
        if not _is_true_on_all(needed <= free):
            raise OSError(f"it needs {needed / GIB:.3g} GiB and {free / GIB:.3g} GiB are free")

    def _remove_parts(self) -> None:
        """Removes what failed saves have written, to make room for the next ones."""
        # Other threads of a failed save may go on writing for a while, so this is done again at
        # each later save.
        if jax.process_index() != 0:
            return
        for step in self._failed_steps:
            for part in self.directory.glob(f"{step}.orbax-checkpoint-tmp*"):
                with contextlib.suppress(OSError):
                    part.rmtree(missing_ok=True)

    def close(self) -> None:
        """Waits for the last save and ends the threads, also after a failure."""
        try:
            self.wait()
        finally:
            self._manager.close()
            self._remove_parts()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except SaveError as failed:
            if error is None:
                raise
            print(f"warning: {failed}", file=sys.stderr)  # `error` is why the run ends

    def _end_failed_save(self, error: Exception) -> SaveError:
        step, self._saving = self._saving, None
        self._drain_errors()
        if step is not None:
            self._failed_steps.add(step)
        self._remove_parts()
        return SaveError(
            f"{self.directory}: the checkpoint of step {step} could not be written "
            f"({_shorten_error(error)}); finished ones are intact, so make room or remove the "
            "cause, and rerun the command"
        )

    def _drain_errors(self) -> None:
        # Each thread of orbax raises the same failure again: at the next save, or at the end. Two
        # rounds, because waiting in the first one may end another thread.
        for _ in range(2):
            for ask in (self._manager.wait_until_finished, self._manager.check_for_errors):
                with contextlib.suppress(Exception):
                    ask()


def to_abstract(tree: Any) -> Any:
    """Returns shapes, dtypes and shardings of a tree, whose arrays may then be deleted."""

    def describe(x: Any) -> jax.ShapeDtypeStruct:
        if x.sharding is None:
            raise ValueError("a leaf without sharding: restoring needs to know the devices")
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)

    return jax.tree.map(describe, tree)


def _is_true_on_all(value: bool) -> bool:
    return bool(processes.all_gather(np.array(value)).all())


def _refuse(source: epath.Path, problems: list[str]) -> None:
    if problems:
        raise InputError([f"{source}: {line}" for line in problems])


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
    # Errors of orbax are raised here as exceptions, so its ten tracebacks are not printed.
    return "orbax" not in record.pathname


def _shorten_error(error: Exception) -> str:
    line = (str(error).splitlines() or [""])[0]
    # The reason comes last, after all the paths.
    return f"{type(error).__name__}: {line if len(line) <= 200 else '...' + line[-200:]}"
