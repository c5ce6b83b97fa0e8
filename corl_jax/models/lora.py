"""Low-rank adapters: a trained product A B beside a kernel W that does not change.

Source: Hu et al. 2021 (arXiv 2106.09685), section 4.1; names and initial values are PEFT's.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from corl_jax.models.layers import initializer, make_linear
from corl_jax.types import Params


@dataclasses.dataclass(frozen=True)
class Lora:
    """The projections of every layer that have adapters, and the adapters' size."""

    rank: int
    alpha: float
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        """The factor on the product x A B."""
        return self.alpha / self.rank


class LoraLinear(nnx.Linear):
    """A dense layer x W + x A B alpha / rank, and its bias; A is [in, rank] and B [rank, out]."""

    def __init__(
        self, in_features: int, out_features: int, lora: Lora, *, bias: bool, rngs: nnx.Rngs
    ):
        super().__init__(
            in_features, out_features, use_bias=bias, kernel_init=initializer, rngs=rngs
        )
        self.scale = lora.scale
        self.lora_a = nnx.Param(_draw_uniform(rngs.params(), (in_features, lora.rank)))
        # Zeros: at the start the adapted model equals the base model.
        self.lora_b = nnx.Param(jnp.zeros((lora.rank, out_features)))

    def __call__(self, x: jax.Array) -> jax.Array:  # pyright: ignore[reportIncompatibleMethodOverride]
        # (x A) B, not x (A B): the product A B would be as large as the kernel.
        return super().__call__(x) + (x @ self.lora_a[...] * self.scale) @ self.lora_b[...]


def make_projection(
    name: str,
    in_features: int,
    out_features: int,
    lora: Lora | None,
    *,
    bias: bool = False,
    rngs: nnx.Rngs,
) -> nnx.Linear:
    """Makes a dense layer, with an adapter if `name` is among the targets."""
    if lora is None or name not in lora.targets:
        return make_linear(in_features, out_features, bias=bias, rngs=rngs)
    return LoraLinear(in_features, out_features, lora, bias=bias, rngs=rngs)


def _draw_uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draws initial values of A as PEFT does; `shape` is [..., in, rank]."""
    bound = 1 / math.sqrt(shape[-2])  # torch's kaiming_uniform with a = sqrt(5)
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def init_adapters(shapes: Params, key: jax.Array) -> Params:
    """Returns initial values of adapters: A random, B zero, so that they change nothing."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)
    keys = jax.random.split(key, len(leaves))

    def init_leaf(key: jax.Array, path: Any, leaf: Any) -> jax.Array:
        is_a = path[-1].key == "lora_a"
        return _draw_uniform(key, leaf.shape) if is_a else jnp.zeros(leaf.shape)

    return tree.unflatten([init_leaf(key, *leaf) for key, leaf in zip(keys, leaves, strict=True)])
