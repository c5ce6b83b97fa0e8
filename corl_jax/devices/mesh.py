"""Where arrays live: the device mesh, the tables from parameter path to layout, `constrain`.

A mesh has the axes `data`, `fsdp` and `tensor`. Prompts and completions are spread over
`data` and `fsdp`; parameters over `fsdp` and `tensor` by a table, the first rule whose regex
matches the whole path. A path that no rule matches is an error, so that a new parameter cannot
be replicated by accident; what lies whole on each device has a rule that says so.

A mesh must divide the policy evenly: `layout_problems` says where it does not, before a device
is used, and `param_spec` refuses. A frozen reward network never limits the mesh: an axis that
does not divide one of its matrices leaves that axis whole.
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
LISTED = 4  # sizes that a refusal names; most have a common factor

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

_WHOLE = PartitionSpec()
_INNER, _OUTER = PartitionSpec("fsdp", "tensor"), PartitionSpec("tensor", "fsdp")
_COLUMN = PartitionSpec(None, "fsdp", "tensor")  # [L, in, out], outputs split
_ROW = PartitionSpec(None, "tensor", "fsdp")  # [L, in, out], inputs split
PARAM_RULES: Rules = (
    (r"(language_model|vision_model)/layers/attn/[qkv]_proj/kernel", _COLUMN),
    (r"(language_model|vision_model)/layers/attn/(o_proj|out_proj)/kernel", _ROW),
    (r"language_model/layers/mlp/(gate|up)_proj/kernel", _COLUMN),
    (r"language_model/layers/mlp/down_proj/kernel", _ROW),
    (r"language_model/layers/.*/(q|k|v|gate|up)_proj/lora_a", PartitionSpec(None, "fsdp")),
    (r"language_model/layers/.*/(q|k|v|gate|up)_proj/lora_b", PartitionSpec(None, None, "tensor")),
    (r"language_model/layers/.*/(o|down)_proj/lora_a", PartitionSpec(None, "tensor")),
    (r"language_model/layers/.*/(o|down)_proj/lora_b", PartitionSpec(None, None, "fsdp")),
    (r"vision_model/layers/mlp/fc1/kernel", _COLUMN),
    (r"vision_model/layers/mlp/fc2/kernel", _ROW),
    (r"language_model/embed_tokens/embedding", _OUTER),
    (r"lm_head/kernel", _INNER),
    (r"generation_head/(proj_out|vision_head)/kernel", _INNER),
    (r"(generation_)?aligner/hidden_layers/\d+/kernel", _INNER),
    (r"aligner/fc1/kernel", _INNER),
    (r"generation_aligner/fc1/kernel", PartitionSpec(None, "tensor")),
    (r"(language_model|vision_model)/.*(norm|norm1|norm2|layernorm)/(scale|bias)", _WHOLE),
    (r"vision_model/(patch_embedding|position_embedding)/.*", _WHOLE),
    (r".*/bias", _WHOLE),
    (r"generation_embeddings/embedding", _WHOLE),
    (r"vqmodel/.*", _WHOLE),
)
"""The policy's, and a frozen Janus's."""

NETWORK_RULES: Rules = (
    (r"(.*/)?layers/(cross_)?attn/[qkv]_proj/kernel", _COLUMN),
    (r"(.*/)?layers/(cross_)?attn/out_proj/kernel", _ROW),
    (r"(.*/)?layers/mlp/fc1/kernel", _COLUMN),
    (r"(.*/)?layers/mlp/fc2/kernel", _ROW),
    (r".*/(word_embeddings|token_embedding)/embedding", _OUTER),
    (r"(text_projection|visual_projection|text_decoder/head(/dense)?)/kernel", _INNER),
    (r"(.*/)?(layer_?norm[12]?|\w+_layer_?norm)/(scale|bias)", _WHOLE),
    (r"vision_model/(patch_embedding|position_embedding|class_embedding)(/.*)?", _WHOLE),
    (r".*/(position|token_type)_embeddings?/embedding", _WHOLE),
    (r"(stages|heads)/.*/kernel", _WHOLE),  # LPIPS: 59 MB of convolutions
    (r"layers/\d+/kernel", _WHOLE),  # the aesthetic head: 4 MB
    (r"logit_scale", _WHOLE),
    (r".*/bias", _WHOLE),
)
"""Those of the networks in `weights.networks.KINDS`."""


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: list | None = None) -> Mesh:
    """A mesh over all devices; one axis may be -1 and takes what the others leave.

    Raises:
        InputError: the axes do not multiply to the number of devices.
    """
    if devices is None:
        # A process's devices next to each other: its rows of a batch then follow each other.
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
    grid = np.asarray(devices).reshape(shape)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Lays out an activation by its axes' names; outside of a mesh, or on one device, does nothing.

    An axis that the mesh does not divide is left unsplit: only a frozen reward network has such
    (see `layout_problems`), and what is computed stays the same.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    wanted = PartitionSpec(*(ACTIVATION_AXES[name] for name in names))
    return jax.lax.with_sharding_constraint(x, _fitting(wanted, x.shape, mesh))


def shard_heads(function: Callable) -> Callable:
    """A function that each device computes for its own rows and heads, as a kernel has to be.

    Of arrays [B, T, heads, head_dim] and [B, T]; it returns one of the former.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function

    def spread(*arrays: jax.Array) -> jax.Array:
        heads, rows = PartitionSpec(BATCH, None, "tensor"), PartitionSpec(BATCH)
        places = tuple(heads if x.ndim == 4 else rows for x in arrays)
        return jax.shard_map(function, in_specs=places, out_specs=heads, check_vma=False)(*arrays)

    return spread


def gather_over_fsdp(params: Params) -> Params:
    """Inside of jit: the policy's parameters outside of its stacked layers, gathered over `fsdp`.

    Decoding reads them once a token. Left split, they would be gathered as often.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["fsdp"] == 1:
        return params

    def leaf(path: str, x: jax.Array) -> jax.Array:
        if "/layers/" in path:
            return x
        spec = (None if axis == "fsdp" else axis for axis in param_spec(path, x.shape, mesh))
        return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))

    return map_with_path(leaf, params)


def context_batch_shards() -> int:
    """Parts that the rows of a batch are split into on the mesh of the context; 1 without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else _ways(BATCH, mesh)


def _ways(axes: Any, mesh: Any) -> int:
    """Into how many pieces an entry of a PartitionSpec splits its axis."""
    if axes is None or axes is PartitionSpec.UNCONSTRAINED:
        return 1
    names = (axes,) if isinstance(axes, str) else axes
    return math.prod(mesh.shape[name] for name in names)


def _fitting(spec: PartitionSpec, shape: tuple[int, ...], mesh: Any) -> PartitionSpec:
    """The spec without what the mesh does not divide."""
    pairs = zip(spec, shape, strict=False)
    return PartitionSpec(*(axes if size % _ways(axes, mesh) == 0 else None for axes, size in pairs))


def find_rule(path: str, rules: Rules = PARAM_RULES) -> PartitionSpec:
    """The layout that a table gives a path.

    Raises:
        InputError: no rule matches the path.
    """
    for pattern, spec in rules:
        if re.fullmatch(pattern, path):
            return spec
    table = "PARAM_RULES" if rules is PARAM_RULES else "NETWORK_RULES"
    raise InputError(f"parameter {path}: no sharding rule matches it; add one to {table}")


def param_spec(path: str, shape: tuple[int, ...], mesh: Any) -> PartitionSpec:
    """The layout of one parameter of the policy.

    Raises:
        InputError: no rule matches the path, or the mesh does not divide an axis.
    """
    spec = find_rule(path)
    if _fitting(spec, shape, mesh) != spec:
        raise InputError(layout_problems({path: jax.ShapeDtypeStruct(shape, "float32")}, {}, mesh))
    return spec


def network_spec(path: str, shape: tuple[int, ...], mesh: Any) -> PartitionSpec:
    """The layout of one parameter of a reward network, whole where the mesh does not divide it.

    Raises:
        InputError: no rule matches the path.
    """
    return _fitting(find_rule(path, NETWORK_RULES), shape, mesh)


def param_shardings(params: Params, mesh: Mesh) -> Params:
    """A tree of NamedSharding for arrays or shapes of the policy's parameters."""
    return map_with_path(
        lambda path, leaf: NamedSharding(mesh, param_spec(path, leaf.shape, mesh)), params
    )


def network_shardings(params: Params, mesh: Mesh) -> Params:
    """A tree of NamedSharding for arrays or shapes of a reward network's parameters."""
    return map_with_path(
        lambda path, leaf: NamedSharding(mesh, network_spec(path, leaf.shape, mesh)), params
    )


def layout_problems(params: Params, heads: Mapping[str, int], mesh: Any) -> list[str]:
    """Where a mesh does not divide the policy's parameters, or its counts of `heads` by name.

    One line an axis of the mesh, with the sizes and the nearest values that divide all of them
    and the number of devices.
    """
    sizes: dict[str, dict[int, str]] = {"fsdp": {}, "tensor": {}}
    for name, count in heads.items():
        sizes["tensor"].setdefault(count, name)
    for path, leaf in leaf_paths(params):
        for place, (axis, size) in enumerate(zip(find_rule(path), leaf.shape, strict=False)):
            if axis is not None:
                sizes[axis].setdefault(size, f"axis {place} of {path}")
    problems = []
    for axis, found in sizes.items():
        ways = mesh.shape[axis]
        left = [f"{size} ({name})" for size, name in found.items() if size % ways]
        if left:
            more = f" and {len(left) - LISTED} sizes more" if len(left) > LISTED else ""
            problems.append(
                f"mesh.{axis}: {ways} does not divide {', '.join(left[:LISTED])}{more}; "
                f"nearest: {nearest_divisors(math.gcd(mesh.size, *found), ways)}"
            )
    return problems


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(BATCH))
