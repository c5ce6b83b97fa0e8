"""Causal self-attention of whole sequences, differentiable: what a training step attends with."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from corl_jax.devices.mesh import constrain, shard_heads
from corl_jax.models.attention import fastest_attention, same_bits

CausalAttention = Literal["xla", "cudnn", "splash"]
"""XLA's own products, or a fused kernel that keeps no scores in memory: cuDNN's on NVIDIA GPUs in
half precision, splash attention (jax.experimental.pallas) on TPUs."""

NEEDS = {
    "cudnn": "an NVIDIA GPU of compute capability 8.0, bfloat16 and heads of up to 128",
    "splash": "a TPU",
}
"""What an implementation runs on; XLA's runs everywhere."""

LANES = 128  # splash attention wants lengths that are multiples of it
BLOCKS = (512, 256, LANES)
INTERPRET = False  # splash attention on a CPU, for tests: slow


def best(dtype: Any, head_dim: int, device: Any = None) -> CausalAttention:
    """What to take on a device, or else on the first one present: its fused kernel, or XLA's.

    XLA's flag for the same bits breaks programs with two backward calls of cuDNN's that are alike
    (openxla/xla#46500). They can come of any two prompts that are padded to the same length.
    """
    kernel = fused(dtype, head_dim, device)
    return "xla" if kernel == "cudnn" and same_bits() else kernel


def fused(dtype: Any, head_dim: int, device: Any = None) -> CausalAttention:
    """The fused kernel that a device has; XLA's where it has none."""
    device = device or jax.devices()[0]
    return "splash" if device.platform == "tpu" else fastest_attention(dtype, head_dim, device)


def runs(implementation: CausalAttention, dtype: Any, head_dim: int, device: Any = None) -> bool:
    """Whether a device, or else the first one present, can attend so."""
    return implementation in ("xla", fused(dtype, head_dim, device))


def attend_causally(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    kept: jax.Array,
    implementation: CausalAttention = "xla",
) -> jax.Array:
    """Attention [B, T, H, head_dim] of the last T of S positions to themselves and those before.

    `key` and `value` are [B, S, kv_heads, head_dim]. A query sees itself and every key before it
    that `kept` [B, S] marks; what comes out for queries that are not kept nobody may read. cuDNN
    differentiates even T and S only.
    """
    if implementation == "splash":
        return _splash(query, key, value, kept)
    length, total = query.shape[1], key.shape[1]
    itself = jnp.eye(length, total, total - length, dtype=bool)
    before = jnp.tril(jnp.ones((length, total), bool), total - length)
    mask = before & (kept[:, None, :] | itself)
    if implementation == "cudnn":  # wants them laid out alike
        laid_out = (constrain(x, "batch", "length", "heads", None) for x in (query, key, value))
        query, key, value = laid_out
    return jax.nn.dot_product_attention(
        query, key, value, mask=mask[:, None], implementation=implementation
    )


def _splash(query: jax.Array, key: jax.Array, value: jax.Array, kept: jax.Array) -> jax.Array:
    length, total = query.shape[1], key.shape[1]
    query = query / math.sqrt(query.shape[-1])
    # A kept query sees kept keys, another one the others: no row is left without keys.
    segments = kept.astype(jnp.int32)
    filled = [_filled(x, 0) for x in (query, key, value)]
    filled += [_filled(x, 1) for x in (segments[:, total - length :], segments)]
    return shard_heads(_kernel(length, total))(*filled)[:, :length]


def _filled(x: jax.Array, value: int) -> jax.Array:
    """x [B, T, ...] with T filled up to a multiple of LANES."""
    missing = -x.shape[1] % LANES
    return jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2), constant_values=value)


def _kernel(length: int, total: int) -> Callable:
    """Of filled arrays; keys behind the last are later than every real query."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    height, width = (math.ceil(n / LANES) * LANES for n in (length, total))
    rows, columns = (next(block for block in BLOCKS if n % block == 0) for n in (height, width))
    sizes = splash.BlockSizes(
        block_q=rows, block_kv=columns, block_kv_compute=columns,
        block_q_dkv=rows, block_kv_dkv=columns, block_kv_dkv_compute=columns,
        block_q_dq=rows, block_kv_dq=columns,
    )  # fmt: skip

    def attend(query, key, value, query_segments, key_segments):
        causal = masks.CausalMask((height, width), offset=total - length)
        kernel: Any = splash.make_splash_mha(
            masks.MultiHeadMask([causal] * query.shape[2]), block_sizes=sizes,
            head_shards=1, q_seq_shards=1, interpret=INTERPRET,
        )  # fmt: skip

        def of_row(query, key, value, *segments):
            by_head = (x.swapaxes(0, 1) for x in (query, key, value))
            return kernel(*by_head, splash.SegmentIds(*segments)).swapaxes(0, 1)

        return jax.vmap(of_row)(query, key, value, query_segments, key_segments)

    return attend
