"""Parameters: a nested dict of arrays, in which a leaf's path is its keys joined by `/`.

    {"lm_head": {"kernel": x}}  <->  {"lm_head/kernel": x}

One path language serves sharding rules, the choice of trained parameters, checkpoints and key
tables.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from corl_jax.errors import InputError
from corl_jax.types import Params


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns a nested dict as {path: leaf}, in the order of its keys."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        path = f"{prefix}/{name}" if prefix else str(name)
        flat.update(flatten(value, path) if isinstance(value, Mapping) else {path: value})
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Returns {path: leaf} as a nested dict."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, name = path.split("/")
        # "a/b/c" -> tree["a"]["b"]["c"]; parents that do not exist yet are made.
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree


def leaf_paths(tree: Any) -> list[tuple[str, Any]]:
    """Returns (path, leaf) of each leaf of any pytree, in the order of jax.tree.leaves."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(_join_keys(keys), leaf) for keys, leaf in leaves]


def map_with_path(function: Callable[[str, Any], Any], tree: Params) -> Params:
    """Returns the tree of function(path, leaf)."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, leaf: function(_join_keys(keys), leaf), tree
    )


def _join_keys(keys: tuple) -> str:
    # keystr with simple=True gives "kernel", not "['kernel']", for keys of every kind of node.
    return "/".join(jax.tree_util.keystr((key,), simple=True) for key in keys)


def partition(
    params: Params, patterns: Sequence[str], option: str = "train.trainable"
) -> tuple[Params, Params]:
    """Splits parameters by their paths: any pattern matches, or none does.

    `merge` puts the two trees together again. `option` names the config's option in messages.

    Raises:
        InputError: a pattern is not a regular expression, or matches no path.
    """
    paths = [path for path, _ in leaf_paths(params)]
    problems = []
    for pattern in patterns:
        # A pattern without a match is a typing error: it would silently train nothing.
        try:
            if not any(re.fullmatch(pattern, path) for path in paths):
                tops = ", ".join(sorted({path.split("/")[0] for path in paths}))
                problems.append(
                    f"{option}: {pattern!r} matches no parameter path; paths start with {tops}"
                )
        except re.error as error:
            problems.append(f"{option}: {pattern!r} is no regular expression: {error}")
    if problems:
        raise InputError(problems)
    chosen = {path for path in paths if any(re.fullmatch(p, path) for p in patterns)}
    flat = flatten(params)
    return (
        unflatten({path: leaf for path, leaf in flat.items() if path in chosen}),
        unflatten({path: leaf for path, leaf in flat.items() if path not in chosen}),
    )


def merge(first: Params, second: Params) -> Params:
    """Returns the union of two trees that share no path."""
    merged = dict(first)
    for key, value in second.items():
        merged[key] = merge(merged[key], value) if key in merged else value
    return merged


def compute_dtype(path: str, dtype: Any, float32_parts: Sequence[str]) -> Any:
    """Returns the dtype of one parameter of a network that computes in `dtype`.

    Paths whose first name is in `float32_parts` compute in float32 in any case.
    """
    # "vqmodel/decoder/conv_in/kernel" -> "vqmodel"
    return jnp.float32 if path.split("/")[0] in float32_parts else dtype


def cast(params: Params, dtype: Any, float32_parts: Sequence[str]) -> Params:
    """Returns a copy of the parameters for computing in `dtype`; see `compute_dtype`."""

    def cast_leaf(path: str, x: Any) -> Any:
        return x.astype(compute_dtype(path, dtype, float32_parts))

    return map_with_path(cast_leaf, params)
