"""Attention over a part of the keys, and the merge of two parts: what a decode step attends with.

A completion attends to its prompt, whose keys its whole group shares, and to the tokens drawn
so far. Each part gives its own softmax average and the logarithm of its softmax denominator;
the two denominators say how much each part counts, so that the merge is the softmax over both.
"""

from __future__ import annotations

import math
import os
from typing import Any, Literal

import jax
import jax.numpy as jnp

Implementation = Literal["xla", "cudnn"]
Partial = tuple[jax.Array, jax.Array]
"""Averages [R, Q, H, head_dim] in the queries' dtype, log-denominators [R, Q, H] float32."""


def fastest_attention(dtype: Any, head_dim: int, device: Any = None) -> Implementation:
    """What a device, or else the first one present, can run: cuDNN on NVIDIA GPUs, or XLA.

    cuDNN's fused attention wants half precision, compute capability 8.0 and head sizes that are
    multiples of 8 up to 128.
    """
    half = jnp.dtype(dtype) in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
    if not half or head_dim % 8 or head_dim > 128:
        return "xla"
    device = device or jax.devices()[0]
    return "cudnn" if on_nvidia(device) and float(device.compute_capability) >= 8.0 else "xla"


def on_nvidia(device: Any = None) -> bool:
    """Whether a device, or else the first one present, is an NVIDIA GPU."""
    device = device or jax.devices()[0]
    return device.platform == "gpu" and "cuda" in device.client.platform_version


def same_bits() -> bool:
    """Whether XLA_FLAGS asks for the same bits in each call; a file that it names is not read."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    name = "--xla_gpu_deterministic_ops"
    given = [flag.removeprefix(name).lower() for flag in flags if flag.partition("=")[0] == name]
    return bool(given) and given[-1] in ("", "=true", "=1")


def attend_to(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    lengths: jax.Array,
    implementation: Implementation,
) -> Partial:
    """Attention of query [R, Q, H, head_dim] to the first `lengths` [R] int32 of S keys.

    `key` and `value` are [R, S, kv_heads, head_dim], and all lengths at least 1. H is a multiple
    of kv_heads; the heads that share keys are neighbours.
    """
    attend = {"xla": _xla, "cudnn": _cudnn}[implementation]
    return attend(query, key, value, lengths)


def _xla(query: jax.Array, key: jax.Array, value: jax.Array, lengths: jax.Array) -> Partial:
    *leading, heads, size = query.shape
    grouped = query.reshape(*leading, key.shape[2], -1, size)
    scores = jnp.einsum("rqkhd,rskd->rkhqs", grouped, key, preferred_element_type=jnp.float32)
    seen = jnp.arange(key.shape[1]) < lengths[:, None]
    scores = jnp.where(seen[:, None, None, None], scores / math.sqrt(size), -jnp.inf)
    denominators = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - denominators).astype(value.dtype)
    averages = jnp.einsum("rkhqs,rskd->rqkhd", weights, value).reshape(query.shape)
    return averages, jnp.moveaxis(denominators[..., 0], -1, 1).reshape(*leading, heads)


def _cudnn(query: jax.Array, key: jax.Array, value: jax.Array, lengths: jax.Array) -> Partial:
    # jax.nn.dot_product_attention calls this too, but rounds the denominators to the queries'
    # dtype: in bfloat16 that is off by up to 0.06 at 16, and by as much in the parts' weights.
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    count = query.shape[1]
    if count == 1 and same_bits():
        # For one query cuDNN takes a kernel whose sums differ from call to call, which XLA's flag
        # does not change. It takes another with a second query, here one behind the last.
        query = jnp.pad(query, [(0, 0), (0, 1), (0, 0), (0, 0)])
    results: Any = cudnn.dot_product_attention(
        query, key, value,
        q_seqlen=jnp.full(query.shape[0], count, jnp.int32), kv_seqlen=lengths,
        scale=1 / math.sqrt(query.shape[-1]), mask_type=cudnn.MaskType.PADDING,
        return_residual=True,
    )  # fmt: skip
    averages, denominators = results
    return averages[:, :count], denominators.swapaxes(1, 2)[:, :count]


def merge(first: Partial, second: Partial) -> jax.Array:
    """Attention [R, Q, H, head_dim] to both parts' keys, merged in float32."""
    (a, log_a), (b, log_b) = first, second
    share = jax.nn.sigmoid(log_a - log_b)[..., None]
    return (share * a.astype(jnp.float32) + (1 - share) * b.astype(jnp.float32)).astype(a.dtype)
