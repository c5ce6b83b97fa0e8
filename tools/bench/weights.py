"""Draws random parameters on the device, and changes them so that networks never stop early."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from corl_jax.params import map_with_path
from corl_jax.types import Params

STD = 0.02
NEVER = -1e4  # a logit below all others


Place = Callable[[str, tuple[int, ...]], Any]
"""(path, shape) -> sharding."""


def draw_params(
    abstract: Params, seed: int, dtype: Any = jnp.float32, place: Place | None = None,
    float32_parts: tuple[str, ...] = (),
) -> Params:  # fmt: skip
    """Returns normal kernels and embeddings of the shapes in `abstract`, unit scales, zero biases.

    A scalar, which is the logarithm of the factor on CLIP's cosines, becomes that of 100.
    `float32_parts` of a policy are float32 in any dtype. `place` returns the sharding of a leaf, by
    default the first device.
    """
    # Keys of this kind use the generator of the device, which is faster than threefry.
    keys = itertools.count()
    base = jax.random.key(seed, impl="rbg")

    def draw_leaf(path: str, x: Any) -> jax.Array:
        where = None if place is None else place(path, x.shape)
        exact = path.startswith(tuple(f"{part}/" for part in float32_parts)) or not x.shape
        kind = jnp.float32 if exact else dtype
        if path.endswith("/scale"):
            return jnp.ones(x.shape, kind, device=where)
        if path.endswith("/bias"):
            return jnp.zeros(x.shape, kind, device=where)
        if not x.shape:
            return jnp.full(x.shape, math.log(100), kind, device=where)
        return _draw_noise(jax.random.fold_in(base, next(keys)), x.shape, kind, where)

    return map_with_path(draw_leaf, abstract)


@functools.partial(jax.jit, static_argnames=("shape", "dtype", "where"))
def _draw_noise(key: jax.Array, shape: tuple[int, ...], dtype: Any, where: Any) -> jax.Array:
    # A program per shape: one for all leaves takes longer to compile than they do together.
    noise = STD * jax.random.normal(key, shape, dtype)
    return noise if where is None else jax.lax.with_sharding_constraint(noise, where)


def prevent_end(params: Params, eos: int) -> Params:
    """Changes a Janus so that greedy answers never end: the logit of EOS is 0."""
    # Of thousands of random logits the largest one is above 0.
    kernel = params["lm_head"]["kernel"].at[:, eos].set(0)
    return params | {"lm_head": {"kernel": kernel}}


def prevent_separator(params: Params, config: Any) -> Params:
    """Changes a BLIP so that captions use all their tokens, with words that BERT knows too."""
    text = config.text
    decoder = params["text_decoder"]
    barred = jnp.array([text.sep_token_id, *range(text.bos_token_id, text.vocab_size)])
    bias = decoder["head"]["bias"].at[barred].set(NEVER)
    head = decoder["head"] | {"bias": bias}
    return params | {"text_decoder": decoder | {"head": head}}
