"""Checkpoints for resuming: saved in the background, whole or not at all, restored bit by bit.

A step is written to a temporary directory and renamed when complete, so a run that dies in a
save finds the step before. Trees are stored as nested dicts of their path's keys, whatever
containers they are made of, and restored into the containers and shardings that are asked for.
What comes back is compared with the record of `fingerprints`; a step that fails is put aside, and
the newest one that is sound is used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shutil
import sys
import threading
import time
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
SETTLE_S = 60  # of a save that all processes are at when one of them fails


class DamagedError(InputError):
    """A step is not what was saved: cut off, changed on the disk, or no checkpoint at all."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """A step that is sound, and what was found on the way to it."""

    step: int
    tree: Any
    meta: dict[str, Any]
    changes: list[str]  # options with another value than when it was saved
    warnings: list[str]  # newer steps that were put aside, and why


class Checkpoints:
    """The checkpoints of one run, of which the newest `keep` stay."""

    def __init__(self, directory: str | Path, keep: int = 2):
        """Opens or creates the directory and clears away what an interrupted save left.

        Only for the run's one writer, or all processes of it.

        Raises:
            InputError: the directory cannot be created or read.
        """
        self.directory = epath.Path(directory)  # which knows gs:// too
        if "://" not in str(directory):
            self.directory = self.directory.absolute()
        self._saving: int | None = None
        self._unfinished: set[int] = set()  # steps whose save has failed
        logging.getLogger("absl").addFilter(_worth_printing)
        try:
            # Two levels: orbax makes one, and a run directory may not be there yet.
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
        """Starts saving a pytree of arrays and JSON values; False if the step is there already.

        Returns when the arrays have been copied to the host, so the caller may donate them. Waits
        for the save before, if that is not yet done.

        Raises:
            SaveError: this or the save before could not be written, or there is no room.
        """
        if step in self.steps():
            return False
        self._saving = step
        self._unfinished.discard(step)
        try:
            self._require_room(tree)
            record = fingerprints.make_record(step, tree, to_json(meta))
            args = ocp.args.Composite(
                state=ocp.args.StandardSave(unflatten(dict(leaf_paths(tree)))),
                meta=ocp.args.JsonSave(record),
            )
            return self._manager.save(step, args=args, force=True)
        except Exception as error:
            raise self._failed(error) from error

    @property
    def saving(self) -> bool:
        """Whether a save is under way."""
        return self._manager.is_saving_in_progress()

    def settle(self) -> None:
        """Gives a save that is under way SETTLE_S seconds to end, however it does."""

        def ended() -> None:
            while self.saving:  # which may itself wait for the other processes
                time.sleep(0.1)

        thread = threading.Thread(target=ended, name="the save under way", daemon=True)
        thread.start()
        thread.join(SETTLE_S)

    def poll(self) -> int | None:
        """The step that has been saved since the last call, if one has; does not wait.

        Raises:
            SaveError: it could not be written.
        """
        if self._saving is None or self.saving:
            return None
        return self.wait()

    def wait(self) -> int | None:
        """Returns when nothing is being saved: the step that was, None if there was none.

        Raises:
            SaveError: it could not be written.
        """
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as error:
            raise self._failed(error) from error
        saved, self._saving = self._saving, None
        self._remove_parts()
        return saved

    def steps(self) -> list[int]:
        """Finished steps, oldest first, as the directory shows them after `wait`."""
        self.wait()
        self._manager.reload()  # a manager counts a step as soon as its save has begun
        return sorted(self._manager.all_steps())

    def restore_newest(
        self, abstract: Any, config: dict[str, Any], allow_changes: bool = False
    ) -> Restored:
        """The newest step that is sound, restored as by `restore`.

        Damaged steps that are newer are renamed to STEP.corrupt-N: they count no longer and lose
        nothing. `allow_changes`: another config is reported, not refused.

        Raises:
            InputError: no step is sound, or as `restore`.
        """
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                tree, meta, changes = self.restore(step, abstract, config, allow_changes)
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
    ) -> tuple[Any, dict[str, Any], list[str]]:
        """(tree, meta, changed options) of a step, on the devices that `abstract` names.

        `abstract`: a tree of jax.ShapeDtypeStruct with shardings, or of arrays; it may be of
        another mesh than the tree that was saved. `config`: compared with meta["config"].

        Raises:
            DamagedError: the step is not there, unreadable or not what was saved.
            InputError: it is of another version of this code; or lists of what differs: options,
                or leaves that are missing, unknown, or of another shape or dtype.
        """
        wanted = to_abstract(abstract)
        record = self._agreed(step, lambda: self._record(step))
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
        _refuse(source, fingerprints.list_mismatches(record, wanted))
        tree = self._agreed(step, lambda: self._arrays(step, wanted))
        self._agreed(step, lambda: self._require_saved_bits(step, tree, record))
        return tree, record["run"], changes

    def _record(self, step: int) -> dict[str, Any]:
        present = self.steps()
        if step not in present:
            known = ", ".join(map(str, present)) or "none"
            raise DamagedError(f"{self.directory}: no checkpoint of step {step}; present: {known}")
        # Not by the manager, whose readers wait for each other: one that fails would not come.
        folder = self.directory / str(step) / "meta"
        record: Any = ocp.JsonCheckpointHandler().restore(folder)
        if damage := fingerprints.describe_damage(record, step):
            raise DamagedError(f"{self.directory / str(step)}: {damage}")
        return record

    def _arrays(self, step: int, wanted: Any) -> Any:
        args = ocp.args.StandardRestore(unflatten(dict(leaf_paths(wanted))))
        folder = self.directory / str(step) / "state"
        found = dict(leaf_paths(ocp.StandardCheckpointHandler().restore(folder, args=args)))
        leaves = [found[name] for name, _ in leaf_paths(wanted)]
        return jax.tree.unflatten(jax.tree.structure(wanted), leaves)

    def _require_saved_bits(self, step: int, tree: Any, record: dict[str, Any]) -> None:
        if changed := fingerprints.list_damaged_leaves(record, tree):
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise DamagedError(
                f"{self.directory / str(step)}: the bits of {', '.join(changed[:3])}{more} are not "
                "those that were saved"
            )

    def _agreed(self, step: int, read: Any) -> Any:
        """What `read` returns, if it does so on every process; a DamagedError on all otherwise."""
        value, damage = None, None
        try:
            value = read()
        except DamagedError as error:
            damage = error
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:  # orbax and tensorstore raise whatever their readers meet
            damage = DamagedError(
                f"{self.directory / str(step)}: unreadable checkpoint ({_first_line(error)})"
            )
        if not _on_all(damage is None) and damage is None:
            damage = DamagedError(f"{self.directory / str(step)}: not readable by every process")
        if damage is not None:
            raise damage
        return value

    def _put_aside(self, step: int) -> epath.Path:
        number = 0
        while (aside := self.directory / f"{step}.corrupt-{number}").exists():
            number += 1
        processes.barrier(f"{aside} is free")
        if jax.process_index() == 0:
            (self.directory / str(step)).rename(aside)
        processes.barrier(f"{aside} is taken")
        return aside

    def _require_room(self, tree: Any) -> None:
        if "://" in str(self.directory):
            return  # a bucket has no end
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
        free = shutil.disk_usage(self.directory).free
        if not _on_all(needed <= free):
            raise OSError(f"it needs {needed / GIB:.3g} GiB and {free / GIB:.3g} GiB are free")

    def _remove_parts(self) -> None:
        """Removes what failed saves have written: it takes the room that the next ones need.

        Writes that were under way beside the one that failed may put more there for a while, so
        this is done again at each later save.
        """
        if jax.process_index() != 0:
            return
        for step in self._unfinished:
            for part in self.directory.glob(f"{step}.orbax-checkpoint-tmp*"):
                with contextlib.suppress(OSError):
                    part.rmtree(missing_ok=True)

    def close(self) -> None:
        """Waits for the last save and lets go of threads, also after a failure."""
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
            print(f"warning: {failed}", file=sys.stderr)  # what ends the run is `error`

    def _failed(self, error: Exception) -> SaveError:
        step, self._saving = self._saving, None
        # orbax tells one failure again, by each of its threads: at the next save, or at the end.
        for ask in 2 * (self._manager.wait_until_finished, self._manager.check_for_errors):
            with contextlib.suppress(Exception):
                ask()
        if step is not None:
            self._unfinished.add(step)
        self._remove_parts()
        return SaveError(
            f"{self.directory}: the checkpoint of step {step} could not be written "
            f"({_first_line(error)}); finished ones are intact, so make room or mend the cause "
            "and rerun the command"
        )


def to_abstract(tree: Any) -> Any:
    """Shapes, dtypes and shardings of a tree, which may then be let go."""

    def leaf(x: Any) -> jax.ShapeDtypeStruct:
        if x.sharding is None:
            raise ValueError("a leaf without sharding: restoring needs to know the devices")
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)

    return jax.tree.map(leaf, tree)


def _on_all(good: bool) -> bool:
    return bool(processes.all_gather(np.array(good)).all())


def _refuse(source: epath.Path, problems: list[str]) -> None:
    if problems:
        raise InputError([f"{source}: {line}" for line in problems])


def _worth_printing(record: logging.LogRecord) -> bool:
    """Nothing of orbax, whose errors reach us as exceptions, once and not in ten tracebacks."""
    return "orbax" not in record.pathname


def _first_line(error: Exception) -> str:
    line = (str(error).splitlines() or [""])[0]
    # The reason stands at the end, behind all the paths.
    return f"{type(error).__name__}: {line if len(line) <= 200 else '...' + line[-200:]}"
