"""Packs answers of different lengths into fewer rows, so that an update reads little padding.

Answers of one prompt share rows of T tokens; each still sees its prompt and itself only. All
results are those of the answers apart, but for rounding.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from corl_jax.devices.mesh import context_batch_shards
from corl_jax.models.llama import PackedRows

PACKED = "packed"
"""Key of `Segment.replay`: the tokens of the packed rows [B * R, T] int32, see `pack_rows`."""

# A program is compiled for each: at most five beside that of answers apart.
SHARES = (1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4)
"""Packed rows of an update as shares of its answers."""


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How an update splits B prompts into the blocks that a device reads together."""

    # The prompts of two shards and two micro-batches, as `split_batch` takes them:
    #   shard 0: p0 p1 p2 p3, shard 1: p4 p5 p6 p7; blocks [p0, p2], [p1, p3], [p4, p6], [p5, p7]

    shards: int
    micro_batches: int

    def split(self, x: np.ndarray) -> np.ndarray:
        """Splits [B, ...] into [shards, micro-batches, prompts of a block, ...]."""
        x = x.reshape(self.shards, -1, self.micro_batches, *x.shape[1:])
        return x.swapaxes(1, 2)

    def join(self, x: np.ndarray) -> np.ndarray:
        """Undoes `split`."""
        return x.swapaxes(1, 2).reshape(-1, *x.shape[3:])


def pack_rows(lengths: np.ndarray, row_length: int, blocks: Blocks) -> np.ndarray | None:
    """Packs answers of `lengths` [B, G] into rows of `row_length` tokens (T).

    Returns the token at each place of the rows, [B * R, T] int32: g * T + t is token t of answer g
    of the row's block, and -1 is padding. R is the same for all blocks, one of `SHARES` of G; a
    prompt has more rows or fewer. None: the answers need nearly as many rows as there are.
    """
    group = lengths.shape[1]
    by_block = blocks.split(lengths)
    *outer, prompts, _ = by_block.shape
    packed = [_fill_rows(block, row_length) for block in by_block.reshape(-1, prompts, group)]
    needed = math.ceil(max(map(len, packed)) / prompts)
    # G = 8: 1, 2, 3, 4 or 6; G = 2: 1
    counts = [math.ceil(share * group) for share in SHARES]
    rows = next((count for count in counts if needed <= count < group), None)
    if rows is None:
        return None
    tokens = np.full((len(packed), prompts * rows, row_length), -1, np.int32)
    for of_block, filled, block in zip(
        tokens, packed, by_block.reshape(len(packed), -1), strict=True
    ):
        for row, answers in zip(of_block, filled, strict=False):
            # Answers 4 and 1 of 3 and 2 tokens, T = 6: [24, 25, 26, 6, 7, -1]
            real = [g * row_length + np.arange(block[g]) for g in answers]
            joined = np.concatenate(real)
            row[: len(joined)] = joined
    return blocks.join(tokens.reshape(*outer, prompts, rows, row_length)).reshape(-1, row_length)


def _fill_rows(lengths: np.ndarray, row_length: int) -> list[list[int]]:
    """Returns the numbers of the answers in each row of a block with `lengths` [prompts, G].

    Each answer goes to the first row of its prompt with room, long answers first: first fit
    decreasing, which needs at most 11/9 of the fewest rows, and one more.
    """
    filled: list[list[int]] = []
    for prompt, row in enumerate(lengths):
        rooms: list[int] = []
        rows: list[list[int]] = []
        for g in sorted(np.flatnonzero(row), key=lambda g: -row[g]):
            fitting = (i for i, room in enumerate(rooms) if room >= row[g])
            place = next(fitting, None)
            if place is None:
                place = len(rows)
                rows.append([])
                rooms.append(row_length)
            rows[place].append(prompt * len(row) + int(g))
            rooms[place] -= row[g]
        filled += rows
    return filled


@dataclasses.dataclass(frozen=True)
class Packing:
    """The packed rows of a micro-batch, inside of a program."""

    tokens: jax.Array  # [rows, T] int32, as `pack_rows` returns them
    shape: tuple[int, ...]  # (N, T) of the answers
    group_size: int

    @property
    def rows(self) -> PackedRows:
        """The rows as the language model takes them."""
        _, length = self.shape
        # A row begins with a token, if it has one. What stands in an empty row is never read.
        owners = jnp.maximum(self.tokens[:, 0], 0) // (self.group_size * length)
        # -1 // T is -1: padding is a part of its own.
        return PackedRows(owners, self.tokens // length, jnp.maximum(self.tokens, 0) % length)

    def pack(self, answers: jax.Array) -> jax.Array:
        """Returns values of answers [N, T] at the places of their tokens [rows, T]."""
        by_shard = answers.reshape(context_batch_shards(), -1)
        places = jnp.maximum(self.tokens, 0).reshape(len(by_shard), -1)
        return jnp.take_along_axis(by_shard, places, axis=1).reshape(self.tokens.shape)

    def unpack(self, rows: jax.Array) -> jax.Array:
        """Returns values of packed rows [rows, T] at the answers' tokens [N, T]; 0 elsewhere."""
        by_shard = rows.reshape(context_batch_shards(), -1)
        numbers = self.tokens.reshape(by_shard.shape)
        size = math.prod(self.shape) // len(by_shard)

        def invert(numbers: jax.Array) -> jax.Array:
            # Numbers [2, 0, -1] of four tokens: places [1, -1, 0, -1]; padding is dropped.
            numbers = jnp.where(numbers < 0, size, numbers)
            places = jnp.full(size, -1, jnp.int32)
            return places.at[numbers].set(jnp.arange(len(numbers)), mode="drop")

        places = jax.vmap(invert)(numbers)
        values = jnp.take_along_axis(by_shard, jnp.maximum(places, 0), axis=1)
        return jnp.where(places < 0, 0.0, values).reshape(self.shape)


def count_tokens_to_score(mask: jax.Array) -> jax.Array:
    """Returns how many tokens [N] of each answer scoring reads: up to the last one in the loss."""
    # [T, F, T, F] -> 3: a token in the loss depends on all before it.
    return jnp.where(mask, jnp.arange(1, mask.shape[1] + 1), 0).max(axis=1)
