"""Janus: one language model that reads images through SigLIP and generates them as VQ codes.

`abstract`, `init` and `bind` move between the network and its parameters, a nested dict of
arrays: `bind(config, params).text_logits(...)` works with concrete arrays and inside `jit`.

Source: Wu et al. 2024 (Janus, arXiv 2410.13848); Chen et al. 2025 (Janus-Pro, 2501.17811).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from corl_jax import params as params_lib
from corl_jax.models import modules
from corl_jax.models.layers import Embedding, Projector, Remat, make_linear
from corl_jax.models.llama import Llama, LlamaConfig
from corl_jax.models.siglip import Siglip, SiglipConfig
from corl_jax.models.vq import VQConfig, VQModel
from corl_jax.policies.janus.layout import FLOAT32_PARTS
from corl_jax.policies.janus.tokens import SpecialTokens
from corl_jax.types import EncodedPrompts, Params


@dataclasses.dataclass(frozen=True)
class JanusConfig:
    """Sizes of all parts; the defaults are Janus-Pro-1B's."""

    llama: LlamaConfig = dataclasses.field(default_factory=LlamaConfig)
    siglip: SiglipConfig = dataclasses.field(default_factory=SiglipConfig)
    vq: VQConfig = dataclasses.field(default_factory=VQConfig)
    aligner_depth: int = 2
    generation_aligner_depth: int = 2
    image_token_embed: int = 2048  # inner width of the head that scores image tokens

    @property
    def num_image_tokens(self) -> int:
        """The number of tokens of an image, in a prompt or generated: both have the same grid."""
        return self.siglip.num_tokens


# The published 7B config states few sizes; all others are transformers' LlamaConfig defaults.
_7B = LlamaConfig(
    hidden_size=4096, intermediate_size=11008, num_layers=30, num_heads=32, num_kv_heads=32
)
PRESETS = {
    "janus-1.3b": JanusConfig(),
    "janus-pro-1b": JanusConfig(),
    "janus-pro-7b": JanusConfig(llama=_7B, image_token_embed=4096),
}


class GenerationHead(nnx.Module):
    """Hidden states -> logits over image codes."""

    def __init__(self, width: int, inner: int, codes: int, *, rngs: nnx.Rngs):
        self.proj_out = make_linear(width, inner, bias=True, rngs=rngs)
        self.vision_head = make_linear(inner, codes, bias=True, rngs=rngs)

    def __call__(self, hidden: jax.Array) -> jax.Array:
        return self.vision_head(jax.nn.gelu(self.proj_out(hidden), approximate=False))


class Janus(nnx.Module):
    """The parts and their connections; sampling and losses are in other modules."""

    def __init__(self, config: JanusConfig, *, rngs: nnx.Rngs):
        width, vq = config.llama.hidden_size, config.vq
        self.language_model = Llama(config.llama, rngs=rngs)
        self.lm_head = make_linear(width, config.llama.vocab_size, bias=False, rngs=rngs)
        self.vision_model = Siglip(config.siglip, rngs=rngs)
        self.aligner = Projector(config.siglip.hidden_size, width, config.aligner_depth, rngs=rngs)
        # A table of its own: the VQ codebook has the same shape but other values.
        self.generation_embeddings = Embedding(vq.num_embeddings, vq.embed_dim, rngs=rngs)
        self.generation_aligner = Projector(
            vq.embed_dim, width, config.generation_aligner_depth, rngs=rngs
        )
        self.generation_head = GenerationHead(
            width, config.image_token_embed, vq.num_embeddings, rngs=rngs
        )
        self.vqmodel = VQModel(vq, rngs=rngs)

    def embed_text(self, input_ids: jax.Array) -> jax.Array:
        """Embeds ids [..., T] to [..., T, D]."""
        return self.language_model.embed_tokens(input_ids)

    def embed_image_tokens(self, tokens: jax.Array) -> jax.Array:
        """Embeds generated image codes [..., T] to [..., T, D]."""
        return self.generation_aligner(self.generation_embeddings(tokens))

    def image_features(self, pixel_values: jax.Array, *, remat: Remat = "none") -> jax.Array:
        """Computes features [B, image tokens, D] of normalised pixels [B, S, S, 3].

        Of I images a prompt, [B, I, S, S, 3], the features [B, I * image tokens, D] are in order.
        """
        batch, pixels = len(pixel_values), pixel_values
        if pixels.ndim == 5:
            pixels = pixels.reshape(-1, *pixels.shape[2:])
        features = self.aligner(self.vision_model(pixels, remat=remat))
        # [B * I, T, D] -> [B, I * T, D]
        return features.reshape(batch, -1, features.shape[-1])

    def prompt_embeds(
        self, input_ids: jax.Array, image_token: int, image_features: jax.Array | None = None
    ) -> jax.Array:
        """Embeds ids [B, P] to [B, P, D], with image features at the `image_token` positions."""
        embeds = self.embed_text(input_ids)
        if image_features is None:
            return embeds
        is_image = input_ids == image_token
        # ids [t, I, I, t] -> cumsum - 1 = [-1, 0, 1, 1]: position 1 takes feature 0, position 2
        # feature 1. Values at text positions are not used; the clip keeps them in range.
        order = jnp.clip(jnp.cumsum(is_image, axis=-1) - 1, 0, image_features.shape[1] - 1)
        placed = jnp.take_along_axis(image_features, order[..., None], axis=1)
        return jnp.where(is_image[..., None], placed.astype(embeds.dtype), embeds)

    def embed_question(
        self, prompts: EncodedPrompts, special: SpecialTokens, *, remat: Remat = "none"
    ) -> jax.Array:
        """Embeds the ids of prompts with their images to [B, P, D]."""
        pixels = prompts.pixel_values
        features = None if pixels is None else self.image_features(pixels, remat=remat)
        return self.prompt_embeds(prompts.input_ids, special.image, features)

    def text_logits(self, hidden: jax.Array) -> jax.Array:
        """Computes text logits [..., V] of hidden states [..., D]."""
        return self.lm_head(hidden)

    def image_logits(self, hidden: jax.Array) -> jax.Array:
        """Computes logits over image codes of hidden states [..., D]."""
        return self.generation_head(hidden)


def abstract(config: JanusConfig, dtype: Any = jnp.float32) -> Params:
    """Returns the shapes of all parameters, as a nested dict of ShapeDtypeStruct."""
    return modules.make_abstract(Janus, config, dtype)


def init(config: JanusConfig, key: jax.Array, dtype: Any = jnp.float32) -> Params:
    """Returns random parameters: normal(0.02) in transformers, flax's defaults in convolutions."""
    return modules.init_params(Janus, config, key, dtype)


def bind(config: JanusConfig, params: Params) -> Janus:
    """Returns the network with these parameters."""
    return modules.bind(Janus, config, params)


def cast(params: Params, dtype: Any) -> Params:
    """Returns a copy of the parameters for computing in `dtype`; see `layout.FLOAT32_PARTS`."""
    return params_lib.cast(params, dtype, FLOAT32_PARTS)
