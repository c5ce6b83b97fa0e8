"""Checkpoints for resuming: saved in the background, whole or not at all, restored bit by bit.

A step is written to a temporary directory and renamed when complete, so a run that dies in a
save finds the step before. Trees are stored as nested dicts of their path's keys, whatever
containers they are made of, and restored into the containers and shardings that are asked for.
Each array carries a fingerprint, so that bits that changed on the disk are refused.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy

from corl_jax.errors import InputError
from corl_jax.train.rundir import jsonable, require_same_config

SCHEMA_VERSION = 1
LISTED = 20  # a wrong model differs in every parameter; the first ones tell which

_MOVE_AWAY = "move it away to resume from the one before"
_UNREADABLE = (OSError, ValueError, KeyError, TypeError)  # as orbax and tensorstore raise them


class Checkpoints:
    """The checkpoints of one run, of which the newest `keep` stay."""

    def __init__(self, directory: str | Path, keep: int = 1):
        """Opens or creates the directory and clears away what an interrupted save left.

        Only for the run's one writer, or all processes of it.

        Raises:
            InputError: the directory cannot be created or read.
        """
        self.directory = epath.Path(directory)  # which knows gs:// too
        if "://" not in str(directory):
            self.directory = self.directory.absolute()
        self._saving: int | None = None
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
            RuntimeError: this or the save before could not be written.
        """
        if step in self.steps():
            return False
        own = {"schema_version": SCHEMA_VERSION, "fingerprints": fingerprints(tree)}
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(_nested(tree)),
            meta=ocp.args.JsonSave({"run": jsonable(meta), **own}),
        )
        self._saving = step
        try:
            return self._manager.save(step, args=args, force=True)
        except Exception as error:
            raise self._failed(error) from error

    def check(self) -> None:
        """Does not wait.

        Raises:
            RuntimeError: a save in the background has failed.
        """
        try:
            self._manager.check_for_errors()
        except Exception as error:
            raise self._failed(error) from error

    def wait(self) -> None:
        """Returns when nothing is being saved.

        Raises:
            RuntimeError: the save could not be written.
        """
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as error:
            raise self._failed(error) from error

    def steps(self) -> list[int]:
        """Finished steps, oldest first, as the directory shows them after `wait`."""
        self.wait()
        self._manager.reload()  # a manager counts a step as soon as its save has begun
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """The newest finished step."""
        return max(self.steps(), default=None)

    def meta(self, step: int) -> dict[str, Any]:
        """The JSON values saved with a step.

        Raises:
            InputError: the step is not there, unreadable, or of another version of this code.
        """
        return self._record(step)["run"]

    def _record(self, step: int) -> dict[str, Any]:
        present = self.steps()
        if step not in present:
            known = ", ".join(map(str, present)) or "none"
            raise InputError(f"{self.directory}: no checkpoint of step {step}; present: {known}")
        try:
            args = ocp.args.Composite(meta=ocp.args.JsonRestore())
            record = dict(self._manager.restore(step, args=args)["meta"])
            version = record["schema_version"]
        except _UNREADABLE as error:
            raise self._unreadable(step, error) from error
        if version != SCHEMA_VERSION:
            raise InputError(
                f"{self.directory / str(step)}: found schema version {version}, expected "
                f"{SCHEMA_VERSION}; resume with the version of corl_jax that wrote it"
            )
        return record

    def restore(
        self, step: int, abstract: Any, config: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """(tree, meta) of a step, on the devices that `abstract` names.

        `abstract`: a tree of jax.ShapeDtypeStruct with shardings, or of arrays; it may be of
        another mesh than the tree that was saved. `config`: compared with meta["config"].

        Raises:
            InputError: the step is not there or unreadable; or lists of what differs: options,
                or leaves that are missing, unknown, or of another shape or dtype.
        """
        record = self._record(step)
        source = self.directory / str(step)
        if config is not None:
            saved = record["run"].get("config", {})
            require_same_config(saved, jsonable(config), str(source))
        wanted = jax.tree.map(_abstract_leaf, abstract)
        try:
            stored = dict(_flat(_stored_tree(self._manager.item_metadata(step)["state"])))
            _refuse(source, _mismatches(stored, dict(_named_leaves(wanted))))
            args = ocp.args.Composite(state=ocp.args.StandardRestore(_nested(wanted)))
            found = dict(_flat(self._manager.restore(step, args=args)["state"]))
            fingerprints_then = record["fingerprints"]
        except InputError:
            raise
        except _UNREADABLE as error:
            raise self._unreadable(step, error) from error
        leaves = [found[name] for name, _ in _named_leaves(wanted)]
        tree = jax.tree.unflatten(jax.tree.structure(wanted), leaves)
        _refuse(source, _damages(fingerprints_then, fingerprints(tree)))
        return tree, record["run"]

    def close(self) -> None:
        """Waits for the last save and lets go of threads, also after a failure."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _failed(self, error: Exception) -> RuntimeError:
        return RuntimeError(
            f"{self.directory}: the checkpoint of step {self._saving} could not be written "
            f"({_first_line(error)}); finished ones are intact, so make room or mend the cause "
            "and rerun the command"
        )

    def _unreadable(self, step: int, error: Exception) -> InputError:
        return InputError(
            f"{self.directory / str(step)}: unreadable checkpoint ({_first_line(error)}); "
            f"{_MOVE_AWAY}"
        )


def _refuse(source: Path, problems: list[str]) -> None:
    if problems:
        more = [f"and {len(problems) - LISTED} more"] * (len(problems) > LISTED)
        raise InputError([f"{source}: {line}" for line in [*problems[:LISTED], *more]])


def fingerprints(tree: Any) -> dict[str, int]:
    """path -> 32 bits of each array; one changed bit changes them, another mesh does not."""
    sums = {name: _fingerprint(leaf) for name, leaf in _named_leaves(tree)}
    return {name: int(value) for name, value in jax.device_get(sums).items()}


@jax.jit
def _fingerprint(x: jax.Array) -> jax.Array:
    """Sum over the bits of each element times an odd number of its position, modulo 2^32.

    Integers add up to the same in any order, so the layout over devices does not matter.
    """
    words = jnp.dtype(f"uint{min(8 * x.dtype.itemsize, 32)}")
    bits = x.astype(words) if x.dtype == bool else jax.lax.bitcast_convert_type(x, words)
    position = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        position = position * np.uint32(size) + jax.lax.broadcasted_iota(
            jnp.uint32, bits.shape, axis
        )
    factor = (position ^ (position >> 16)) * np.uint32(0x45D9F3B)
    factor = (factor ^ (factor >> 15)) | np.uint32(1)
    return (bits.astype(jnp.uint32) * factor).sum(dtype=jnp.uint32)


def _worth_printing(record: logging.LogRecord) -> bool:
    """Nothing of orbax, whose errors reach us as exceptions, once and not in ten tracebacks."""
    return "orbax" not in record.pathname


def _first_line(error: Exception) -> str:
    line = (str(error).splitlines() or [""])[0]
    # The reason stands at the end, behind all the paths.
    return f"{type(error).__name__}: {line if len(line) <= 200 else '...' + line[-200:]}"


def _names(path: tuple) -> list[str]:
    return [jax.tree_util.keystr((key,), simple=True) for key in path]


def _named_leaves(tree: Any) -> list[tuple[str, Any]]:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [("/".join(_names(path)), leaf) for path, leaf in flat]


def _nested(tree: Any) -> dict[str, Any]:
    """Any pytree as nested dicts of strings; empty containers vanish."""
    nested: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        *parents, last = _names(path)
        node = nested
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = leaf
    return nested


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value


def _stored_tree(metadata: Any) -> dict[str, Any]:
    if metadata is None:
        raise ValueError("its description of the arrays is missing")
    return getattr(metadata, "tree", metadata)


def _abstract_leaf(leaf: Any) -> jax.ShapeDtypeStruct:
    if leaf.sharding is None:
        raise ValueError("a leaf without sharding: restoring needs to know the devices")
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _mismatches(stored: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    remedy = "resume with the model, options and version that wrote it"
    lines = [f"{name}: missing; {remedy}" for name in wanted if name not in stored]
    lines += [f"{name}: unknown; {remedy}" for name in stored if name not in wanted]
    for name in wanted.keys() & stored.keys():
        found, expected = (
            f"{tuple(leaf.shape)} {jnp.dtype(leaf.dtype).name}"
            for leaf in (stored[name], wanted[name])
        )
        if found != expected:
            lines.append(f"{name}: found {found}, expected {expected}; {remedy}")
    return sorted(lines)


def _damages(saved: dict[str, int], found: dict[str, int]) -> list[str]:
    return [
        f"{name}: its bits are not those that were saved; {_MOVE_AWAY}"
        for name in found
        if saved.get(name) != found[name]
    ]
