"""Mask2Former: a fixed number of queries, each of which finds a class and a mask in an image.

A pixel decoder makes features of four sizes from those of the backbone. In the transformer decoder
the queries attend to the three coarse ones in turn, within the mask that they predicted before.

Source: Cheng et al. 2021 (arXiv 2112.01527). The default sizes are those of the model with Swin-S
for COCO's instances, in transformers and mmdetection alike.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from corl_jax.models import layers
from corl_jax.models.deformable import DeformableAttention, Sides
from corl_jax.models.encoder import Attention, make_layer_norm
from corl_jax.models.layers import make_linear
from corl_jax.models.swin import Swin, SwinConfig

NUM_LEVELS = 3  # features at 1/32, 1/16 and 1/8 of the image, in this order
NORM_GROUPS = 32
POSITION_PERIOD = 10_000  # the longest wavelength of position encodings, over 2 pi


@dataclasses.dataclass(frozen=True)
class Mask2FormerConfig:
    """Sizes of the network, and of the images that it was trained for."""

    backbone: SwinConfig = dataclasses.field(default_factory=SwinConfig)
    hidden_size: int = 256  # of the pixel decoder and of the queries
    mask_size: int = 256  # features of a pixel, whose product with a query is its mask's logit
    encoder_intermediate_size: int = 1024
    decoder_intermediate_size: int = 2048
    encoder_num_layers: int = 6
    decoder_num_layers: int = 9
    num_heads: int = 8
    num_queries: int = 100
    num_classes: int = 80
    layer_norm_eps: float = 1e-5
    # Images are resized so that they just fit into these sides.
    shorter_side: int = 800
    longer_side: int = 1333


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """Sizes of the layers of one of the two transformers."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    layer_norm_eps: float


class ReluMLP(nnx.Module):
    """Two linear layers around a ReLU."""

    def __init__(self, config: LayerConfig, *, rngs: nnx.Rngs):
        self.fc1 = make_linear(config.hidden_size, config.intermediate_size, bias=True, rngs=rngs)
        self.fc2 = make_linear(config.intermediate_size, config.hidden_size, bias=True, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(jax.nn.relu(self.fc1(x)))


class EncoderLayer(nnx.Module):
    """Post-norm layer of the pixel decoder: deformable attention, then an MLP. x [B, Q, D]."""

    def __init__(self, config: LayerConfig, *, rngs: nnx.Rngs):
        self.attn = DeformableAttention(config.hidden_size, config.num_heads, NUM_LEVELS, rngs=rngs)
        self.attn_layernorm = make_layer_norm(config, rngs)
        self.mlp = ReluMLP(config, rngs=rngs)
        self.mlp_layernorm = make_layer_norm(config, rngs)

    def __call__(self, x: jax.Array, positions: jax.Array, sides: Sides) -> jax.Array:
        x = self.attn_layernorm(x + self.attn(x, positions, sides))
        return self.mlp_layernorm(x + self.mlp(x))


class DecoderLayer(nnx.Module):
    """Post-norm layer of the queries [B, Q, D]: attention to pixels, to each other, an MLP."""

    def __init__(self, config: LayerConfig, *, rngs: nnx.Rngs):
        self.cross_attn = Attention(config, rngs=rngs)
        self.cross_layernorm = make_layer_norm(config, rngs)
        self.self_attn = Attention(config, rngs=rngs)
        self.self_layernorm = make_layer_norm(config, rngs)
        self.mlp = ReluMLP(config, rngs=rngs)
        self.mlp_layernorm = make_layer_norm(config, rngs)

    def __call__(
        self,
        x: jax.Array,
        query_positions: jax.Array,
        pixels: jax.Array,
        pixel_positions: jax.Array,
        mask: jax.Array,
    ) -> jax.Array:
        """Computes new queries; `mask` [B, Q, S] is True where a query sees a pixel [B, S, D]."""
        seen = _project_keys_values(self.cross_attn, pixels + pixel_positions, pixels)
        x = self.cross_layernorm(x + self.cross_attn(x + query_positions, mask, seen))
        seen = _project_keys_values(self.self_attn, x + query_positions, x)
        x = self.self_layernorm(x + self.self_attn(x + query_positions, None, seen))
        return self.mlp_layernorm(x + self.mlp(x))


class PixelDecoder(nnx.Module):
    """Features of the backbone -> (features of the three levels [B, S, D], pixels [B, H, W, M])."""

    def __init__(self, config: Mask2FormerConfig, *, rngs: nnx.Rngs):
        width = config.hidden_size
        fine, *coarse = (config.backbone.width * 2**stage for stage in range(4))
        layer = LayerConfig(
            width, config.encoder_intermediate_size, config.num_heads, config.layer_norm_eps
        )
        self.input_convs = nnx.List(
            [nnx.Conv(inputs, width, (1, 1), rngs=rngs) for inputs in reversed(coarse)]
        )
        self.input_norms = nnx.List([_make_group_norm(width, rngs) for _ in coarse])
        self.level_embedding = layers.Embedding(NUM_LEVELS, width, rngs=rngs)
        self.layers = layers.stack(
            lambda rngs: EncoderLayer(layer, rngs=rngs), config.encoder_num_layers, rngs
        )
        self.lateral_conv = nnx.Conv(fine, width, (1, 1), use_bias=False, rngs=rngs)
        self.lateral_norm = _make_group_norm(width, rngs)
        self.output_conv = nnx.Conv(width, width, (3, 3), use_bias=False, rngs=rngs)
        self.output_norm = _make_group_norm(width, rngs)
        self.mask_conv = nnx.Conv(width, config.mask_size, (1, 1), rngs=rngs)

    def __call__(self, features: list[jax.Array]) -> tuple[list[jax.Array], jax.Array]:
        fine, *coarse = features
        maps = [
            norm(conv(x))
            for x, conv, norm in zip(
                reversed(coarse), self.input_convs, self.input_norms, strict=True
            )
        ]
        sides = [(x.shape[1], x.shape[2]) for x in maps]
        x = jnp.concatenate([flatten_map(level) for level in maps], axis=1)
        embedding = self.level_embedding.embedding[...]
        positions = jnp.concatenate(
            [
                jnp.asarray(encode_positions(side, x.shape[-1]), x.dtype) + embedding[level]
                for level, side in enumerate(sides)
            ]
        )
        x, _ = layers.scan_layers(
            self.layers, lambda layer, x: (layer(x, positions, sides), None), x
        )
        ends = np.cumsum([height * width for height, width in sides])[:-1]
        levels = jnp.split(x, ends, axis=1)
        lateral = self.lateral_norm(self.lateral_conv(fine))
        last = levels[-1].reshape(maps[-1].shape)
        lateral += resize_map(last, (lateral.shape[1], lateral.shape[2]))
        pixels = jax.nn.relu(self.output_norm(self.output_conv(lateral)))
        return levels, self.mask_conv(pixels)


class Mask2Former(nnx.Module):
    """pixels [B, H, W, 3] -> class logits [B, Q, classes + 1], mask logits [B, Q, h, w].

    Pixels are normalised. The last class is "no object". Masks have a quarter of the image's
    sides, rounded up. Both results are float32.
    """

    def __init__(self, config: Mask2FormerConfig, *, rngs: nnx.Rngs):
        width = config.hidden_size
        layer = LayerConfig(
            width, config.decoder_intermediate_size, config.num_heads, config.layer_norm_eps
        )
        self.backbone = Swin(config.backbone, rngs=rngs)
        self.pixel_decoder = PixelDecoder(config, rngs=rngs)
        self.query_features = layers.Embedding(config.num_queries, width, rngs=rngs)
        self.query_positions = layers.Embedding(config.num_queries, width, rngs=rngs)
        self.level_embedding = layers.Embedding(NUM_LEVELS, width, rngs=rngs)
        self.layers = layers.stack(
            lambda rngs: DecoderLayer(layer, rngs=rngs), config.decoder_num_layers, rngs
        )
        self.final_layernorm = make_layer_norm(layer, rngs)
        self.class_head = make_linear(width, config.num_classes + 1, bias=True, rngs=rngs)
        sizes = (width, width, config.mask_size)
        self.mask_head = nnx.List(
            [make_linear(width, outputs, bias=True, rngs=rngs) for outputs in sizes]
        )

    def __call__(self, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self.decode(self.backbone(pixels))

    def decode(self, features: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Computes the results from the features of the backbone."""
        levels, mask_features = self.pixel_decoder(features)
        queries = self._decode_queries(
            levels, [(x.shape[1], x.shape[2]) for x in features], mask_features
        )
        return self._predict_classes(queries), self._predict_masks(queries, mask_features)

    def _decode_queries(
        self, levels: list[jax.Array], sides: Sides, mask_features: jax.Array
    ) -> jax.Array:
        batch, _, width = levels[0].shape
        sides = sides[:0:-1]  # from coarse to fine, without the finest
        dtype = levels[0].dtype
        positions = [jnp.asarray(encode_positions(side, width), dtype) for side in sides]
        embedding = self.level_embedding.embedding[...]
        pixels = [level + embedding[number] for number, level in enumerate(levels)]
        # A mask is linear in the features, and so is resizing: products with resized features are
        # the resized masks, from far fewer pixels.
        resized = [flatten_map(resize_map(mask_features, side)) for side in sides]
        query_positions = self.query_positions.embedding[...]
        queries = jnp.broadcast_to(
            self.query_features.embedding[...], (batch, *query_positions.shape)
        )
        graphdef, state = nnx.split(self.layers)
        # A step of the scan is a round over the levels: [9, ...] -> [3, 3, ...].
        rounds = jax.tree.map(lambda x: x.reshape(-1, NUM_LEVELS, *x.shape[1:]), state)

        def apply_round(queries: jax.Array, params: nnx.State) -> tuple[jax.Array, None]:
            for level in range(NUM_LEVELS):
                layer = nnx.merge(graphdef, jax.tree.map(lambda x: x[level], params))  # noqa: B023
                seen = self._predict_masks(queries, resized[level]) >= 0
                # A query whose mask is empty sees everything.
                seen |= ~seen.any(axis=-1, keepdims=True)
                queries = layer(queries, query_positions, pixels[level], positions[level], seen)
            return queries, None

        return lax.scan(apply_round, queries, rounds)[0]

    def _predict_classes(self, queries: jax.Array) -> jax.Array:
        return self.class_head(self.final_layernorm(queries)).astype(jnp.float32)

    def _predict_masks(self, queries: jax.Array, mask_features: jax.Array) -> jax.Array:
        """Computes logits [B, Q, ...] float32 of features [B, ..., M]."""
        x = self.final_layernorm(queries)
        first, second, last = self.mask_head
        x = last(jax.nn.relu(second(jax.nn.relu(first(x)))))
        return jnp.einsum("bqm,b...m->bq...", x, mask_features, preferred_element_type=jnp.float32)


def _make_group_norm(width: int, rngs: nnx.Rngs) -> nnx.GroupNorm:
    return nnx.GroupNorm(
        width, num_groups=NORM_GROUPS, epsilon=1e-5, use_fast_variance=False, rngs=rngs
    )


def _project_keys_values(
    attention: Attention, keys: jax.Array, values: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Projects keys and values of different inputs: only keys have positions."""
    heads = attention.num_heads
    return (
        layers.split_heads(attention.k_proj(keys), heads),
        layers.split_heads(attention.v_proj(values), heads),
    )


def flatten_map(x: jax.Array) -> jax.Array:
    """Reshapes [B, H, W, C] to [B, H * W, C]."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


def resize_map(x: jax.Array, side: tuple[int, int]) -> jax.Array:
    """Resizes [B, H, W, C] bilinearly, as PyTorch's `interpolate` with `align_corners=False`."""
    # Not antialiased, so where it shrinks it reads four neighbours only.
    shape = (x.shape[0], *side, x.shape[-1])
    return jax.image.resize(x, shape, "linear", antialias=False)


def encode_positions(side: tuple[int, int], width: int) -> np.ndarray:
    """Returns sines and cosines of the positions [H * W, width] float32: first y, then x.

    Positions count from 1, and are scaled so that the last one is 2 pi. Sines and cosines of one
    frequency stand side by side.
    """
    half = width // 2
    periods = POSITION_PERIOD ** (2 * (np.arange(half) // 2) / half)
    parts = []
    for length in side:
        angles = np.arange(1, length + 1) / (length + 1e-6) * 2 * math.pi / periods[:, None]
        waves = np.where(np.arange(half)[:, None] % 2, np.cos(angles), np.sin(angles))
        parts.append(waves.T.astype(np.float32))  # [length, half]
    y, x = np.meshgrid(*(np.arange(length) for length in side), indexing="ij")
    return np.concatenate([parts[0][y.ravel()], parts[1][x.ravel()]], axis=-1)
