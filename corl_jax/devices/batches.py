"""Rows of a global batch on the devices of several processes: which are whose, there and back.

A mesh splits a batch into as many blocks as it has ways of `data` and `fsdp`. A process holds
the blocks of its own devices, its share; processes between which `tensor` splits the parameters
hold the same one.
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
    """Blocks that a mesh splits a batch into."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def list_process_shards(mesh: Mesh) -> list[int]:
    """The share that each process holds, by process.

    Raises:
        InputError: shares that are no equal runs of blocks.
    """
    count = num_batch_shards(mesh)
    held: dict[int, set[int]] = {}
    for device, index in batch_sharding(mesh).devices_indices_map((count,)).items():
        held.setdefault(device.process_index, set()).add(index[0].start or 0)
    size = len(held[min(held)])
    for process, blocks in held.items():
        first = min(blocks)
        if first % size or blocks != set(range(first, first + size)):
            raise InputError(
                f"mesh: data x fsdp splits a batch into {count} blocks, of which process {process} "
                f"would hold {sorted(blocks)}; expected {size} that follow each other; choose "
                "mesh.tensor as a divisor or a multiple of the devices of a process"
            )
    return [min(held[process]) // size for process in sorted(held)]


def process_shard(mesh: Mesh) -> tuple[int, int]:
    """(this process's share, number of shares). Raises: InputError as `list_process_shards`."""
    if len({device.process_index for device in mesh.devices.flat}) == 1:
        return 0, 1
    found = list_process_shards(mesh)
    return found[jax.process_index()], max(found) + 1


def put_rows(mesh: Mesh, tree: Any) -> Any:
    """Host arrays of this process's rows as global arrays, rows spread over the mesh."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), tree
    )


def to_host_rows(x: jax.Array) -> np.ndarray:
    """This process's rows of a global array on a mesh, in order."""
    if x.is_fully_addressable:
        return np.asarray(x)
    mesh = getattr(x.sharding, "mesh", None)
    assert isinstance(mesh, Mesh), "a global array that lies on no mesh"
    wanted = batch_sharding(mesh)
    if not x.sharding.is_equivalent_to(wanted, x.ndim):
        x = jax.device_put(x, wanted)
    shards = {shard.index[0].start or 0: shard for shard in x.addressable_shards}
    return np.concatenate([np.asarray(shards[start].data) for start in sorted(shards)])


def all_gather_rows(mesh: Mesh, values: np.ndarray) -> np.ndarray:
    """All rows of which each process has its share, in every process the same.

    A share that several processes hold is taken from the first, should they differ.
    """
    if process_shard(mesh)[1] == 1 and jax.process_count() == 1:
        return values
    found = list_process_shards(mesh)
    everyone = processes.all_gather(values)
    return np.concatenate([everyone[found.index(number)] for number in range(max(found) + 1)])


def take_own_rows(mesh: Mesh, values: Any) -> Any:
    """This process's share of something that has all rows."""
    index, count = process_shard(mesh)
    size = len(values) // count
    return values[index * size : (index + 1) * size]


def all_gather_array(x: jax.Array) -> np.ndarray:
    """A global array on the host of every process."""
    if x.is_fully_addressable:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def find_mesh(params: Any) -> Mesh | None:
    """The mesh that parameters lie on; None on a single device."""
    leaves = jax.tree.leaves(params)
    sharding = getattr(leaves[0], "sharding", None) if leaves else None
    if not isinstance(sharding, NamedSharding) or sharding.mesh.size == 1:
        return None
    return sharding.mesh  # type: ignore[return-value]
