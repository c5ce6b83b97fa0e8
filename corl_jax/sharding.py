"""Where arrays live: the device mesh, the table from parameter path to layout, `constrain`.

A mesh has the axes `data`, `fsdp` and `tensor`. Prompts and completions are spread over
`data` and `fsdp`; parameters over `fsdp` and `tensor` by PARAM_RULES, the first rule whose
regex matches the whole path. A path that no rule matches is an error, so that a new parameter
cannot be replicated by accident.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from corl_jax.errors import InputError
from corl_jax.types import Params

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")

ACTIVATION_AXES: dict[str | None, Any] = {
    "batch": BATCH,
    "length": None,
    "embed": None,
    "heads": "tensor",
    "vocab": "tensor",
    None: None,
}

_COLUMN = PartitionSpec(None, "fsdp", "tensor")  # [L, in, out], outputs split
_ROW = PartitionSpec(None, "tensor", "fsdp")  # [L, in, out], inputs split
PARAM_RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"(language_model|vision_model)/layers/attn/[qkv]_proj/kernel", _COLUMN),
    (r"(language_model|vision_model)/layers/attn/(o_proj|out_proj)/kernel", _ROW),
    (r"language_model/layers/mlp/(gate|up)_proj/kernel", _COLUMN),
    (r"language_model/layers/mlp/down_proj/kernel", _ROW),
    (r"vision_model/layers/mlp/fc1/kernel", _COLUMN),
    (r"vision_model/layers/mlp/fc2/kernel", _ROW),
    (r"language_model/embed_tokens/embedding", PartitionSpec("tensor", "fsdp")),
    (r"lm_head/kernel", PartitionSpec("fsdp", "tensor")),
    (r"generation_head/(proj_out|vision_head)/kernel", PartitionSpec("fsdp", "tensor")),
    (r"(generation_)?aligner/hidden_layers/\d+/kernel", PartitionSpec("fsdp", "tensor")),
    (r"aligner/fc1/kernel", PartitionSpec("fsdp", "tensor")),
    (r"generation_aligner/fc1/kernel", PartitionSpec(None, "tensor")),
    (r"(language_model|vision_model)/.*(norm|norm1|norm2|layernorm)/(scale|bias)", PartitionSpec()),
    (r"vision_model/(patch_embedding|position_embedding)/.*", PartitionSpec()),
    (r".*/bias", PartitionSpec()),
    (r"generation_embeddings/embedding", PartitionSpec()),
    (r"vqmodel/.*", PartitionSpec()),
)


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: list | None = None) -> Mesh:
    """A mesh over all devices; one axis may be -1 and takes what the others leave.

    Raises:
        InputError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    fixed = int(np.prod([size for size in sizes.values() if size > 0]))
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1 or len(devices) % fixed or (not free and fixed != len(devices)):
        raise InputError(
            f"mesh: data {data} x fsdp {fsdp} x tensor {tensor} does not use exactly the "
            f"{len(devices)} device(s) present; make the product equal, or one axis -1"
        )
    shape = [len(devices) // fixed if size == -1 else size for size in sizes.values()]
    grid = np.asarray(devices).reshape(shape)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Lays out an activation by its axes' names; outside of a mesh, or on one device, does nothing.

    An axis that the mesh does not divide is left unsplit.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    spec = PartitionSpec(
        *(_fitting(mesh, ACTIVATION_AXES[name], size) for name, size in zip(names, x.shape))
    )
    return jax.lax.with_sharding_constraint(x, spec)


def _fitting(mesh: Any, axes: Any, size: int) -> Any:
    names = (axes,) if isinstance(axes, str) else (axes or ())
    ways = int(np.prod([mesh.shape[name] for name in names])) if names else 1
    return axes if size % ways == 0 else None


def leaf_paths(params: Params) -> list[tuple[str, Any]]:
    """(path, leaf) of every parameter, in tree order."""
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    return [("/".join(str(key.key) for key in keys), leaf) for keys, leaf in flat]


def map_with_path(function: Any, params: Params) -> Params:
    """A tree of function(path, leaf)."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, leaf: function("/".join(str(key.key) for key in keys), leaf), params
    )


def param_spec(path: str, shape: tuple[int, ...], mesh: Any) -> PartitionSpec:
    """The layout of one parameter; an axis that the mesh does not divide is left unsplit.

    Raises:
        InputError: no rule matches the path.
    """
    for pattern, spec in PARAM_RULES:
        if re.fullmatch(pattern, path):
            return PartitionSpec(
                *(_fitting(mesh, axes, size) for axes, size in zip(spec, shape, strict=False))
            )
    raise InputError(f"parameter {path}: no sharding rule matches it; add one to PARAM_RULES")


def param_shardings(params: Params, mesh: Mesh) -> Params:
    """A tree of NamedSharding for arrays or shapes of parameters."""
    return map_with_path(
        lambda path, leaf: NamedSharding(mesh, param_spec(path, leaf.shape, mesh)), params
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(BATCH))
