"""Parts of all transformers: stacked layers, remat policies, RoPE, attention, projectors.

Dense kernels are [in, out], convolutions HWIO. A stack of layers is one module whose parameters
all have a leading layer axis.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from corl_jax.devices.mesh import constrain
from corl_jax.models.lookup import look_up

Remat = Literal["none", "full", "dots"]

# "dots" keeps products without batch dimensions: those of the projections, not of attention.
_REMAT_POLICIES: dict[str, Callable | None] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}

initializer = nnx.initializers.normal(stddev=0.02)


def make_linear(in_features: int, out_features: int, *, bias: bool, rngs: nnx.Rngs) -> nnx.Linear:
    """Makes a dense layer with the initialisation of all Janus parts."""
    return nnx.Linear(in_features, out_features, use_bias=bias, kernel_init=initializer, rngs=rngs)


class Embedding(nnx.Module):
    """A table [rows, features]; ids [...] -> rows [..., features], NaN for an id outside of it."""

    # nnx.Embed keeps the dtype of its construction, and would turn a bfloat16 network into float32.
    # This one has the dtype of the table when it is called.
    def __init__(self, rows: int, features: int, *, rngs: nnx.Rngs):
        self.embedding = nnx.Param(initializer(rngs.params(), (rows, features)))

    def __call__(self, ids: jax.Array) -> jax.Array:
        # The ids and the table are both split over fsdp: the table is gathered.
        table = constrain(self.embedding[...], "any", "embed")
        return look_up(table, ids)


def stack(make: Callable[[nnx.Rngs], nnx.Module], layers: int, rngs: nnx.Rngs) -> Any:
    """Makes one module whose parameters have a leading axis of `layers`; `make` makes one layer."""
    # eval_shape makes no arrays: only the structure of one layer is needed here.
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    keys = jax.random.split(rngs.params(), layers)
    return nnx.merge(graphdef, jax.vmap(lambda key: nnx.state(make(nnx.Rngs(key))))(keys))


def unstack(stacked: nnx.Module, layers: int) -> list[Any]:
    """Returns the single layers of a stacked module, each a slice of its parameters."""
    # Training scans the stack. A decode loop needs single layers: XLA does not move the slices of a
    # scanned stack out of a surrounding loop.
    graphdef, state = nnx.split(stacked)
    return [nnx.merge(graphdef, jax.tree.map(lambda x: x[i], state)) for i in range(layers)]  # noqa: B023


def scan_layers(
    stacked: nnx.Module, step: Callable, x: Any, remat: Remat = "none", *,
    part: slice | None = None,
) -> tuple[Any, Any]:  # fmt: skip
    """Applies `step(layer, x) -> (x, out)` over a stack of layers; the outs are stacked.

    `remat` names the values of a layer that are kept for the backward pass: all ("none"), results
    of its matrix products ("dots") or its input ("full"). `part` are the layers; None: all.
    """
    graphdef, state = nnx.split(stacked)
    if part is not None:  # a part is a copy
        state = jax.tree.map(lambda x: x[part], state)

    def body(carry, params):
        return step(nnx.merge(graphdef, params), carry)

    if remat != "none":
        # prevent_cse guards against a merge of both computations, which a scan excludes anyway.
        body = jax.checkpoint(body, policy=_REMAT_POLICIES[remat], prevent_cse=False)
    return lax.scan(body, x, state)


def rope_angles(positions: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Computes cosines and sines [..., T, 1, head_dim] for `apply_rope`, in float32."""
    # float32: in bfloat16 positions above 256 are not exact.
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    # Halves, not pairs: head_dim 4: [a0, a1] -> [a0, a1, a0, a1]
    angles = jnp.concatenate([angles, angles], axis=-1)[..., None, :]
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates x [B, T, H, head_dim] by its positions' angles.

    Source: Su et al. 2021 (arXiv 2104.09864), with halves rotated instead of pairs.
    """
    cos, sin = rope
    half = x.shape[-1] // 2
    # [x0, x1, x2, x3] -> [-x2, -x3, x0, x1]: pairs are (x0, x2) and (x1, x3), as in both layouts
    # of Janus, so q and k need no permutation.
    rotated = jnp.concatenate([-x[..., half:], x[..., :half]], axis=-1)
    return (x * cos + rotated * sin).astype(x.dtype)


def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
    """Computes attention [B, T, H, head_dim]; `mask` [B, T or 1, S] is True where a key is seen."""
    if mask is not None:
        mask = mask[:, None]  # the same for all heads
    return jax.nn.dot_product_attention(query, key, value, mask=mask)


def split_heads(x: jax.Array, heads: int) -> jax.Array:
    """Reshapes [B, T, heads * head_dim] to [B, T, heads, head_dim]."""
    return constrain(x.reshape(*x.shape[:-1], heads, -1), "batch", "length", "heads", None)


def merge_heads(x: jax.Array) -> jax.Array:
    """Reshapes [B, T, heads, head_dim] to [B, T, heads * head_dim]."""
    return x.reshape(*x.shape[:-2], -1)


class Projector(nnx.Module):
    """Janus's aligner: a linear layer, then (GELU, linear) `depth` - 1 times."""

    def __init__(self, in_features: int, features: int, depth: int, *, rngs: nnx.Rngs):
        self.fc1 = make_linear(in_features, features, bias=True, rngs=rngs)
        self.hidden_layers = nnx.List(
            [make_linear(features, features, bias=True, rngs=rngs) for _ in range(depth - 1)]
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.fc1(x)
        for layer in self.hidden_layers:
            x = layer(jax.nn.gelu(x, approximate=False))
        return x
