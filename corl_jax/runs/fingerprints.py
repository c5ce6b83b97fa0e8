"""What a checkpoint says of itself, so that it cannot be taken for something else.

The record that lies beside the arrays names each leaf with its type, shape and a fingerprint of
its bits, taken on the devices before the save and again after a restore; the record itself has a
SHA-256. Nothing between a device's memory and the next run's is trusted.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from corl_jax.params import leaf_paths

SCHEMA_VERSION = 2


def fingerprint_leaves(tree: Any) -> dict[str, str]:
    """path -> 64 bits of each array in hex; one changed bit changes them, another mesh does not."""
    sums = {name: _sums(leaf) for name, leaf in leaf_paths(tree)}
    return {name: f"{int(a):08x}{int(b):08x}" for name, (a, b) in jax.device_get(sums).items()}


def fingerprint_tree(tree: Any) -> str:
    """One digest of a whole tree's fingerprints."""
    return _sha256(fingerprint_leaves(tree))


@jax.jit
def _sums(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two sums modulo 2^32 of each element's bits, scrambled together with its position.

    Integers add up to the same in any order, so the layout over devices does not matter.
    Scrambled, because of two flipped sign bits a plain weighted sum sees nothing.
    """
    words = jnp.dtype(f"uint{min(8 * x.dtype.itemsize, 32)}")
    bits = x.astype(words) if x.dtype == bool else jax.lax.bitcast_convert_type(x, words)
    bits = bits.astype(jnp.uint32)
    position = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        place = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        position = position * np.uint32(size & 0xFFFFFFFF) + place

    def total(salt: int, factor: int) -> jax.Array:
        mixed = (bits ^ _scrambled(position + np.uint32(salt))) * np.uint32(factor)
        return _scrambled(mixed).sum(dtype=jnp.uint32)

    return total(0x9E3779B9, 1), total(0x3C6EF372, 0x2545F491)


def _scrambled(x: jax.Array) -> jax.Array:
    """A permutation of 32-bit words in which each bit depends on all (MurmurHash3's last step)."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def make_record(step: int, tree: Any, run: dict[str, Any]) -> dict[str, Any]:
    """The JSON values that lie beside a step's arrays; `run` are those of the caller."""
    marks = fingerprint_leaves(tree)
    leaves = {name: [*_kind(leaf), marks[name]] for name, leaf in leaf_paths(tree)}
    record = {"schema_version": SCHEMA_VERSION, "step": step, "run": run, "leaves": leaves}
    return record | {"sha256": _sha256(record)}


def describe_damage(record: Any, step: int) -> str | None:
    """Why a record that was read for `step` is not what was written; None if it is."""
    if not isinstance(record, dict) or not isinstance(record.get("schema_version"), int):
        return "its record is not one of a checkpoint"
    if record["schema_version"] == 1 and "sha256" not in record:
        return None  # an old version's, which the caller refuses
    rest = {key: value for key, value in record.items() if key != "sha256"}
    if record.get("sha256") != _sha256(rest):
        return "its record is not the one that was saved"
    if record["step"] != step:
        return f"it is a checkpoint of step {record['step']} under another name"
    return None


def list_mismatches(record: dict[str, Any], wanted: Any) -> list[str]:
    """Leaves that a (sound) record has and `wanted` has not, or otherwise; shapes and dtypes."""
    remedy = "resume with the model, options and version that wrote it"
    stored = {name: tuple(leaf[:2]) for name, leaf in record["leaves"].items()}
    expected = {name: _kind(leaf) for name, leaf in leaf_paths(wanted)}
    lines = [f"{name}: missing; {remedy}" for name in expected if name not in stored]
    lines += [f"{name}: unknown; {remedy}" for name in stored if name not in expected]
    for name in expected.keys() & stored.keys():
        found, other = (
            f"{tuple(shape)} {dtype}" for dtype, shape in (stored[name], expected[name])
        )
        if found != other:
            lines.append(f"{name}: found {found}, expected {other}; {remedy}")
    return sorted(lines)


def list_damaged_leaves(record: dict[str, Any], tree: Any) -> list[str]:
    """Names of leaves whose bits are not those that the record was made of."""
    return [
        name for name, mark in fingerprint_leaves(tree).items() if record["leaves"][name][2] != mark
    ]


def _kind(leaf: Any) -> tuple[str, list[int]]:
    return jnp.dtype(leaf.dtype).name, list(leaf.shape)


def _sha256(record: dict[str, Any]) -> str:
    text = json.dumps(record, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
