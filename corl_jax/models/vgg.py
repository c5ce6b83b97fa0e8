"""LPIPS with VGG16: a distance of two images from the features of a vision network.

Features of five depths are divided by their norm across channels. Their squared differences
are weighted by a learned head per depth, averaged over positions and added up.

Source: Zhang et al. 2018 (arXiv 1801.03924), weights of version 0.1; trunk: Simonyan and
Zisserman 2014 (arXiv 1409.1556), configuration D.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of pixels in [-1, 1]
EPSILON = 1e-8
CONVOLUTIONS = (2, 2, 3, 3, 3)  # per stage; a stage ends before the pooling that follows it


@dataclasses.dataclass(frozen=True)
class VggConfig:
    """Widths of the five stages; the defaults are VGG16's."""

    channels: tuple[int, ...] = (64, 128, 256, 512, 512)


class Lpips(nnx.Module):
    """Images [N, H, W, 3] and [M, H, W, 3] in [0, 1] -> distances [N] float32, 0 for equal images.

    M divides N. Each image of the second batch is compared with N / M images of the first that
    follow each other.
    """

    def __init__(self, config: VggConfig, *, rngs: nnx.Rngs):
        self.stages = nnx.List([])
        inputs = 3
        for outputs, count in zip(config.channels, CONVOLUTIONS, strict=True):
            widths = [inputs] + [outputs] * (count - 1)
            convs = [nnx.Conv(width, outputs, (3, 3), padding=1, rngs=rngs) for width in widths]
            self.stages.append(nnx.List(convs))
            inputs = outputs
        self.heads = nnx.List(
            [nnx.Conv(width, 1, (1, 1), use_bias=False, rngs=rngs) for width in config.channels]
        )

    def __call__(self, first: jax.Array, second: jax.Array) -> jax.Array:
        distance = jnp.zeros(first.shape[0], jnp.float32)
        for head, x, y in zip(
            self.heads, self.compute_taps(first), self.compute_taps(second), strict=True
        ):
            # N = 4, M = 2: [x0, x1, x2, x3] -> [[x0, x1], [x2, x3]] - [[y0], [y1]]
            groups = normalize_channels(x).reshape(y.shape[0], -1, *x.shape[1:])
            difference = jnp.square(groups - normalize_channels(y)[:, None]).reshape(x.shape)
            distance += head(difference).astype(jnp.float32).mean(axis=(1, 2, 3))
        return distance

    def compute_taps(self, images: jax.Array) -> list[jax.Array]:
        """Computes the last activations of each stage k, [N, H / 2^k, W / 2^k, channels[k]]."""
        x = (2.0 * images - 1.0 - jnp.array(SHIFT)) / jnp.array(SCALE)
        x = x.astype(self.stages[0][0].kernel.dtype)
        taps = []
        # The tap of a stage is before its pooling, so the pooling belongs to the next stage.
        for convs in self.stages:
            x = max_pool(x) if taps else x
            for conv in convs:
                x = jax.nn.relu(conv(x))
            taps.append(x)
        return taps


def max_pool(x: jax.Array) -> jax.Array:
    """Computes the maximum of each 2x2 block; an odd last row or column is left out."""
    batch, height, width, channels = x.shape
    # [B, 5, 5, C] -> [B, 4, 4, C] -> [B, 2, 2, 2, 2, C], maximum over axes 2 and 4
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).max(axis=(2, 4))


def normalize_channels(x: jax.Array) -> jax.Array:
    """Divides the features of each position by their norm, in float32."""
    # Epsilon under the root, as in torchmetrics. The lpips package adds 1e-10 to the root, which
    # differs only if all features of a position are near 0.
    x = x.astype(jnp.float32)
    return x / jnp.sqrt(EPSILON + jnp.square(x).sum(axis=-1, keepdims=True))
