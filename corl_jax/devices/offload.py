"""Keeps frozen parameters in host memory between their uses."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax

from corl_jax.devices.mesh import attach_shardings
from corl_jax.types import Params


class Offloadable:
    """Frozen parameters. With `offload` they stay in host memory outside of `use()`.

    `sharding` says where they are while they are used.
    """

    def __init__(self, params: Params, sharding: Any, *, offload: bool = False):
        self._sharding = sharding
        self.is_offloaded = offload
        self._params = jax.device_put(params, host_shardings(sharding) if offload else sharding)

    def describe(self) -> Params:
        """Returns the shapes and shardings of the parameters that `use` yields."""
        return attach_shardings(self._params, self._sharding)

    @contextlib.contextmanager
    def use(self) -> Iterator[Params]:
        """Yields the parameters, on the device."""
        if not self.is_offloaded:
            yield self._params
            return
        params = jax.device_put(self._params, self._sharding)
        try:
            yield params
        finally:
            # Not left to the garbage collector: a late reference would keep the memory in use.
            for leaf in jax.tree.leaves(params):
                leaf.delete()


def host_shardings(sharding: Any) -> Any:
    """Returns the same shardings in host memory (pinned, if supported)."""
    kinds = {memory.kind for memory in jax.local_devices()[0].addressable_memories()}
    kind = "pinned_host" if "pinned_host" in kinds else "unpinned_host"
    return jax.tree.map(lambda leaf: leaf.with_memory_kind(kind), sharding)
