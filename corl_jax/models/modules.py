"""Converts between a network, which a config builds, and its parameters, a nested dict of arrays.

`bind(kind, config, params)` works with concrete arrays and inside `jit`. `kind` is the network's
class, made as `kind(config, rngs=...)`; `config` is a frozen dataclass.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from corl_jax.types import Params


# Building a network of 24 stacked layers in Python takes time, and `bind` needs it in every trace.
@functools.lru_cache(maxsize=32)
def _split_module(kind: Any, config: Any) -> tuple[Any, Any]:
    return nnx.split(nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0))))


def make_abstract(kind: Any, config: Any, dtype: Any = jnp.float32) -> Params:
    """Returns the shapes of all parameters, as a nested dict of ShapeDtypeStruct."""
    pure = nnx.to_pure_dict(_split_module(kind, config)[1])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), _make_keys_strings(pure))


def init_params(kind: Any, config: Any, key: jax.Array, dtype: Any = jnp.float32) -> Params:
    """Returns random parameters, as the network's layers initialise them."""

    def make(key):
        state = nnx.state(kind(config, rngs=nnx.Rngs(key)))
        return jax.tree.map(lambda x: x.astype(dtype), _make_keys_strings(nnx.to_pure_dict(state)))

    # One program: without jit every initialiser would be compiled and run alone.
    return jax.jit(make)(key)


def bind(kind: Any, config: Any, params: Params) -> Any:
    """Returns the network with these parameters."""
    return nnx.merge(_split_module(kind, config)[0], nnx.State(_restore_integer_keys(params)))


def _make_keys_strings(tree: Any) -> Any:
    """Returns the tree with list indices as strings: parts of a path are strings."""
    if not isinstance(tree, dict):
        return tree
    return {str(key): _make_keys_strings(value) for key, value in tree.items()}


def _restore_integer_keys(tree: Any) -> Any:
    # nnx finds the entries of a list under integers: {"0": x} -> {0: x}
    if not isinstance(tree, dict):
        return tree
    return {int(k) if k.isdigit() else k: _restore_integer_keys(v) for k, v in tree.items()}
