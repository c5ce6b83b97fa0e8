"""The shallow convolutional encoder and decoder around JanusFlow's language model.

The encoder turns noisy latents into one token per patch. The decoder turns hidden states of these
tokens into a velocity. Both are conditioned on the time and have a few ConvNeXt blocks. Maps are
NHWC; tokens of a map are in raster order.

Source: Ma et al. 2024 (JanusFlow, arXiv 2411.07975); Hoogeboom et al. 2023 (UViT, 2301.11093);
Woo et al. 2023 (ConvNeXt V2, 2301.00808).
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from corl_jax.devices.mesh import constrain
from corl_jax.models import layers
from corl_jax.models.layers import Remat, make_linear

MAX_PERIOD = 10000.0
EXPANSION = 4  # hidden width of a block over its width
KERNEL_SIZE = 7  # of a block's depthwise convolution


@dataclasses.dataclass(frozen=True)
class UvitConfig:
    """Sizes of encoder and decoder; the defaults are those of JanusFlow-1.3B."""

    latent_channels: int = 4
    patch_size: int = 2  # side of a patch, in latents
    encoder_width: int = 768
    encoder_num_layers: int = 2
    decoder_width: int = 768  # channels that the decoder reads beside the encoder's map
    decoder_num_layers: int = 2
    norm_eps: float = 1e-6


def make_time_features(times: jax.Array, width: int) -> jax.Array:
    """Computes features [N, width] float32 of times [N]: all cosines, then all sines."""
    half = width // 2
    frequencies = jnp.exp(-math.log(MAX_PERIOD) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = times.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimeEmbedding(nnx.Module):
    """Two linear layers on the features of a time: times [N] -> [N, condition_width]."""

    def __init__(self, width: int, condition_width: int, *, rngs: nnx.Rngs):
        self.fc1 = make_linear(width, condition_width, bias=True, rngs=rngs)
        self.fc2 = make_linear(condition_width, condition_width, bias=True, rngs=rngs)

    def __call__(self, times: jax.Array) -> jax.Array:
        # Features in float32: bfloat16 rounds the time 966.67 to 968.
        features = make_time_features(times, self.fc1.in_features)
        return self.fc2(jax.nn.silu(self.fc1(features.astype(self.fc1.kernel.dtype))))


class GlobalResponseNorm(nnx.Module):
    """Scales each channel of maps [N, H, W, C] by its share in the map's response.

    Source: arXiv 2301.00808, section 3; the epsilon is only in the mean.
    """

    def __init__(self, channels: int):
        # Zeros: at the start the layer changes nothing.
        self.scale = nnx.Param(jnp.zeros((1, 1, 1, channels)))
        self.bias = nnx.Param(jnp.zeros((1, 1, 1, channels)))

    def __call__(self, x: jax.Array) -> jax.Array:
        # float32: a sum of squares over all places of a map.
        squares = jnp.square(x.astype(jnp.float32)).sum(axis=(1, 2), keepdims=True)
        # The gradient of a root is infinite at 0, where a channel is dead on the whole map.
        is_dead = squares == 0
        norms = jnp.where(is_dead, 0, jnp.sqrt(jnp.where(is_dead, 1, squares)))
        share = (norms / (norms.mean(axis=-1, keepdims=True) + 1e-6)).astype(x.dtype)
        return self.bias[...] + (self.scale[...] * share + 1) * x


@jax.custom_vjp
def convolve_depthwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolves each channel of maps x [N, H, W, C] with a kernel [K, K, 1, C] of its own.

    K is odd.
    """
    # One fused sum: XLA's own convolution of single channels takes 10 times as long on a CPU.
    size, (height, width) = len(kernel), x.shape[1:3]
    padded, weights = _pad_margins(x, size), kernel.astype(jnp.float32)
    total = jnp.zeros(x.shape, jnp.float32)
    for row, column in itertools.product(range(size), repeat=2):
        seen = padded[:, row : row + height, column : column + width]
        total += seen.astype(jnp.float32) * weights[row, column, 0]
    return total.astype(x.dtype)


def _pad_margins(x: jax.Array, size: int) -> jax.Array:
    margin = (size // 2, size // 2)
    return jnp.pad(x, ((0, 0), margin, margin, (0, 0)))


def _save_inputs(x: jax.Array, kernel: jax.Array):
    return convolve_depthwise(x, kernel), (x, kernel)


def _pull_back(inputs: tuple[jax.Array, jax.Array], gradient: jax.Array):
    """Returns the gradients of the maps and of the kernel."""
    # A loop: the gradient of the sum would be as many sums over whole maps, or all of them at once.
    x, kernel = inputs
    # The transpose of a convolution of odd size is the convolution with the kernel turned around.
    of_maps = convolve_depthwise(gradient, kernel[::-1, ::-1])
    size, (height, width) = len(kernel), x.shape[1:3]
    padded = _pad_margins(x, size)

    def sum_products(place: jax.Array) -> jax.Array:
        """Computes the gradient [C] of the kernel's entry at a place, counted row by row."""
        seen = lax.dynamic_slice_in_dim(padded, place // size, height, axis=1)
        seen = lax.dynamic_slice_in_dim(seen, place % size, width, axis=2)
        return jnp.sum(seen * gradient, axis=(0, 1, 2), dtype=jnp.float32)

    of_kernel = lax.map(sum_products, jnp.arange(size**2))  # [K * K, C]
    return of_maps, of_kernel.reshape(kernel.shape).astype(kernel.dtype)


convolve_depthwise.defvjp(_save_inputs, _pull_back)


class DepthwiseConv(nnx.Module):
    """A convolution of each channel by itself, on maps [N, H, W, C] of any size."""

    def __init__(self, channels: int, size: int, *, rngs: nnx.Rngs):
        shape = (size, size, 1, channels)
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), shape))
        self.bias = nnx.Param(jnp.zeros(channels))

    def __call__(self, x: jax.Array) -> jax.Array:
        return convolve_depthwise(x, self.kernel[...]) + self.bias[...]


class ConvNextBlock(nnx.Module):
    """Depthwise convolution and a wide layer per place, then scale and shift by the condition."""

    def __init__(self, width: int, condition_width: int, norm_eps: float, *, rngs: nnx.Rngs):
        inner = EXPANSION * width
        self.depthwise = DepthwiseConv(width, KERNEL_SIZE, rngs=rngs)
        self.norm = nnx.RMSNorm(width, epsilon=norm_eps, rngs=rngs)
        self.fc1 = make_linear(width, inner, bias=True, rngs=rngs)
        self.response_norm = GlobalResponseNorm(inner)
        self.fc2 = make_linear(inner, width, bias=True, rngs=rngs)
        self.film = make_linear(condition_width, 2 * width, bias=True, rngs=rngs)

    def __call__(self, x: jax.Array, condition: jax.Array) -> jax.Array:
        """Computes maps [N, H, W, C] of maps x and conditions [N, condition_width]."""
        # Otherwise XLA splits a map over devices, and sends its borders for each entry of a kernel.
        x = constrain(x, "batch", None, None, None)
        h = self.fc1(self.norm(constrain(self.depthwise(x), "batch", None, None, None)))
        h = constrain(jax.nn.gelu(h, approximate=False), "batch", None, None, "mlp")
        x = x + self.fc2(self.response_norm(h))
        # Behind the residual: the condition scales the sum, not the branch alone.
        scale, shift = jnp.split(self.film(jax.nn.silu(condition))[:, None, None], 2, axis=-1)
        return x * (1 + scale) + shift


class Encoder(nnx.Module):
    """Latents and times -> one feature vector per patch, and the condition of all blocks."""

    def __init__(self, config: UvitConfig, condition_width: int, *, rngs: nnx.Rngs):
        width, patch = config.encoder_width, (config.patch_size, config.patch_size)
        self.time_embedding = TimeEmbedding(width, condition_width, rngs=rngs)
        self.patch_embedding = nnx.Conv(
            config.latent_channels, width, patch, strides=patch, padding="VALID", rngs=rngs
        )
        self.layers = layers.stack(
            lambda rngs: ConvNextBlock(width, condition_width, config.norm_eps, rngs=rngs),
            config.encoder_num_layers,
            rngs,
        )

    def __call__(
        self, latents: jax.Array, times: jax.Array, *, remat: Remat = "none"
    ) -> tuple[jax.Array, jax.Array]:
        """Returns maps [N, h / patch, w / patch, C] and conditions [N, condition_width].

        `latents` are [N, h, w, latent_channels], `times` [N] are 0 to 1000.
        """
        condition = self.time_embedding(times)
        x = self.patch_embedding(latents.astype(self.patch_embedding.kernel.dtype))
        return _apply_blocks(self.layers, x, condition, remat), condition


class Decoder(nnx.Module):
    """Maps of the language model and of the encoder -> latents [N, h, w, latent_channels]."""

    def __init__(self, config: UvitConfig, condition_width: int, *, rngs: nnx.Rngs):
        width = config.decoder_width + config.encoder_width
        self.patch_size = config.patch_size
        self.input_norm = nnx.RMSNorm(config.decoder_width, epsilon=config.norm_eps, rngs=rngs)
        self.layers = layers.stack(
            lambda rngs: ConvNextBlock(width, condition_width, config.norm_eps, rngs=rngs),
            config.decoder_num_layers,
            rngs,
        )
        self.output_norm = nnx.RMSNorm(width, epsilon=config.norm_eps, rngs=rngs)
        outputs = config.latent_channels * config.patch_size**2
        self.output = nnx.Conv(width, outputs, (1, 1), rngs=rngs)

    def __call__(
        self, x: jax.Array, skip: jax.Array, condition: jax.Array, *, remat: Remat = "none"
    ) -> jax.Array:
        """Computes latents of maps x [N, H, W, decoder_width] and the encoder's maps `skip`."""
        x = jnp.concatenate([self.input_norm(x), skip], axis=-1)
        x = _apply_blocks(self.layers, x, condition, remat)
        return shuffle_pixels(self.output(self.output_norm(x)), self.patch_size)


def _apply_blocks(
    blocks: nnx.Module, x: jax.Array, condition: jax.Array, remat: Remat
) -> jax.Array:
    return layers.scan_layers(blocks, lambda block, x: (block(x, condition), None), x, remat)[0]


def shuffle_pixels(x: jax.Array, factor: int) -> jax.Array:
    """Rearranges maps [N, H, W, C * factor^2] to [N, H * factor, W * factor, C]."""
    # Channel c * 4 + dy * 2 + dx of place (y, x) -> channel c of place (2 y + dy, 2 x + dx).
    rows, height, width, channels = x.shape
    x = x.reshape(rows, height, width, channels // factor**2, factor, factor)
    x = x.transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(rows, height * factor, width * factor, -1)
