"""Janus and Janus-Pro as a family: the one place where the program meets `policies.janus`."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from corl_jax.models.attention import choose_training_kernel
from corl_jax.models.lora import Lora
from corl_jax.policies import llama_adapters
from corl_jax.policies.family import Adapters, Family, HiddenStates, Limits, TurnProgram
from corl_jax.policies.janus import (
    images,
    layout,
    logprobs,
    network,
    own_images,
    sampling,
    thinking,
)
from corl_jax.policies.janus.checkpoint import KIND
from corl_jax.policies.janus.image_settings import ImageSettings
from corl_jax.policies.janus.network import JanusConfig
from corl_jax.policies.janus.prompts import BUCKET, GENERATE, QUESTION, THINK, Processor
from corl_jax.policies.janus.tokenizer_training import tokenizer_loss
from corl_jax.policies.janus.tokens import SpecialTokens
from corl_jax.tasks import CODES, TEXT
from corl_jax.types import EncodedPrompts, Params


def describe_limits(sizes: JanusConfig) -> Limits:
    """Returns the sizes of a Janus that checks and estimates need."""
    llama = sizes.llama
    return Limits(
        positions=llama.max_position_embeddings,
        image_tokens=sizes.num_image_tokens,
        input_image_tokens=sizes.num_image_tokens,
        input_image_side=sizes.siglip.image_size,
        # 576 tokens -> a grid of 24 x 24 codes -> 24 * 16 = 384 pixels
        image_side=round(math.sqrt(sizes.num_image_tokens)) * sizes.vq.downsample,
        vocab_size=llama.vocab_size,
        layers=llama.num_layers,
        width=llama.hidden_size,
        inner_width=llama.intermediate_size,
        heads=llama.num_heads,
        kv_heads=llama.num_kv_heads,
        head_dim=llama.head_dim,
        sharded_heads={
            "heads of language_model": llama.num_heads,
            "key heads of language_model": llama.num_kv_heads,
            "heads of vision_model": sizes.siglip.num_heads,
        },
    )


@functools.partial(jax.jit, static_argnames=("sizes", "special", "dtype"))
def compute_hidden_states(
    sizes: JanusConfig, params: Params, prompts: EncodedPrompts, special: SpecialTokens, dtype: Any
) -> jax.Array:
    """Computes the last hidden states [B, P, D] float32 of question prompts with their images."""
    model = network.bind(sizes, network.cast(params, dtype))
    assert prompts.pixel_values is not None
    features = model.image_features(prompts.pixel_values)
    embeds = model.prompt_embeds(prompts.input_ids, special.image, features)
    kernel = choose_training_kernel(dtype, sizes.llama.head_dim)
    (hidden,) = model.language_model.read_branches(
        embeds, prompts.attention_mask, (), attention=kernel
    )
    # float32: R_TIM takes cosines of these states, which the released code computes in bfloat16.
    return hidden.astype(jnp.float32)


def _normalise_pixels(processor: Processor, pixels: jax.Array) -> jax.Array:
    return images.normalise_pixels(processor.image, pixels)


def _make_stand_in_image(sizes: JanusConfig) -> ImageSettings:
    # The mean and the standard deviation of every released Janus.
    half = (0.5, 0.5, 0.5)
    return ImageSettings(sizes.siglip.image_size, sizes.num_image_tokens, half, half)


def _get_adapters(sizes: JanusConfig) -> Lora | None:
    return sizes.llama.lora


FAMILY = Family(
    kind=KIND,
    presets=network.PRESETS,
    open_processor=Processor.from_dir,
    stand_in_tokens=SpecialTokens(bos=0, eos=1, pad=2, boi=3, eoi=4, image=5),
    prompt_bucket=BUCKET,
    draws_windows=True,
    trainable=layout.TRAINABLE,
    groups=layout.GROUPS,
    float32_parts=layout.FLOAT32_PARTS,
    tokenizer_parts=layout.TOKENIZER_PARTS,
    adapters=Adapters(
        paths=layout.ADAPTER_PATHS,
        targets=layout.ADAPTER_TARGETS,
        add=llama_adapters.add_adapters,
        remove=llama_adapters.remove_adapters,
        options_of=_get_adapters,
    ),
    limits=describe_limits,
    turns={
        ((CODES,),): TurnProgram(sampling.sample_codes, logprobs.score_codes),
        ((TEXT,),): TurnProgram(
            sampling.sample_answers, logprobs.score_answers, packs_answers=True
        ),
        ((TEXT, CODES),): TurnProgram(thinking.sample_thinking, thinking.score_thinking),
        ((CODES,), (TEXT,)): TurnProgram(
            own_images.sample_own_answers, own_images.score_own_answers, passes_gradients=True
        ),
    },
    prompts=(GENERATE, QUESTION, THINK),
    blank_prompts=sampling.unconditional_ids,
    decode_images=images.decode_images,
    encode_images=images.encode_images,
    hidden_states=HiddenStates(Processor.caption_prompt, compute_hidden_states),
    tokenizer_loss=tokenizer_loss,
    choose_roles=Processor.choose_roles,
    normalise_pixels=_normalise_pixels,
    stand_in_image=_make_stand_in_image,
)
