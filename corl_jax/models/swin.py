"""Swin: a vision transformer whose attention is within windows, with features of four sizes.

Every second block shifts its windows by half their size, so that information crosses their
borders. Between two stages each 2 x 2 positions become one of twice the width.

Source: Liu et al. 2021 (arXiv 2103.14030). The default sizes are those of Swin-S.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from corl_jax.models import layers
from corl_jax.models.encoder import MLP, make_layer_norm
from corl_jax.models.layers import initializer, make_linear

FAR = -100.0  # added to the logits of positions that the cyclic shift brings together


@dataclasses.dataclass(frozen=True)
class SwinConfig:
    """Sizes of the backbone; stage k has width `width` * 2^k."""

    width: int = 96
    depths: tuple[int, ...] = (2, 2, 18, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: int = 7
    patch_size: int = 4
    mlp_ratio: int = 4
    layer_norm_eps: float = 1e-5


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """Sizes of the blocks of one stage."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    window_size: int
    layer_norm_eps: float


def list_stages(config: SwinConfig) -> list[StageConfig]:
    """Returns the sizes of each stage."""
    return [
        StageConfig(
            hidden_size=config.width * 2**stage,
            intermediate_size=config.width * 2**stage * config.mlp_ratio,
            num_heads=heads,
            window_size=config.window_size,
            layer_norm_eps=config.layer_norm_eps,
        )
        for stage, heads in enumerate(config.num_heads)
    ]


class WindowAttention(nnx.Module):
    """Attention within windows, with a learned bias for each pair of relative positions.

    x [B, W, T, D], W windows of T = window_size^2 positions, `mask` [W, T, T] added to the logits.
    """

    def __init__(self, config: StageConfig, *, rngs: nnx.Rngs):
        self.num_heads, self.window_size = config.num_heads, config.window_size
        width = config.hidden_size
        self.q_proj = make_linear(width, width, bias=True, rngs=rngs)
        self.k_proj = make_linear(width, width, bias=True, rngs=rngs)
        self.v_proj = make_linear(width, width, bias=True, rngs=rngs)
        self.out_proj = make_linear(width, width, bias=True, rngs=rngs)
        offsets = (2 * config.window_size - 1) ** 2
        self.position_bias = nnx.Param(initializer(rngs.params(), (offsets, config.num_heads)))

    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        query, key, value = (
            projection(x).reshape(*x.shape[:-1], self.num_heads, -1)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        logits = jnp.einsum(
            "bwthd,bwshd->bwhts", query, key, preferred_element_type=jnp.float32
        ) * (query.shape[-1] ** -0.5)
        table = self.position_bias[...].astype(jnp.float32)
        logits += table[list_offsets(self.window_size)].transpose(2, 0, 1)
        if mask is not None:
            logits += mask[:, None]
        weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
        out = jnp.einsum("bwhts,bwshd->bwthd", weights, value)
        return self.out_proj(out.reshape(x.shape))


class SwinBlock(nnx.Module):
    """Pre-norm block: attention within windows, and a two-layer MLP. x [B, H, W, D]."""

    def __init__(self, config: StageConfig, *, rngs: nnx.Rngs):
        self.layer_norm1 = make_layer_norm(config, rngs)
        self.attn = WindowAttention(config, rngs=rngs)
        self.layer_norm2 = make_layer_norm(config, rngs)
        self.mlp = MLP(config, rngs=rngs)
        self.window_size = config.window_size

    def __call__(self, x: jax.Array, *, shift: bool) -> jax.Array:
        x = x + self._attend_within_windows(self.layer_norm1(x), shift)
        return x + self.mlp(self.layer_norm2(x))

    def _attend_within_windows(self, x: jax.Array, shift: bool) -> jax.Array:
        _, height, width, _ = x.shape
        window = self.window_size
        # Zeros fill the last windows. They take part in attention, as in the published training.
        x = pad_to_multiple(x, window)
        sides = (x.shape[1], x.shape[2])
        step = window // 2 if shift else 0
        x = jnp.roll(x, (-step, -step), axis=(1, 2)) if step else x
        mask = make_shift_mask(sides, window, step) if step else None
        windows = self.attn(split_windows(x, window), None if mask is None else jnp.asarray(mask))
        x = merge_windows(windows, sides)
        x = jnp.roll(x, (step, step), axis=(1, 2)) if step else x
        return x[:, :height, :width]


class PatchMerging(nnx.Module):
    """x [B, H, W, D] -> [B, ceil(H / 2), ceil(W / 2), 2 D].

    The parameters know each of the four positions by (row, column), so that layouts of files which
    order them differently load into the same leaf.
    """

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.scale = nnx.Param(jnp.ones((2, 2, width)))
        self.bias = nnx.Param(jnp.zeros((2, 2, width)))
        self.kernel = nnx.Param(initializer(rngs.params(), (2, 2, width, 2 * width)))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = pad_to_multiple(x, 2)
        batch, height, width, features = x.shape
        # [B, 4, 6, D] -> [B, 2, 2 (row), 3, 2 (column), D] -> [B, 2, 3, 2, 2, D]
        x = x.reshape(batch, height // 2, 2, width // 2, 2, features).swapaxes(2, 3)
        # One norm for the four positions together.
        wide = x.astype(jnp.float32)
        wide -= wide.mean(axis=(3, 4, 5), keepdims=True)
        variance = jnp.square(wide).mean(axis=(3, 4, 5), keepdims=True)
        normed = wide * lax.rsqrt(variance + 1e-5) * self.scale[...] + self.bias[...]
        return jnp.einsum("bhwijc,ijcd->bhwd", normed.astype(x.dtype), self.kernel[...])


class Swin(nnx.Module):
    """pixels [B, H, W, 3] -> features of the four stages [B, H / 4 / 2^k, W / 4 / 2^k, D_k].

    Sides that no patch or window divides are padded on the right and at the bottom.
    """

    def __init__(self, config: SwinConfig, *, rngs: nnx.Rngs):
        patch = (config.patch_size, config.patch_size)
        stages = list_stages(config)
        self.patch_size = config.patch_size
        self.patch_embedding = nnx.Conv(
            3, config.width, patch, strides=patch, padding="VALID", rngs=rngs
        )
        self.embed_layernorm = make_layer_norm(stages[0], rngs)
        self.stages = nnx.List(
            [
                layers.stack(functools.partial(_make_block, stage), depth, rngs)
                for stage, depth in zip(stages, config.depths, strict=True)
            ]
        )
        self.mergers = nnx.List([PatchMerging(s.hidden_size, rngs=rngs) for s in stages[:-1]])
        self.out_layernorms = nnx.List([make_layer_norm(stage, rngs) for stage in stages])

    def __call__(self, pixels: jax.Array) -> list[jax.Array]:
        x = pad_to_multiple(pixels, self.patch_size)
        x = self.patch_embedding(x.astype(self.patch_embedding.kernel.dtype))
        x = self.embed_layernorm(x)
        features = []
        for stage, blocks in enumerate(self.stages):
            # The merging after a stage belongs to the next one: features are from before it.
            x = self.mergers[stage - 1](x) if stage else x
            x = scan_pairs(blocks, x)
            features.append(self.out_layernorms[stage](x))
        return features


def _make_block(config: StageConfig, rngs: nnx.Rngs) -> SwinBlock:
    return SwinBlock(config, rngs=rngs)


def scan_pairs(blocks: nnx.Module, x: jax.Array) -> jax.Array:
    """Applies a stack of an even number of blocks, with and without shifted windows in turn."""
    graphdef, state = nnx.split(blocks)
    # [18, ...] -> [9, 2, ...]: a step of the scan is a pair.
    pairs = jax.tree.map(lambda leaf: leaf.reshape(-1, 2, *leaf.shape[1:]), state)

    def apply_pair(x: jax.Array, pair: nnx.State) -> tuple[jax.Array, None]:
        for number in range(2):
            block = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[number], pair))  # noqa: B023
            x = block(x, shift=number == 1)
        return x, None

    return lax.scan(apply_pair, x, pairs)[0]


def pad_to_multiple(x: jax.Array, size: int) -> jax.Array:
    """Appends zeros to [B, H, W, C], so that `size` divides H and W."""
    height, width = (-side % size for side in x.shape[1:3])
    return jnp.pad(x, ((0, 0), (0, height), (0, width), (0, 0))) if height or width else x


def split_windows(x: jax.Array, size: int) -> jax.Array:
    """Reshapes [B, H, W, D] to windows [B, H W / size^2, size^2, D], row by row."""
    batch, height, width, features = x.shape
    x = x.reshape(batch, height // size, size, width // size, size, features).swapaxes(2, 3)
    return x.reshape(batch, -1, size * size, features)


def merge_windows(x: jax.Array, sides: tuple[int, int]) -> jax.Array:
    """Inverts `split_windows`; `sides` are (H, W)."""
    height, width = sides
    batch, _, positions, features = x.shape
    size = int(positions**0.5)
    x = x.reshape(batch, height // size, width // size, size, size, features).swapaxes(2, 3)
    return x.reshape(batch, height, width, features)


def list_offsets(size: int) -> np.ndarray:
    """Returns [size^2, size^2]: for query i and key j the row of the table of relative positions.

    Rows count the vertical offset first: size 2, from (0, 0) to (1, 1) is (-1, -1), row 0.
    """
    rows, columns = np.divmod(np.arange(size * size), size)
    down = rows[:, None] - rows[None] + size - 1
    right = columns[:, None] - columns[None] + size - 1
    return down * (2 * size - 1) + right


def make_shift_mask(lengths: tuple[int, int], size: int, step: int) -> np.ndarray:
    """Returns [windows, size^2, size^2] float32: 0 where both positions were neighbours, else FAR.

    After the cyclic shift the last window of each row and column has parts of opposite borders.
    """
    height, width = lengths
    parts = []
    for length in lengths:
        place = np.arange(length)
        # length 8, size 4, step 2: [0 0 0 0 1 1 2 2]
        parts.append((place >= length - size).astype(int) + (place >= length - step))
    regions = parts[0][:, None] * 3 + parts[1]
    regions = regions.reshape(height // size, size, width // size, size).swapaxes(1, 2)
    regions = regions.reshape(-1, size * size)
    same = regions[:, :, None] == regions[:, None]
    return np.where(same, 0.0, FAR).astype(np.float32)
