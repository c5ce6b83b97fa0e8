"""The aesthetic predictor: predicts from CLIP's image vector how people rate an image.

Source: christophschuhmann/improved-aesthetic-predictor, `simple_inference.py`.
"""

from __future__ import annotations

import dataclasses

import jax
from flax import nnx

from corl_jax.models.layers import make_linear


@dataclasses.dataclass(frozen=True)
class AestheticConfig:
    """Widths from CLIP's vector to the rating; the defaults are those for ViT-L/14."""

    sizes: tuple[int, ...] = (768, 1024, 128, 64, 16, 1)


class AestheticHead(nnx.Module):
    """Image vectors of unit length [N, sizes[0]] -> ratings [N], about 1 to 10."""

    def __init__(self, config: AestheticConfig, *, rngs: nnx.Rngs):
        widths = zip(config.sizes[:-1], config.sizes[1:], strict=True)
        self.layers = nnx.List([make_linear(i, o, bias=True, rngs=rngs) for i, o in widths])

    def __call__(self, x: jax.Array) -> jax.Array:
        # No activations between the layers, as the published head was trained.
        for layer in self.layers:
            x = layer(x)
        return x[..., 0]
