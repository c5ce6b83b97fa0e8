"""Fingerprints of a checkpoint: dtype, shape and a hash of each array, to detect any damage.

The record of a checkpoint lies beside its arrays. It has the fingerprint of each leaf, computed
on the devices before the save and again after a restore. The record itself has a SHA-256. So
damage is detected anywhere between the memory of one run's devices and the next one's.
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
    """Returns path -> hash of each array, 64 bits in hex. It is the same on every mesh."""
    sums = {name: _hash_bits(leaf) for name, leaf in leaf_paths(tree)}
    return {name: f"{int(a):08x}{int(b):08x}" for name, (a, b) in jax.device_get(sums).items()}


def fingerprint_tree(tree: Any) -> str:
    """Returns one hash of all fingerprints of a tree."""
    return _hash_record(fingerprint_leaves(tree))


@jax.jit
def _hash_bits(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns two sums modulo 2^32 of all elements' bits, scrambled with their positions."""
    # Integer sums are the same in any order, so the layout over devices does not matter.
    # Without scrambling, two flipped sign bits would leave the sum as it is: 2^31 + 2^31 = 2^32.
    # float32 -> uint32, bfloat16 -> uint16. An 8-byte element becomes two words, on a new last
    # axis.
    words = jnp.dtype(f"uint{min(8 * x.dtype.itemsize, 32)}")
    bits = x.astype(words) if x.dtype == bool else jax.lax.bitcast_convert_type(x, words)
    bits = bits.astype(jnp.uint32)
    # The position in C order. [2, 3]: [[0, 1, 2], [3, 4, 5]].
    position = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        place = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        position = position * np.uint32(size & 0xFFFFFFFF) + place

    # Two sums with different salts and odd factors: two errors that cancel in one do not in both.
    def sum_words(salt: int, factor: int) -> jax.Array:
        mixed = (bits ^ _scramble(position + np.uint32(salt))) * np.uint32(factor)
        return _scramble(mixed).sum(dtype=jnp.uint32)

    return sum_words(0x9E3779B9, 1), sum_words(0x3C6EF372, 0x2545F491)


def _scramble(x: jax.Array) -> jax.Array:
    """Scrambles 32-bit words one to one; each bit of the result depends on all bits of a word.

    Source: the last step of MurmurHash3 (fmix32).
    """
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def make_record(step: int, tree: Any, run: dict[str, Any]) -> dict[str, Any]:
    """Returns the JSON record of a step, with a fingerprint per leaf; `run` is from the caller."""
    marks = fingerprint_leaves(tree)
    leaves = {name: [*_describe_leaf(leaf), marks[name]] for name, leaf in leaf_paths(tree)}
    record = {"schema_version": SCHEMA_VERSION, "step": step, "run": run, "leaves": leaves}
    return record | {"sha256": _hash_record(record)}


def fingerprint_saved_tree(record: dict[str, Any], prefix: str) -> str:
    """Returns `fingerprint_tree` of the saved leaves below a path, from the record alone."""
    start = f"{prefix}/"
    leaves = record["leaves"].items()
    return _hash_record(
        {name.removeprefix(start): leaf[2] for name, leaf in leaves if name.startswith(start)}
    )


def describe_damage(record: Any, step: int) -> str | None:
    """Returns how the record of `step` differs from the saved one; None if it does not."""
    if not isinstance(record, dict) or not isinstance(record.get("schema_version"), int):
        return "its record is not one of a checkpoint"
    if record["schema_version"] == 1 and "sha256" not in record:
        return None  # an old version, which the caller refuses with another message
    rest = {key: value for key, value in record.items() if key != "sha256"}
    if record.get("sha256") != _hash_record(rest):
        return "its record is not the one that was saved"
    if record["step"] != step:
        return f"it is a checkpoint of step {record['step']} under another name"
    return None


def list_mismatches(record: dict[str, Any], tree: Any) -> list[str]:
    """Lists the leaves in which a sound record and a tree differ: names, shapes and dtypes."""
    remedy = "resume with the model, options and version that wrote it"
    stored = {name: tuple(leaf[:2]) for name, leaf in record["leaves"].items()}
    expected = {name: _describe_leaf(leaf) for name, leaf in leaf_paths(tree)}
    lines = [f"{name}: missing; {remedy}" for name in expected if name not in stored]
    lines += [f"{name}: unknown; {remedy}" for name in stored if name not in expected]
    for name in expected.keys() & stored.keys():
        saved, expected_now = (
            f"{tuple(shape)} {dtype}" for dtype, shape in (stored[name], expected[name])
        )
        if saved != expected_now:
            lines.append(f"{name}: found {saved}, expected {expected_now}; {remedy}")
    return sorted(lines)


def list_damaged_leaves(record: dict[str, Any], tree: Any) -> list[str]:
    """Lists the leaves whose bits differ from those that the record was made of."""
    return [
        name for name, mark in fingerprint_leaves(tree).items() if record["leaves"][name][2] != mark
    ]


def _describe_leaf(leaf: Any) -> tuple[str, list[int]]:
    return jnp.dtype(leaf.dtype).name, list(leaf.shape)


def _hash_record(record: dict[str, Any]) -> str:
    # Sorted, because JSON readers need not keep the order of keys.
    text = json.dumps(record, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
