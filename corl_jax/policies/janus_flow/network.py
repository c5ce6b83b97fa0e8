"""JanusFlow: one language model that reads images through SigLIP and draws by a rectified flow.

Latents of the image tokenizer are drawn by integrating a velocity, for which the language model
reads the noisy latents behind the prompt. Everywhere in this package the time t is 1 for noise and
0 for data, and the velocity is noise - data. The released network counts the other way; both are
converted here.

Source: Ma et al. 2024 (JanusFlow, arXiv 2411.07975); deepseek-ai/Janus, `janus/janusflow`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from corl_jax import params as params_lib
from corl_jax.models import modules
from corl_jax.models.attention import AttentionKernel
from corl_jax.models.layers import Remat, make_linear
from corl_jax.models.llama import Branch, KVCache, Llama, LlamaConfig
from corl_jax.models.sd_vae import SdVae, SdVaeConfig
from corl_jax.models.siglip import Siglip, SiglipConfig
from corl_jax.models.uvit import Decoder, Encoder, UvitConfig
from corl_jax.policies.janus.tokens import SpecialTokens
from corl_jax.policies.janus_flow.layout import FLOAT32_PARTS
from corl_jax.policies.llama_adapters import remove_adapters
from corl_jax.types import EncodedPrompts, Params

TIME_SCALE = 1000.0  # the time embedding reads 0 to 1000


@dataclasses.dataclass(frozen=True)
class JanusFlowConfig:
    """Sizes of all parts; the defaults are JanusFlow-1.3B's."""

    llama: LlamaConfig = dataclasses.field(default_factory=LlamaConfig)
    siglip: SiglipConfig = dataclasses.field(default_factory=SiglipConfig)
    uvit: UvitConfig = dataclasses.field(default_factory=UvitConfig)
    vae: SdVaeConfig = dataclasses.field(default_factory=SdVaeConfig)

    # A class variable, so that checkpoints do not state it; see AlignedConfig.
    is_aligned: ClassVar[bool] = False

    @property
    def num_image_tokens(self) -> int:
        """The number of tokens of an image, in a prompt or drawn: both have the same grid."""
        return self.siglip.num_tokens

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the latents of an image."""
        # 576 tokens -> a grid of 24 x 24 patches -> 48 x 48 latents
        side = math.isqrt(self.num_image_tokens) * self.uvit.patch_size
        return side, side, self.uvit.latent_channels

    @property
    def aligned_layer(self) -> int:
        """The number of layers whose states are aligned with the image encoder."""
        # The paper's 6 of 24.
        return max(self.llama.num_layers // 4, 1)


@dataclasses.dataclass(frozen=True)
class AlignedConfig(JanusFlowConfig):
    """A JanusFlow in training whose states are aligned with its image encoder."""

    is_aligned: bool = True  # pyright: ignore[reportIncompatibleVariableOverride]


def add_alignment(config: JanusFlowConfig) -> JanusFlowConfig:
    """Returns the sizes with the projector of the alignment."""
    parts = {f.name: getattr(config, f.name) for f in dataclasses.fields(JanusFlowConfig)}
    return AlignedConfig(**parts)


def get_base(config: JanusFlowConfig) -> JanusFlowConfig:
    """Returns the sizes of the checkpoint: without adapters and without the alignment."""
    # The plain class again, so that these sizes equal those of a model that never had them.
    parts = {f.name: getattr(config, f.name) for f in dataclasses.fields(JanusFlowConfig)}
    return remove_adapters(JanusFlowConfig(**parts))


PRESETS = {"janusflow-1.3b": JanusFlowConfig()}


def blank_ids(input_ids: jax.Array, special: SpecialTokens) -> jax.Array:
    """Returns the ids [B, P] of prompts without their text: only BOS stays."""
    return jnp.where(input_ids == special.bos, input_ids, special.pad)


class Prefix(NamedTuple):
    """What the tokens of an image follow: B prompts, then plans, if there are any."""

    embeds: jax.Array  # [B, P, D], padded on the left
    mask: jax.Array  # [B, P] bool, True on real tokens
    # [M] int32 positions of the first token of an image; M divides the number of images
    first: jax.Array
    plans: tuple[Branch, ...] = ()  # texts between prompts and images: none, or one branch

    @property
    def joint_mask(self) -> jax.Array:
        """The mask [B, P] of the prompts, or [N, P + T] with their plans behind them."""
        mask = self.mask
        for plan in self.plans:
            mask = plan.join_mask(mask)
        return mask


class AlignmentProjector(nnx.Module):
    """Three linear layers from states of the language model to features of the image encoder.

    Source: REPA (arXiv 2410.06940), `build_mlp` of its code; JanusFlow has three layers as well.
    """

    def __init__(self, config: JanusFlowConfig, *, rngs: nnx.Rngs):
        width = config.llama.hidden_size
        self.fc1 = make_linear(width, width, bias=True, rngs=rngs)
        self.fc2 = make_linear(width, width, bias=True, rngs=rngs)
        self.fc3 = make_linear(width, config.siglip.hidden_size, bias=True, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc3(jax.nn.silu(self.fc2(jax.nn.silu(self.fc1(x)))))


class JanusFlow(nnx.Module):
    """The parts and their connections; sampling and losses are in other modules."""

    def __init__(self, config: JanusFlowConfig, *, rngs: nnx.Rngs):
        width, uvit = config.llama.hidden_size, config.uvit
        self.language_model = Llama(config.llama, rngs=rngs)
        self.lm_head = make_linear(width, config.llama.vocab_size, bias=False, rngs=rngs)
        self.vision_model = Siglip(config.siglip, rngs=rngs)
        self.aligner = make_linear(config.siglip.hidden_size, width, bias=True, rngs=rngs)
        self.begin_embedding = nnx.Param(jnp.zeros((1, width)))
        self.generation_encoder = Encoder(uvit, width, rngs=rngs)
        self.generation_aligner = make_linear(uvit.encoder_width, width, bias=True, rngs=rngs)
        self.generation_norm = nnx.RMSNorm(width, epsilon=config.llama.rms_norm_eps, rngs=rngs)
        self.generation_projection = make_linear(width, uvit.decoder_width, bias=True, rngs=rngs)
        self.generation_decoder = Decoder(uvit, width, rngs=rngs)
        self.vae = SdVae(config.vae, rngs=rngs)
        if config.is_aligned:
            self.alignment_projector = AlignmentProjector(config, rngs=rngs)

    # ---- text and images in prompts

    def embed_text(self, input_ids: jax.Array) -> jax.Array:
        """Embeds ids [..., T] to [..., T, D]."""
        return self.language_model.embed_tokens(input_ids)

    def image_features(self, pixel_values: jax.Array, *, remat: Remat = "none") -> jax.Array:
        """Computes features [B, image tokens + 1, D] of normalised pixels [B, S, S, 3].

        The first is the learned embedding that stands in the place of BOI. Of I images a prompt,
        [B, I, S, S, 3], the features [B, I * (image tokens + 1), D] are in order.
        """
        batch, pixels = len(pixel_values), pixel_values
        if pixels.ndim == 5:
            pixels = pixels.reshape(-1, *pixels.shape[2:])
        features = self.aligner(self.vision_model(pixels, remat=remat))
        # The original trains all but this embedding with the gradient of an answer.
        begin = jax.lax.stop_gradient(self.begin_embedding[...]).astype(features.dtype)
        begin = jnp.broadcast_to(begin, (len(features), *begin.shape))
        features = jnp.concatenate([begin, features], axis=1)
        # [B * I, T + 1, D] -> [B, I * (T + 1), D]
        return features.reshape(batch, -1, features.shape[-1])

    def prompt_embeds(
        self, input_ids: jax.Array, special: SpecialTokens, image_features: jax.Array | None = None
    ) -> jax.Array:
        """Embeds ids [B, P] to [B, P, D]; image features replace BOI and all image tokens."""
        embeds = self.embed_text(input_ids)
        if image_features is None:
            return embeds
        is_image = (input_ids == special.image) | (input_ids == special.boi)
        # ids [t, BOI, I, I, EOI] -> cumsum - 1 = [-1, 0, 1, 2, 2]: BOI takes feature 0. Values at
        # text positions are not used; the clip keeps them in range.
        order = jnp.clip(jnp.cumsum(is_image, axis=-1) - 1, 0, image_features.shape[1] - 1)
        placed = jnp.take_along_axis(image_features, order[..., None], axis=1)
        return jnp.where(is_image[..., None], placed.astype(embeds.dtype), embeds)

    def text_logits(self, hidden: jax.Array) -> jax.Array:
        """Computes text logits [..., V] of hidden states [..., D]."""
        return self.lm_head(hidden)

    def embed_question(
        self, prompts: EncodedPrompts, special: SpecialTokens, *, remat: Remat = "none"
    ) -> jax.Array:
        """Embeds the ids of prompts with their images to [B, P, D]."""
        pixels = prompts.pixel_values
        features = None if pixels is None else self.image_features(pixels, remat=remat)
        return self.prompt_embeds(prompts.input_ids, special, features)

    # ---- the velocity of latents

    def make_prefix(self, prompts: EncodedPrompts, special: SpecialTokens) -> Prefix:
        """Returns the prefix of images that follow these prompts, which end before the image.

        Tokens that `blank_ids` has replaced are hidden, but positions count them.
        """
        ids, mask = jnp.asarray(prompts.input_ids), jnp.asarray(prompts.attention_mask)
        seen = mask & (ids != special.pad)
        return Prefix(self.embed_text(ids), seen, mask.sum(axis=-1, dtype=jnp.int32))

    def make_plan_prefix(
        self, prompts: EncodedPrompts, plans: jax.Array, lengths: jax.Array, special: SpecialTokens
    ) -> Prefix:
        """Returns the prefix of images behind plans [N, T] of `lengths` [N] tokens each."""
        prefix = self.make_prefix(prompts, special)
        branch = Branch(self.embed_text(plans), jnp.arange(plans.shape[1]) < lengths[:, None])
        branch = branch.make_even()
        # The image follows the last token of its plan: no position is left out between them.
        first = jnp.repeat(prefix.first, len(plans) // len(prefix.first)) + lengths
        return prefix._replace(first=first, plans=(branch,))

    def make_blank_prefix(self, first: jax.Array, special: SpecialTokens) -> Prefix:
        """Returns the prefix of guidance's other branch: BOS, and hidden tokens that still count.

        `first` [M] are the positions of the images in the conditional branch.
        """
        # A prompt of 5 tokens: BOS has position 0, and the image begins at position 5, not 1. The
        # pad makes an even length, which cuDNN needs for gradients. One row for all images would
        # do, but a mesh splits rows as those of the prompts.
        shape = len(first), 2
        ids = jnp.broadcast_to(jnp.array([special.pad, special.bos]), shape)
        seen = jnp.broadcast_to(jnp.array([False, True]), shape)
        return Prefix(self.embed_text(ids), seen, first)

    def velocity(
        self,
        latents: jax.Array,
        times: jax.Array,
        prefix: Prefix,
        *,
        remat: Remat = "none",
        attention: AttentionKernel = "xla",
    ) -> jax.Array:
        """Computes the velocity noise - data [N, h, w, C] float32 of latents [N, h, w, C].

        `times` [N] are 1 for noise and 0 for data. N is a multiple of the prompts, and rows of the
        same prompt are neighbours: each prompt is read once for its images at all their times.
        """
        return self.read_images(latents, times, prefix, remat=remat, attention=attention)[-1]

    def read_images(
        self,
        latents: jax.Array,
        times: jax.Array,
        prefix: Prefix,
        *,
        remat: Remat = "none",
        attention: AttentionKernel = "xla",
    ) -> list[jax.Array]:
        """Computes the hidden states of prompts and of plans, and the `velocity` of images."""
        tokens, skip, condition = self._read_latents(latents, times, remat)
        branches = (*prefix.plans, Branch(tokens, first=prefix.first))
        *states, hidden = self.language_model.read_branches(
            prefix.embeds, prefix.mask, branches, remat=remat, attention=attention
        )
        return [*states, self._make_velocity(hidden, skip, condition, remat)]

    def project_images(
        self,
        latents: jax.Array,
        times: jax.Array,
        prefix: Prefix,
        layer: int,
        *,
        remat: Remat = "none",
        attention: AttentionKernel = "xla",
    ) -> tuple[jax.Array, jax.Array]:
        """Computes the `velocity` of images, and their states [N, image tokens, C] of a layer.

        The states are projected to the width of the image encoder's features.
        """
        tokens, skip, condition = self._read_latents(latents, times, remat)
        *_, hidden, states = self.language_model.read_branches(
            prefix.embeds, prefix.mask, (Branch(tokens, first=prefix.first),), inner=layer,
            remat=remat, attention=attention,
        )  # fmt: skip
        # The state of the time's token belongs to no place of the image.
        projected = self.alignment_projector(states[:, 1:])
        return self._make_velocity(hidden, skip, condition, remat), projected

    def prefill(self, prefix: Prefix) -> KVCache:
        """Computes the keys and values [L, B, P, kv_heads, head_dim] of a prefix.

        They are the same at all times, because no token sees the image behind it. With plans they
        are [L, N, P + T, ...].
        """
        mask, caches = prefix.mask, self.language_model.prefill(prefix.embeds, prefix.mask)[1]
        for plan in prefix.plans:
            caches = self.language_model.extend_caches(caches, mask, plan)
            mask = plan.join_mask(mask)
        return caches

    def velocity_after(
        self,
        latents: jax.Array,
        times: jax.Array,
        prefix: Prefix,
        caches: KVCache,
        *,
        attention: AttentionKernel = "xla",
    ) -> jax.Array:
        """Computes the same as `velocity`, with the `caches` of `prefill`."""
        tokens, skip, condition = self._read_latents(latents, times, "none")
        hidden = self.language_model.after_caches(
            caches, prefix.joint_mask, Branch(tokens, first=prefix.first), attention=attention
        )
        return self._make_velocity(hidden, skip, condition, "none")

    def _read_latents(
        self, latents: jax.Array, times: jax.Array, remat: Remat
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns tokens [N, 1 + image tokens, D], the map of the patches, and the condition."""
        # The released time u is 0 for noise: u = 1 - t.
        skip, condition = self.generation_encoder(
            latents, TIME_SCALE * (1 - times.astype(jnp.float32)), remat=remat
        )
        # [N, H, W, C] -> [N, H * W, C], row by row
        patches = self.generation_aligner(skip.reshape(len(skip), -1, skip.shape[-1]))
        return jnp.concatenate([condition[:, None], patches], axis=1), skip, condition

    def _make_velocity(
        self, hidden: jax.Array, skip: jax.Array, condition: jax.Array, remat: Remat
    ) -> jax.Array:
        # The state of the time's token is not used.
        x = self.generation_projection(self.generation_norm(hidden[:, 1:]))
        x = x.reshape(*skip.shape[:-1], -1)
        # The released velocity points from noise to data.
        return -self.generation_decoder(x, skip, condition, remat=remat).astype(jnp.float32)


def abstract(config: JanusFlowConfig, dtype: Any = jnp.float32) -> Params:
    """Returns the shapes of all parameters, as a nested dict of ShapeDtypeStruct."""
    return modules.make_abstract(JanusFlow, config, dtype)


def init(config: JanusFlowConfig, key: jax.Array, dtype: Any = jnp.float32) -> Params:
    """Returns random parameters: normal(0.02) in transformers, flax's defaults in convolutions."""
    return modules.init_params(JanusFlow, config, key, dtype)


def init_alignment_projector(config: JanusFlowConfig, key: jax.Array) -> Params:
    """Returns random parameters of the projector of the alignment."""
    return {"alignment_projector": modules.init_params(AlignmentProjector, config, key)}


def bind(config: JanusFlowConfig, params: Params) -> JanusFlow:
    """Returns the network with these parameters."""
    return modules.bind(JanusFlow, config, params)


def cast(params: Params, dtype: Any) -> Params:
    """Returns a copy of the parameters for computing in `dtype`; see `layout.FLOAT32_PARTS`."""
    return params_lib.cast(params, dtype, FLOAT32_PARTS)
