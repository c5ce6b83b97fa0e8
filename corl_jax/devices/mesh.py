"""Decides where arrays live: the device mesh, sharding rules by parameter path, `constrain`.

A mesh has the axes `data`, `fsdp` and `tensor`. Prompts and completions are split over `data` and
`fsdp`. Parameters are split over `fsdp` and `tensor` by the rules of their network: the first rule
whose regex matches the whole path decides. A path that no rule matches is an error, so that no
parameter is replicated by accident; a parameter that each device holds whole has a rule for it.

A mesh must divide a policy evenly. `find_layout_problems` says where it does not, before a device
is used, and `param_spec` refuses. A reward network never limits the mesh: an axis that does not
divide one of its matrices leaves that axis whole.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from corl_jax.errors import InputError
from corl_jax.nearest import nearest_divisors
from corl_jax.params import leaf_paths, map_with_path
from corl_jax.types import Params

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")
NAMED_SIZES = 4  # in an error message; most sizes have a common factor

ACTIVATION_AXES: dict[str | None, Any] = {
    "batch": BATCH,
    "length": None,
    "embed": None,
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "any": PartitionSpec.UNCONSTRAINED,  # as XLA finds it best
    None: None,
}

Rules = tuple[tuple[str, PartitionSpec], ...]
"""(regex of a parameter path, its layout); every network has such a table beside it."""


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: list | None = None) -> Mesh:
    """Makes a mesh over all devices; one axis may be -1 and takes the devices left over.

    Raises:
        InputError: the axes do not multiply to the number of devices.
    """
    if devices is None:
        # The devices of a process are neighbours, so its rows of a batch follow each other.
        devices = sorted(jax.devices(), key=lambda device: device.process_index)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    fixed = int(np.prod([size for size in sizes.values() if size > 0]))
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1 or len(devices) % fixed or (not free and fixed != len(devices)):
        raise InputError(
            f"mesh: data {data} x fsdp {fsdp} x tensor {tensor} does not use exactly the "
            f"{len(devices)} device(s) present; make the product equal, or one axis -1"
        )
    shape = [len(devices) // fixed if size == -1 else size for size in sizes.values()]
    # 8 devices, data 4, tensor 2: grid [4, 1, 2]; devices 0 and 1 hold the same rows.
    grid = np.asarray(devices).reshape(shape)
    # Auto: XLA chooses the layouts between the ones that `constrain` gives.
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def attach_shardings(shapes: Any, shardings: Any) -> Any:
    """Returns shapes with shardings; `shardings` is a tree like `shapes`, or one for all."""
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, shapes)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Lays out an activation by its axes' names; outside of a mesh, or on one device, does nothing.

    An axis that the mesh does not divide is left unsplit: only a frozen reward network has such
    (see `find_layout_problems`), and what is computed stays the same.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    spec = PartitionSpec(*(ACTIVATION_AXES[name] for name in names))
    return jax.lax.with_sharding_constraint(x, _drop_uneven_axes(spec, x.shape, mesh))


def shard_heads(function: Callable) -> Callable:
    """Makes each device compute a function for its rows and heads only.

    The function takes arrays [B, T, heads, head_dim] and [B, T]. It returns an array
    [B, T, heads, head_dim].
    """
    # XLA cannot split a Pallas kernel over devices by itself.
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function

    def compute_sharded(*arrays: jax.Array) -> jax.Array:
        heads, rows = PartitionSpec(BATCH, None, "tensor"), PartitionSpec(BATCH)
        places = tuple(heads if x.ndim == 4 else rows for x in arrays)
        return jax.shard_map(function, in_specs=places, out_specs=heads, check_vma=False)(*arrays)

    return compute_sharded


def gather_over_fsdp(params: Params, rules: Rules, *, layers: bool = False) -> Params:
    """Gathers a policy's parameters over `fsdp`, stacked `layers` if asked. For use inside jit."""
    # Decoding reads these parameters once per token. If they stayed split, each token would gather
    # them again. Layers that are fused for decoding are gathered there.
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["fsdp"] == 1:
        return params

    def gather(path: str, x: jax.Array) -> jax.Array:
        if "/layers/" in path and not layers:
            return x
        spec = param_spec(path, x.shape, mesh, rules)
        axes = (None if axis == "fsdp" else axis for axis in spec)
        return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))

    return map_with_path(gather, params)


def context_batch_shards() -> int:
    """Returns the number of parts of a batch on the context's mesh; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else _count_pieces(BATCH, mesh)


def _count_pieces(axes: Any, mesh: Any) -> int:
    """Counts the pieces into which an entry of a PartitionSpec splits its axis."""
    if axes is None or axes is PartitionSpec.UNCONSTRAINED:
        return 1
    names = (axes,) if isinstance(axes, str) else axes
    return math.prod(mesh.shape[name] for name in names)


def _drop_uneven_axes(spec: PartitionSpec, shape: tuple[int, ...], mesh: Any) -> PartitionSpec:
    """Drops the entries of a spec whose axes the mesh does not divide."""
    # A spec may be shorter than the shape; the other axes are whole.
    pairs = zip(spec, shape, strict=False)
    return PartitionSpec(
        *(axes if size % _count_pieces(axes, mesh) == 0 else None for axes, size in pairs)
    )


def find_rule(path: str, rules: Rules) -> PartitionSpec:
    """Returns the layout that a table of rules gives a path.

    Raises:
        InputError: no rule matches the path.
    """
    for pattern, spec in rules:
        if re.fullmatch(pattern, path):
            return spec
    raise InputError(
        f"parameter {path}: no sharding rule matches it; add one to the rules of its network"
    )


def param_spec(path: str, shape: tuple[int, ...], mesh: Any, rules: Rules) -> PartitionSpec:
    """Returns the layout of one parameter of a policy.

    Raises:
        InputError: no rule matches the path, or the mesh does not divide an axis.
    """
    spec = find_rule(path, rules)
    if _drop_uneven_axes(spec, shape, mesh) != spec:
        leaf = jax.ShapeDtypeStruct(shape, "float32")
        raise InputError(find_layout_problems({path: leaf}, {}, mesh, rules))
    return spec


def network_spec(path: str, shape: tuple[int, ...], mesh: Any, rules: Rules) -> PartitionSpec:
    """Returns the layout of one parameter of a reward network.

    An axis that the mesh does not divide stays whole.

    Raises:
        InputError: no rule matches the path.
    """
    return _drop_uneven_axes(find_rule(path, rules), shape, mesh)


def param_shardings(params: Params, mesh: Mesh, rules: Rules) -> Params:
    """Returns a tree of NamedSharding for arrays or shapes of a policy's parameters."""
    return map_with_path(
        lambda path, leaf: NamedSharding(mesh, param_spec(path, leaf.shape, mesh, rules)), params
    )


def network_shardings(params: Params, mesh: Mesh, rules: Rules) -> Params:
    """Returns a tree of NamedSharding for arrays or shapes of a reward network's parameters."""
    return map_with_path(
        lambda path, leaf: NamedSharding(mesh, network_spec(path, leaf.shape, mesh, rules)), params
    )


def find_layout_problems(
    params: Params, heads: Mapping[str, int], mesh: Any, rules: Rules
) -> list[str]:
    """Lists where a mesh does not divide a policy's parameters, or its counts of `heads` by name.

    One line for an axis of the mesh, with the sizes and the nearest values that divide all of them
    and the number of devices.
    """
    sizes: dict[str, dict[int, str]] = {"fsdp": {}, "tensor": {}}
    for name, count in heads.items():
        sizes["tensor"].setdefault(count, name)
    for path, leaf in leaf_paths(params):
        for place, (axis, size) in enumerate(zip(find_rule(path, rules), leaf.shape, strict=False)):
            if axis is not None:
                # Each size once, with the first parameter that has it.
                sizes[axis].setdefault(size, f"axis {place} of {path}")
    problems = []
    for axis, names in sizes.items():
        pieces = mesh.shape[axis]
        left = [f"{size} ({name})" for size, name in names.items() if size % pieces]
        if left:
            more = f" and {len(left) - NAMED_SIZES} sizes more" if len(left) > NAMED_SIZES else ""
            problems.append(
                f"mesh.{axis}: {pieces} does not divide {', '.join(left[:NAMED_SIZES])}{more}; "
                f"nearest: {nearest_divisors(math.gcd(mesh.size, *names), pieces)}"
            )
    return problems


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the layout of a batch: leading axis over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(BATCH))
