"""Moves the rows of a global batch between processes and devices, and between host and devices.

A mesh splits a batch into data x fsdp equal parts, its shards. A process holds the shards of its
own devices. Processes between which `tensor` splits the parameters hold the same shards.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from corl_jax.devices import processes
from corl_jax.devices.mesh import BATCH, batch_sharding
from corl_jax.errors import InputError


def num_batch_shards(mesh: Any) -> int:
    """Returns into how many equal parts the mesh splits a batch (data x fsdp)."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def list_process_shards(mesh: Mesh) -> list[int]:
    """Returns for each process the number of its shard of a batch.

    Raises:
        InputError: a process's shard is not a run of neighbouring parts, or sizes differ.
    """
    count = num_batch_shards(mesh)
    parts: dict[int, set[int]] = {}  # process -> numbers of its parts
    for device, index in batch_sharding(mesh).devices_indices_map((count,)).items():
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
    """Makes global arrays of this process's rows, with rows spread over the mesh."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), tree
    )


def to_host_rows(x: jax.Array) -> np.ndarray:
    """Returns this process's rows of a global array, in order, on the host."""
    if x.is_fully_addressable:
        return np.asarray(x)
    mesh = getattr(x.sharding, "mesh", None)
    assert isinstance(mesh, Mesh), "a global array that lies on no mesh"
    by_rows = batch_sharding(mesh)
    if not x.sharding.is_equivalent_to(by_rows, x.ndim):
        x = jax.device_put(x, by_rows)
    shards = {shard.index[0].start or 0: shard for shard in x.addressable_shards}
    return np.concatenate([np.asarray(shards[start].data) for start in sorted(shards)])


def all_gather_rows(mesh: Mesh, values: np.ndarray) -> np.ndarray:
    """Returns the rows of all processes, in every process the same.

    If several processes hold the same shard, the first of them counts, should they differ.
    """
    if process_shard(mesh)[1] == 1 and jax.process_count() == 1:
        return values
    shards = list_process_shards(mesh)
    by_process = processes.all_gather(values)
    return np.concatenate([by_process[shards.index(n)] for n in range(max(shards) + 1)])


def take_own_rows(mesh: Mesh, values: Any) -> Any:
    """Returns this process's rows from a sequence that holds the rows of all processes."""
    index, count = process_shard(mesh)
    size = len(values) // count
    return values[index * size : (index + 1) * size]


def all_gather_array(x: jax.Array) -> np.ndarray:
    """Returns a global array on the host of every process."""
    if x.is_fully_addressable:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def find_mesh(params: Any) -> Mesh | None:
    """Returns the mesh of parameters; None on a single device."""
    leaves = jax.tree.leaves(params)
    sharding = getattr(leaves[0], "sharding", None) if leaves else None
    if not isinstance(sharding, NamedSharding) or sharding.mesh.size == 1:
        return None
    return sharding.mesh  # type: ignore[return-value]
