"""Looks up rows of a table, with gradients that a GPU adds up without waiting.

On a GPU XLA adds the gradients of a table's rows by atomic operations. Additions to one row wait
for each other, and in bfloat16, for which XLA has a loop of compare and swap, each of them tries
again and again (openxla/xla#26371; float32 too in jaxlib 0.10.2 to 0.11.0, openxla/xla#46225).
Tokens that a batch has ten thousand times, such as the mask token, then cost more than the network.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

BLOCK = 128
"""Most neighbouring tokens whose gradients are added up by one product."""


def look_up(table: jax.Array, ids: jax.Array) -> jax.Array:
    """Returns the rows [..., features] of a table [rows, features]; NaN for an id outside of it."""
    return _take(len(table), table, ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _take(rows: int, table: jax.Array, ids: jax.Array) -> jax.Array:
    return jnp.take(table, ids, axis=0)


def _take_forward(rows: int, table: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _take(rows, table, ids), ids


def _take_backward(rows: int, ids: jax.Array, gradients: jax.Array) -> tuple[jax.Array, None]:
    in_blocks = functools.partial(add_up_in_blocks, rows)
    whole = functools.partial(add_up, rows)
    # The platform of the program, which need not be that of this process's devices.
    sums = lax.platform_dependent(ids, gradients, cuda=in_blocks, rocm=in_blocks, default=whole)
    return sums, None


_take.defvjp(_take_forward, _take_backward)


def add_up(rows: int, ids: jax.Array, gradients: jax.Array) -> jax.Array:
    """Returns the sums [rows, features] of gradients [..., features] with the same id [...]."""
    table = jax.ShapeDtypeStruct((rows, gradients.shape[-1]), gradients.dtype)
    return jax.linear_transpose(lambda table: jnp.take(table, ids, axis=0), table)(gradients)[0]


def add_up_in_blocks(rows: int, ids: jax.Array, gradients: jax.Array) -> jax.Array:
    """Returns the same as `add_up`, with sums in float32.

    The gradients of neighbours with the same id are first added up by a product, and only the first
    neighbour's place goes on to an addition in the table.
    """
    if not ids.ndim:
        return add_up(rows, ids, gradients)
    # An id outside of the table is dropped.
    ids, gradients = _split(ids[..., None], rows)[..., 0], _split(gradients, 0)
    same = ids[..., :, None] == ids[..., None, :]
    # Products with 0 and 1 are exact. HIGHEST: a GPU would round float32 to 10 bits.
    sums: Any = jnp.einsum(
        "...ij,...jd->...id", same.astype(gradients.dtype), gradients,
        precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32,
    )  # fmt: skip
    # ids [a, b, a] -> the third place has an earlier neighbour: [a, b, outside]
    size = ids.shape[-1]
    has_earlier = (same & jnp.tril(jnp.ones((size, size), bool), -1)).any(axis=-1)
    table = jnp.zeros((rows, gradients.shape[-1]), jnp.float32)
    table = table.at[jnp.where(has_earlier, rows, ids)].add(sums, mode="drop")
    return table.astype(gradients.dtype)


def _split(x: jax.Array, fill: int) -> jax.Array:
    """Splits x [..., T, features] into blocks [..., blocks, size, features], padded with `fill`."""
    # Within a row of a batch, so that no row moves to another device.
    *leading, length, features = x.shape
    blocks = -(-length // BLOCK)
    size = -(-length // blocks)
    padding = [(0, 0)] * len(leading) + [(0, blocks * size - length), (0, 0)]
    x = jnp.pad(x, padding, constant_values=fill)
    return x.reshape(*leading, blocks, size, features)
