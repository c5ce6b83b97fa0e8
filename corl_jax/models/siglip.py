"""The SigLIP image tower: patches in, one feature per patch out.

All layers, the final LayerNorm, exact GELU, no class token; the attention-pool head that the
original checkpoints carry is not used by Janus and does not exist here.

Source: Zhai et al. 2023 (arXiv 2303.15343); timm `siglip_large_patch16_384` as Janus loads it.
"""

from __future__ import annotations

import dataclasses

import jax
from flax import nnx

from corl_jax.models import layers
from corl_jax.models.layers import Remat, attend, linear, merge_heads, split_heads


@dataclasses.dataclass(frozen=True)
class SiglipConfig:
    """Sizes of the tower; the defaults are those of every released Janus."""

    image_size: int = 384
    patch_size: int = 16
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_layers: int = 24
    num_heads: int = 16
    layer_norm_eps: float = 1e-6

    @property
    def num_tokens(self) -> int:
        return (self.image_size // self.patch_size) ** 2


class Attention(nnx.Module):
    """Full self-attention over patches, with biases."""

    def __init__(self, config: SiglipConfig, *, rngs: nnx.Rngs):
        self.num_heads = config.num_heads
        width = config.hidden_size
        self.q_proj = linear(width, width, bias=True, rngs=rngs)
        self.k_proj = linear(width, width, bias=True, rngs=rngs)
        self.v_proj = linear(width, width, bias=True, rngs=rngs)
        self.out_proj = linear(width, width, bias=True, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        query, key, value = (
            split_heads(proj(x), self.num_heads) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(merge_heads(attend(query, key, value)))


class MLP(nnx.Module):
    """Two linear layers around an exact GELU."""

    def __init__(self, config: SiglipConfig, *, rngs: nnx.Rngs):
        self.fc1 = linear(config.hidden_size, config.intermediate_size, bias=True, rngs=rngs)
        self.fc2 = linear(config.intermediate_size, config.hidden_size, bias=True, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


class Block(nnx.Module):
    """Pre-norm encoder layer."""

    def __init__(self, config: SiglipConfig, *, rngs: nnx.Rngs):
        self.layer_norm1 = layer_norm(config, rngs)
        self.attn = Attention(config, rngs=rngs)
        self.layer_norm2 = layer_norm(config, rngs)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Siglip(nnx.Module):
    """pixel_values [B, S, S, 3] -> features [B, (S / patch)^2, hidden_size]."""

    def __init__(self, config: SiglipConfig, *, rngs: nnx.Rngs):
        patch = (config.patch_size, config.patch_size)
        self.patch_embedding = nnx.Conv(
            3, config.hidden_size, patch, strides=patch, padding="VALID", rngs=rngs
        )
        self.position_embedding = layers.Embedding(config.num_tokens, config.hidden_size, rngs=rngs)
        self.layers = layers.stack(lambda rngs: Block(config, rngs=rngs), config.num_layers, rngs)
        self.post_layernorm = layer_norm(config, rngs)

    def __call__(self, pixel_values: jax.Array, *, remat: Remat = "none") -> jax.Array:
        kernel_dtype = self.patch_embedding.kernel.dtype
        x = self.patch_embedding(pixel_values.astype(kernel_dtype))
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        x = x + self.position_embedding.embedding[...]
        x, _ = layers.scan_layers(self.layers, lambda block, x: (block(x), None), x, remat)
        return self.post_layernorm(x)


def layer_norm(config: SiglipConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """LayerNorm whose variance is not taken as E[x^2] - E[x]^2, which loses digits."""
    return nnx.LayerNorm(
        config.hidden_size, epsilon=config.layer_norm_eps, use_fast_variance=False, rngs=rngs
    )
