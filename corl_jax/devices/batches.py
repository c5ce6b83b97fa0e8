"""Moves the rows of a global batch between processes, and between host and devices.

A mesh splits a batch into data x fsdp equal parts, its shards. A process holds the shards of its
own devices. Processes between which `tensor` splits the parameters hold the same shards.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from corl_jax.devices import processes
from corl_jax.devices.mesh import BATCH, batch_sharding, constrain
from corl_jax.errors import InputError
from corl_jax.types import Params


def num_batch_shards(mesh: Any) -> int:
    """Returns the number of equal parts into which the mesh splits a batch (data x fsdp)."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def list_process_shards(mesh: Mesh) -> list[int]:
    """Returns for each process the number of its shard of a batch.

    Raises:
        InputError: a process's shard is not a run of neighbouring parts, or sizes differ.
    """
    count = num_batch_shards(mesh)
    parts: dict[int, set[int]] = {}  # process -> numbers of its parts
    for device, index in batch_sharding(mesh).devices_indices_map((count,)).items():
        # A slice without start, slice(None), is the whole batch: part 0.
        parts.setdefault(device.process_index, set()).add(index[0].start or 0)
    size = len(parts[min(parts)])
    # 8 parts on 2 processes: {0: {0, 1, 2, 3}, 1: {4, 5, 6, 7}} -> [0, 1]
    for process, numbers in parts.items():
        first = min(numbers)
        if first % size or numbers != set(range(first, first + size)):
            raise InputError(
                f"mesh: data x fsdp splits a batch into {count} blocks, of which process {process} "
                f"would hold {sorted(numbers)}; expected {size} that follow each other; choose "
                "mesh.tensor as a divisor or a multiple of the devices of a process"
            )
    return [min(parts[process]) // size for process in sorted(parts)]


def process_shard(mesh: Mesh) -> tuple[int, int]:
    """Returns (shard of this process, number of shards).

    Raises: InputError as `list_process_shards`.
    """
    if len({device.process_index for device in mesh.devices.flat}) == 1:
        return 0, 1
    shards = list_process_shards(mesh)
    return shards[jax.process_index()], max(shards) + 1


def put_rows(mesh: Mesh, tree: Any) -> Any:
    """Makes global arrays from the rows of each process, with rows spread over the mesh."""
    sharding = batch_sharding(mesh)
    placed: dict[int, jax.Array] = {}  # an array that is there twice is placed once

    def place(x: Any) -> jax.Array:
        if id(x) not in placed:
            placed[id(x)] = jax.make_array_from_process_local_data(sharding, np.asarray(x))
        return placed[id(x)]

    return jax.tree.map(place, tree)


def to_host_rows(x: jax.Array) -> np.ndarray:
    """Returns this process's rows of a global array, in order, on the host."""
    if x.is_fully_addressable:
        return np.asarray(x)
    mesh = getattr(x.sharding, "mesh", None)
    assert isinstance(mesh, Mesh), "a global array that lies on no mesh"
    by_rows = batch_sharding(mesh)
    if not x.sharding.is_equivalent_to(by_rows, x.ndim):
        x = jax.device_put(x, by_rows)
    # By start, so that of devices with the same rows, over `tensor`, one remains.
    shards = {shard.index[0].start or 0: shard for shard in x.addressable_shards}
    return np.concatenate([np.asarray(shards[start].data) for start in sorted(shards)])


def all_gather_rows(mesh: Mesh, values: np.ndarray) -> np.ndarray:
    """Returns the rows of all processes, in every process the same.

    If several processes hold the same shard, the first of them counts, should they differ.
    """
    if process_shard(mesh)[1] == 1 and jax.process_count() == 1:
        return values
    shards = list_process_shards(mesh)
    # Shards by process [0, 0, 1, 1]: the rows of processes 0 and 2.
    by_process = processes.all_gather(values)
    return np.concatenate([by_process[shards.index(n)] for n in range(max(shards) + 1)])


def take_own_rows(mesh: Mesh, values: Any) -> Any:
    """Returns this process's rows from a sequence that holds the rows of all processes."""
    # Shard 1 of 2, 8 rows: rows 4 to 7.
    index, count = process_shard(mesh)
    size = len(values) // count
    return values[index * size : (index + 1) * size]


def all_gather_array(x: jax.Array) -> np.ndarray:
    """Returns a global array on the host of every process."""
    if x.is_fully_addressable:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def split_positions(mesh: Mesh, rows: int, batch: int) -> Iterator[np.ndarray]:
    """Yields positions of this process's `rows` in pieces of `batch` rows of all processes.

    Every piece has rows of each shard of the mesh, so that all rows stay on their devices:
    two shards, 8 rows, batch 4: [0, 1, 4, 5], then [2, 3, 6, 7].
    """
    shards = num_batch_shards(mesh)
    size = batch // shards
    # One row for each shard of this process: [[0, 1, 2, 3], [4, 5, 6, 7]].
    positions = np.arange(rows).reshape(shards // process_shard(mesh)[1], -1)
    for first in range(0, positions.shape[1], size):
        yield positions[:, first : first + size].ravel()


@functools.partial(jax.jit, static_argnames="shards")
def join_pieces(pieces: list[Any], *, shards: int) -> Any:
    """Joins pytrees of rows that `split_positions` has split, in the order of the rows."""

    def join(*xs: jax.Array) -> jax.Array:
        # Two shards, pieces [0, 1, 4, 5] and [2, 3, 6, 7]: [[0, 1], [4, 5]] and [[2, 3], [6, 7]]
        # are joined along axis 1 -> [[0, 1, 2, 3], [4, 5, 6, 7]] -> [0 .. 7].
        split = [x.reshape(shards, -1, *x.shape[1:]) for x in xs]
        joined = jnp.concatenate(split, axis=1).reshape(-1, *xs[0].shape[1:])
        return constrain(joined, "batch", *[None] * (joined.ndim - 1))

    return jax.tree.map(join, *pieces)


def find_mesh(params: Any) -> Mesh | None:
    """Returns the mesh of parameters; None on a single device."""
    leaves = jax.tree.leaves(params)
    sharding = getattr(leaves[0], "sharding", None) if leaves else None
    if not isinstance(sharding, NamedSharding) or sharding.mesh.size == 1:
        return None
    return sharding.mesh  # type: ignore[return-value]


# ---- many rows through one program


def pad_rows(values: Sequence[int] | np.ndarray, num_rows: int) -> np.ndarray:
    """Returns `num_rows` rows: those of `values`, then its last row repeated."""
    # num_rows = 4: [a, b, c] -> [a, b, c, c]
    return np.asarray(values)[np.minimum(np.arange(num_rows), len(values) - 1)]


def split_rows(num_rows: int, max_rows: int, multiple: int = 1) -> Iterator[np.ndarray]:
    """Yields the row numbers 0 to num_rows - 1 in pieces of one size.

    The size is as even as possible: at most `max_rows`, rounded up to a multiple of `multiple`.
    The last piece is padded by repeating the last row.
    """
    if not num_rows:
        return
    # 7 rows, at most 3: [0 1 2] [3 4 5] [6 6 6]. 7 rows, at most 4: [0 1 2 3] [4 5 6 6].
    num_pieces = -(-num_rows // max_rows)
    size = -(-num_rows // (num_pieces * multiple)) * multiple
    for first in range(0, num_rows, size):
        yield pad_rows(np.arange(first, min(first + size, num_rows)), size)


def plan_pieces(
    num_rows: int, max_rows: int, params: Params | None
) -> tuple[Iterator[np.ndarray], Callable[[Any], Any]]:
    """Returns the row numbers of each piece, and what spreads its rows over `params`' devices.

    The pieces are those of `split_rows`; each process has as many as the others.
    """
    mesh = find_mesh(params)
    if mesh is None:
        return split_rows(num_rows, max_rows), lambda rows: rows
    # Each process pads its rows to a multiple of its own shards of the mesh.
    multiple = num_batch_shards(mesh) // process_shard(mesh)[1]
    return split_rows(num_rows, max_rows, multiple), functools.partial(put_rows, mesh)


class PendingRows:
    """Rows [N, ...] that devices may still compute. `np.asarray` waits for them.

    Until then the host can start other programs, so that the devices do not wait for the host.
    """

    def __init__(self, wait: Callable[[], np.ndarray]):
        self._wait = functools.cache(wait)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self._wait(), dtype=dtype, copy=copy)

    def then(self, function: Callable[[np.ndarray], np.ndarray]) -> PendingRows:
        """Returns the rows that `function` makes of these rows on the host."""
        return PendingRows(lambda: function(self._wait()))


def run_in_pieces(
    program: Callable[..., Any],
    take: Callable[[np.ndarray], tuple],
    num_rows: int,
    max_rows: int,
    params: Params | None,
) -> list[PendingRows]:
    """Runs a device program over all rows, about `max_rows` at a time.

    `take(row numbers)` returns the arguments of `program` for these rows. All pieces have one
    size, so the program is compiled once. Rows are spread over the devices of `params`.
    Returns each output of the program with `num_rows` rows, without waiting for it.
    """
    pieces, place = plan_pieces(num_rows, max_rows, params)
    outputs = [jax.tree.leaves(program(*place(take(index)))) for index in pieces]

    def join(pieces: tuple[jax.Array, ...]) -> PendingRows:
        # Without the padding, which is at the end of the last piece.
        return PendingRows(lambda: np.concatenate([to_host_rows(x) for x in pieces])[:num_rows])

    return [join(pieces) for pieces in zip(*outputs, strict=True)]
