"""Attention kernels: a table of their abilities, the choice of a kernel, and the computation.

A training step attends causally over whole sequences. A decode step attends to a prefix of the
keys, in two parts: the prompt, whose keys the whole group shares, and the tokens sampled so far.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from corl_jax.devices.compiling import has_deterministic_flag, is_nvidia
from corl_jax.devices.mesh import constrain, shard_heads

AttentionKernel = Literal["xla", "cudnn", "splash"]
DecodeKernel = Literal["xla", "cudnn"]
PartialAttention = tuple[jax.Array, jax.Array]
"""Attention over a part of the keys: averages [R, Q, H, head_dim] in the dtype of the queries, and
the logarithm of the softmax's denominators [R, Q, H] float32."""

SPLASH_LANES = 128  # splash attention needs lengths that are multiples of it
SPLASH_BLOCKS = (512, 256, SPLASH_LANES)
INTERPRET_SPLASH = False  # True runs splash attention on a CPU, for tests; slow


# ---- the choice of a kernel


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The devices and dtypes of an attention kernel, and its abilities. None means any."""

    needs: str  # the devices, dtypes and head sizes below, in words
    has_device: Callable[[Any], bool]
    dtypes: tuple[str, ...] | None
    head_dims: range | None
    decodes: bool  # attends to a prefix of the keys and returns the denominators
    differentiable: bool
    deterministic: bool  # gradients work under XLA's flag for the same bits


def _has_cudnn_attention(device: Any) -> bool:
    return is_nvidia(device) and float(device.compute_capability) >= 8.0


KERNELS: dict[AttentionKernel, Kernel] = {  # fastest first
    "splash": Kernel(
        needs="a TPU",
        has_device=lambda device: device.platform == "tpu",
        dtypes=None,
        head_dims=None,
        decodes=False,
        differentiable=True,
        deterministic=True,
    ),
    "cudnn": Kernel(
        needs="an NVIDIA GPU of compute capability 8.0, bfloat16 and heads of up to 128",
        has_device=_has_cudnn_attention,
        dtypes=("bfloat16", "float16"),
        head_dims=range(8, 129, 8),
        decodes=True,
        differentiable=True,
        # The flag breaks programs with two equal backward calls (openxla/xla#46500). Two prompts
        # that are padded to the same length are enough to cause it.
        deterministic=False,
    ),
    "xla": Kernel(
        needs="any device",
        has_device=lambda device: True,
        dtypes=None,
        head_dims=None,
        decodes=True,
        differentiable=True,
        deterministic=True,
    ),
}


def can_run(name: AttentionKernel, dtype: Any, head_dim: int, device: Any = None) -> bool:
    """Returns whether a device (default: the first one) can run a kernel."""
    kernel = KERNELS[name]
    return (
        (kernel.dtypes is None or jnp.dtype(dtype).name in kernel.dtypes)
        and (kernel.head_dims is None or head_dim in kernel.head_dims)
        and kernel.has_device(device or jax.devices()[0])
    )


def choose_decode_kernel(dtype: Any, head_dim: int, device: Any = None) -> DecodeKernel:
    """Returns the fastest kernel for decode steps on a device (default: the first one)."""
    decoding = (name for name, kernel in KERNELS.items() if kernel.decodes)
    return next(name for name in decoding if can_run(name, dtype, head_dim, device))  # type: ignore


def choose_training_kernel(dtype: Any, head_dim: int, device: Any = None) -> AttentionKernel:
    """Returns the fastest kernel for training steps on a device (default: the first one)."""
    training: Iterator[AttentionKernel] = (
        name
        for name, kernel in KERNELS.items()
        if kernel.differentiable and (kernel.deterministic or not has_deterministic_flag())
    )
    return next(name for name in training if can_run(name, dtype, head_dim, device))


# ---- a training step: attention over whole sequences


def attend_causally(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    key_mask: jax.Array,
    kernel: AttentionKernel = "xla",
    front: int = 0,
) -> jax.Array:
    """Returns causal attention [B, T, H, head_dim] of the last T of S positions.

    `key` and `value` are [B, S, kv_heads, head_dim]. A query sees itself and every earlier key
    that `key_mask` [B, S] marks, and also the later ones of the first `front` keys. The results of
    queries that `key_mask` does not mark are undefined. With a mask [B, T, S] each query has keys
    of its own, which splash attention cannot do. cuDNN differentiates even T and S only.
    """
    if kernel == "splash":
        return _attend_splash(query, key, value, key_mask, front)
    length, total = query.shape[1], key.shape[1]
    # T = 2, S = 3: itself = [[0, 1, 0], [0, 0, 1]], before = [[1, 1, 0], [1, 1, 1]]
    itself = jnp.eye(length, total, total - length, dtype=bool)
    before = jnp.tril(jnp.ones((length, total), bool), total - length)
    if front:
        before |= jnp.arange(total) < front
    by_query = key_mask if key_mask.ndim == 3 else key_mask[:, None, :]
    mask = before & (by_query | itself)
    # An unmarked query sees itself: a softmax without any key would be NaN, and NaN would reach the
    # gradients of all keys.
    if kernel == "cudnn":  # needs all three in the same layout
        laid_out = (constrain(x, "batch", "length", "heads", None) for x in (query, key, value))
        query, key, value = laid_out
    return jax.nn.dot_product_attention(
        query, key, value, mask=mask[:, None], implementation=kernel
    )


def _attend_splash(
    query: jax.Array, key: jax.Array, value: jax.Array, key_mask: jax.Array, front: int
) -> jax.Array:
    length, total = query.shape[1], key.shape[1]
    # The kernel of jax does not scale the scores.
    query = query / math.sqrt(query.shape[-1])
    # A marked query sees marked keys, an unmarked one the unmarked keys: no row is without keys.
    segments = key_mask.astype(jnp.int32)
    padded = [_pad_length(x, 0) for x in (query, key, value)]
    padded += [_pad_length(x, 1) for x in (segments[:, total - length :], segments)]
    return shard_heads(_make_splash_kernel(length, total, front))(*padded)[:, :length]


def _pad_length(x: jax.Array, value: int) -> jax.Array:
    """Pads x [B, T, ...] with `value` to a T that is a multiple of SPLASH_LANES."""
    missing = -x.shape[1] % SPLASH_LANES
    return jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2), constant_values=value)


def _make_splash_kernel(length: int, total: int, front: int) -> Callable:
    """Returns splash attention of padded arrays, for `length` queries and `total` keys."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    height, width = (math.ceil(n / SPLASH_LANES) * SPLASH_LANES for n in (length, total))
    rows, columns = (
        next(block for block in SPLASH_BLOCKS if n % block == 0) for n in (height, width)
    )
    sizes = splash.BlockSizes(
        block_q=rows, block_kv=columns, block_kv_compute=columns,
        block_q_dkv=rows, block_kv_dkv=columns, block_kv_dkv_compute=columns,
        block_q_dq=rows, block_kv_dq=columns,
    )  # fmt: skip

    def attend(query, key, value, query_segments, key_segments):
        # Padding keys stand after the last key, so they are later than every real query. The offset
        # aligns the last query with the last key: T = 2, S = 3: query 0 is position 1.
        mask: Any = masks.CausalMask((height, width), offset=total - length)
        if front:
            in_front = np.broadcast_to(np.arange(width) < front, (height, width))
            mask |= masks.NumpyMask(in_front)
        kernel: Any = splash.make_splash_mha(
            masks.MultiHeadMask([mask] * query.shape[2]), block_sizes=sizes,
            head_shards=1, q_seq_shards=1, interpret=INTERPRET_SPLASH,
        )  # fmt: skip

        def attend_row(query, key, value, *segments):
            # [T, H, head_dim] -> [H, T, head_dim], the layout of the kernel
            by_head = (x.swapaxes(0, 1) for x in (query, key, value))
            return kernel(*by_head, splash.SegmentIds(*segments)).swapaxes(0, 1)

        return jax.vmap(attend_row)(query, key, value, query_segments, key_segments)

    return attend


def attend_to_first(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    lengths: jax.Array,
    kernel: AttentionKernel = "xla",
) -> jax.Array:
    """Returns attention [B, T, H, head_dim] of every query to the first `lengths` [B] of S keys.

    `key` and `value` are [B, S, kv_heads, head_dim]. cuDNN differentiates even T and S only.
    """
    if kernel == "cudnn":  # needs all three in the same layout
        laid_out = (constrain(x, "batch", "length", "heads", None) for x in (query, key, value))
        query, key, value = laid_out
    return jax.nn.dot_product_attention(
        query, key, value, key_value_seq_lengths=lengths,
        # Splash attention gains by skipping blocks of a causal mask; here it would skip none.
        implementation="cudnn" if kernel == "cudnn" else "xla",
    )  # fmt: skip


# ---- a decode step: attention to a prefix of the keys, and the merge of two parts


def attend_to_prefix(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    lengths: jax.Array,
    kernel: DecodeKernel,
) -> PartialAttention:
    """Returns attention of query [R, Q, H, head_dim] to the first `lengths` [R] of S keys.

    `key` and `value` are [R, S, kv_heads, head_dim]; every length is at least 1. H is a multiple
    of kv_heads, and the heads that share keys are neighbours.
    """
    attend = {"xla": _attend_to_prefix_xla, "cudnn": _attend_to_prefix_cudnn}[kernel]
    return attend(query, key, value, lengths)


def _attend_to_prefix_xla(
    query: jax.Array, key: jax.Array, value: jax.Array, lengths: jax.Array
) -> PartialAttention:
    seen = jnp.arange(key.shape[1]) < lengths[:, None]
    return _attend_to_seen(query, key, value, seen[:, None, None, None])


def attend_within(query: jax.Array, key: jax.Array, value: jax.Array) -> PartialAttention:
    """Returns causal attention of queries [R, Q, H, head_dim] to the keys of the same tokens.

    `key` and `value` are [R, Q, kv_heads, head_dim]. A window has few tokens, so that XLA computes
    this on every device.
    """
    seen = jnp.tril(jnp.ones((query.shape[1], key.shape[1]), bool))
    return _attend_to_seen(query, key, value, seen)


def _attend_to_seen(
    query: jax.Array, key: jax.Array, value: jax.Array, seen: jax.Array
) -> PartialAttention:
    """Attends to the keys that `seen` marks; it broadcasts to scores [R, kv_heads, ., Q, S]."""
    *leading, heads, size = query.shape
    # r row, q query, k key head, h query of a key head, d head_dim, s key
    grouped = query.reshape(*leading, key.shape[2], -1, size)
    scores = jnp.einsum("rqkhd,rskd->rkhqs", grouped, key, preferred_element_type=jnp.float32)
    scores = jnp.where(seen, scores / math.sqrt(size), -jnp.inf)
    denominators = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
    # The softmax, by denominators that the merge of two parts needs as well.
    weights = jnp.exp(scores - denominators).astype(value.dtype)
    averages = jnp.einsum("rkhqs,rskd->rqkhd", weights, value).reshape(query.shape)
    return averages, jnp.moveaxis(denominators[..., 0], -1, 1).reshape(*leading, heads)


def _attend_to_prefix_cudnn(
    query: jax.Array, key: jax.Array, value: jax.Array, lengths: jax.Array
) -> PartialAttention:
    # jax.nn.dot_product_attention calls this too, but rounds the denominators to the queries'
    # dtype: in bfloat16 that is off by up to 0.06 at 16, and by as much in the parts' weights. So
    # this uses the private function.
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    count = query.shape[1]
    if count == 1 and has_deterministic_flag():
        # For one query cuDNN uses a kernel whose sums differ from call to call, in spite of XLA's
        # flag. With a second query, here padding, it uses another kernel.
        query = jnp.pad(query, [(0, 0), (0, 1), (0, 0), (0, 0)])
    results: Any = cudnn.dot_product_attention(
        query, key, value,
        q_seqlen=jnp.full(query.shape[0], count, jnp.int32), kv_seqlen=lengths,
        scale=1 / math.sqrt(query.shape[-1]), mask_type=cudnn.MaskType.PADDING,
        return_residual=True,
    )  # fmt: skip
    averages, denominators = results
    return averages[:, :count], denominators.swapaxes(1, 2)[:, :count]


def merge_parts(first: PartialAttention, second: PartialAttention) -> jax.Array:
    """Returns attention [R, Q, H, head_dim] to the keys of both parts, merged in float32."""
    (a, log_a), (b, log_b) = first, second
    # exp(log_a) / (exp(log_a) + exp(log_b)): the weight of the first part in the joint softmax
    weight = jax.nn.sigmoid(log_a - log_b)[..., None]
    return (weight * a.astype(jnp.float32) + (1 - weight) * b.astype(jnp.float32)).astype(a.dtype)


def merge_all_parts(parts: Sequence[PartialAttention]) -> jax.Array:
    """Returns attention [R, Q, H, head_dim] to the keys of all parts, merged in float32.

    A part without keys has the logarithm -inf.
    """
    averages, logarithms = (jnp.stack(x) for x in zip(*parts, strict=True))
    weights = jax.nn.softmax(logarithms, axis=0)[..., None]
    return (weights * averages.astype(jnp.float32)).sum(0).astype(averages.dtype)
