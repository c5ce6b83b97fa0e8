"""Show-o: one language model over a vocabulary of text and image codes, which fills in masks.

Images are read and generated as the same codes of MAGVIT-v2. `abstract`, `init` and `bind` move
between the network and its parameters, a nested dict of arrays.

Source: Xie et al. 2024 (Show-o, arXiv 2408.12528).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from corl_jax import params as params_lib
from corl_jax.models import modules
from corl_jax.models.clip import ClipVisionConfig, VisionTower
from corl_jax.models.layers import make_linear
from corl_jax.models.lora import Lora
from corl_jax.models.magvit import Magvit, MagvitConfig
from corl_jax.models.phi import AdaptedPhiConfig, Phi, PhiConfig, compute_some_logits, take_head
from corl_jax.policies.show_o.layout import FLOAT32_PARTS
from corl_jax.types import Params

NUM_NEW_TOKENS = 10
"""Tokens between the text's and the image codes: [PAD] and nine names of tasks and borders."""


@dataclasses.dataclass(frozen=True)
class ShowOConfig:
    """Sizes of all parts; the defaults are those of showlab/show-o."""

    phi: PhiConfig = dataclasses.field(default_factory=PhiConfig)
    magvit: MagvitConfig = dataclasses.field(default_factory=MagvitConfig)
    num_vq_tokens: int = 256  # codes of an image
    llm_vocab_size: int = 50295  # tokens of the text tokenizer
    # True: questions read CLIP's features of an image in the place of its codes, and files have a
    # projector of these features.
    w_clip_vit: bool = False
    clip_width: int = 1024  # channels of CLIP's features
    projector_width: int = 2048  # of its hidden layer and its output, as the original code has it
    clip: ClipVisionConfig | None = None  # the vision tower; without it no question is read

    @property
    def num_image_tokens(self) -> int:
        """The number of codes of an image, in a prompt or generated."""
        return self.num_vq_tokens

    @property
    def image_side(self) -> int:
        """The side of a drawn image in pixels."""
        # 1,024 codes -> a grid of 32 x 32 -> 32 * 16 = 512 pixels
        return math.isqrt(self.num_vq_tokens) * self.magvit.downsample

    @property
    def num_codes(self) -> int:
        """The number of different image codes."""
        return self.magvit.num_codes

    @property
    def image_offset(self) -> int:
        """The id of image code 0."""
        return self.llm_vocab_size + NUM_NEW_TOKENS

    @property
    def mask_token(self) -> int:
        """The id of the mask token, behind the last image code."""
        return self.image_offset + self.num_codes

    @property
    def vocab_size(self) -> int:
        """Text tokens, new tokens, image codes and the mask token."""
        return self.mask_token + 1


def add_adapters(config: ShowOConfig, lora: Lora) -> ShowOConfig:
    """Returns the sizes with adapters in the layers of the language model."""
    sizes = dataclasses.asdict(remove_adapters(config).phi)
    return dataclasses.replace(config, phi=AdaptedPhiConfig(**sizes, lora=lora))


def remove_adapters(config: ShowOConfig) -> ShowOConfig:
    """Returns the sizes without adapters, as in checkpoints and for the reference."""
    if config.phi.lora is None:
        return config
    # The plain class again, so that these sizes equal those of a model that never had adapters.
    sizes = {f.name: getattr(config.phi, f.name) for f in dataclasses.fields(PhiConfig)}
    return dataclasses.replace(config, phi=PhiConfig(**sizes))


PRESETS = {
    "show-o": ShowOConfig(),
    "show-o-512x512": ShowOConfig(num_vq_tokens=1024),
    "show-o-w-clip-vit": ShowOConfig(w_clip_vit=True),
    "show-o-w-clip-vit-512x512": ShowOConfig(num_vq_tokens=1024, w_clip_vit=True),
}


class ClipProjector(nnx.Module):
    """CLIP's features [..., clip_width] -> embeddings [..., projector_width]."""

    def __init__(self, inputs: int, width: int, *, rngs: nnx.Rngs):
        self.fc1 = make_linear(inputs, width, bias=True, rngs=rngs)
        self.fc2 = make_linear(width, width, bias=True, rngs=rngs)

    def __call__(self, features: jax.Array) -> jax.Array:
        return self.fc2(jax.nn.gelu(self.fc1(features), approximate=False))


class ShowO(nnx.Module):
    """The parts and their connections; sampling and losses are in other modules."""

    mm_projector: ClipProjector  # only with `w_clip_vit`
    vision_tower: VisionTower  # only with `clip`

    def __init__(self, config: ShowOConfig, *, rngs: nnx.Rngs):
        self.config = config
        width = config.phi.hidden_size
        self.language_model = Phi(config.phi, rngs=rngs)
        self.lm_head = make_linear(width, config.phi.vocab_size, bias=True, rngs=rngs)
        self.vqmodel = Magvit(config.magvit, rngs=rngs)
        if config.w_clip_vit:
            self.mm_projector = ClipProjector(config.clip_width, config.projector_width, rngs=rngs)
        if config.clip is not None:
            self.vision_tower = VisionTower(config.clip, rngs=rngs)

    def embed_text(self, input_ids: jax.Array) -> jax.Array:
        """Embeds ids [..., T] of the one vocabulary to [..., T, D]."""
        return self.language_model.embed_tokens(input_ids)

    def embed_image_tokens(self, codes: jax.Array) -> jax.Array:
        """Embeds image codes [..., T] to [..., T, D]; code `num_codes` is the mask token."""
        return self.embed_text(codes + self.config.image_offset)

    def embed_pixels(self, pixel_values: jax.Array) -> jax.Array:
        """Embeds normalised pixels [B, S, S, 3] as features of the vision tower, [B, I, D]."""
        return self.mm_projector(self.vision_tower.compute_patches(pixel_values))

    def text_logits(self, hidden: jax.Array) -> jax.Array:
        """Computes float32 logits [..., V] of the whole vocabulary of hidden states [..., D]."""
        return compute_some_logits(self.lm_head, hidden, 0, self.config.phi.vocab_size)

    def image_logits(self, hidden: jax.Array) -> jax.Array:
        """Computes float32 logits [..., num_codes] over image codes of hidden states [..., D]."""
        return self.take_image_head()(hidden)

    def take_image_head(self) -> Callable[[jax.Array], jax.Array]:
        """Returns `image_logits` for a loop, with the columns of the head taken once before it."""
        return take_head(self.lm_head, self.config.image_offset, self.config.num_codes)


def abstract(config: ShowOConfig, dtype: Any = jnp.float32) -> Params:
    """Returns the shapes of all parameters, as a nested dict of ShapeDtypeStruct."""
    return modules.make_abstract(ShowO, config, dtype)


def init(config: ShowOConfig, key: jax.Array, dtype: Any = jnp.float32) -> Params:
    """Returns random parameters: normal(0.02) in transformers, flax's defaults in convolutions."""
    return modules.init_params(ShowO, config, key, dtype)


def bind(config: ShowOConfig, params: Params) -> ShowO:
    """Returns the network with these parameters."""
    return modules.bind(ShowO, config, params)


def cast(params: Params, dtype: Any) -> Params:
    """Returns a copy of the parameters for computing in `dtype`; see `layout.FLOAT32_PARTS`."""
    return params_lib.cast(params, dtype, FLOAT32_PARTS)
