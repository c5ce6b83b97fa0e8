"""JanusFlow as a family: the one place where the program meets `policies.janus_flow`."""

from __future__ import annotations

import jax

from corl_jax.models.lora import Lora
from corl_jax.policies import llama_adapters
from corl_jax.policies.denoising import measure_kl
from corl_jax.policies.family import Adapters, Alignment, Family, Limits, TurnProgram
from corl_jax.policies.janus.image_settings import ImageSettings
from corl_jax.policies.janus.images import normalise_pixels
from corl_jax.policies.janus.tokens import SpecialTokens
from corl_jax.policies.janus_flow import images, layout, logprobs, network, sampling, thinking
from corl_jax.policies.janus_flow.checkpoint import KIND
from corl_jax.policies.janus_flow.network import JanusFlowConfig
from corl_jax.policies.janus_flow.prompts import BUCKET, PROMPTS, Processor
from corl_jax.policies.janus_flow.tokenizer_training import tokenizer_loss
from corl_jax.tasks import CODES, TEXT


def describe_limits(sizes: JanusFlowConfig) -> Limits:
    """Returns the sizes of a JanusFlow that checks and estimates need."""
    llama = sizes.llama
    return Limits(
        positions=llama.max_position_embeddings,
        image_tokens=sizes.num_image_tokens + 1,  # and that of the time
        input_image_tokens=sizes.num_image_tokens + 1,  # and the embedding in the place of BOI
        input_image_side=sizes.siglip.image_size,
        # 48 x 48 latents of 8 x 8 pixels -> 384 pixels
        image_side=sizes.latent_shape[0] * sizes.vae.downsample,
        vocab_size=llama.vocab_size,
        layers=llama.num_layers,
        width=llama.hidden_size,
        inner_width=llama.intermediate_size,
        heads=llama.num_heads,
        kv_heads=llama.num_kv_heads,
        head_dim=llama.head_dim,
        caches_codes=False,
        has_begin_token=False,  # that of the time is a token of the image
        latent_tokens=sizes.num_image_tokens,
        sharded_heads={
            "heads of language_model": llama.num_heads,
            "key heads of language_model": llama.num_kv_heads,
            "heads of vision_model": sizes.siglip.num_heads,
        },
    )


def _normalise_pixels(processor: Processor, pixels: jax.Array) -> jax.Array:
    return normalise_pixels(processor.image, pixels)


def _make_stand_in_image(sizes: JanusFlowConfig) -> ImageSettings:
    half = (0.5, 0.5, 0.5)
    return ImageSettings(sizes.siglip.image_size, sizes.num_image_tokens, half, half)


def _get_adapters(sizes: JanusFlowConfig) -> Lora | None:
    return sizes.llama.lora


FAMILY = Family(
    kind=KIND,
    presets=network.PRESETS,
    open_processor=Processor.from_dir,
    stand_in_tokens=SpecialTokens(bos=0, eos=1, pad=2, boi=3, eoi=4, image=5),
    prompt_bucket=BUCKET,
    trainable=layout.TRAINABLE,
    groups=layout.GROUPS,
    float32_parts=layout.FLOAT32_PARTS,
    tokenizer_parts=layout.TOKENIZER_PARTS,
    adapters=Adapters(
        paths=layout.ADAPTER_PATHS,
        targets=layout.ADAPTER_TARGETS,
        add=llama_adapters.add_adapters,
        remove=network.get_base,
        options_of=_get_adapters,
    ),
    alignment=Alignment(
        layout.ALIGNMENT_PATHS, network.add_alignment, network.init_alignment_projector
    ),
    limits=describe_limits,
    turns={
        ((CODES,),): TurnProgram(
            sampling.sample_latents, logprobs.score_steps, measure_kl=measure_kl
        ),
        ((TEXT,),): TurnProgram(
            sampling.sample_answers, logprobs.score_answers, packs_answers=True
        ),
        ((TEXT, CODES),): TurnProgram(
            thinking.sample_thinking, thinking.score_thinking, measure_kl=measure_kl
        ),
    },
    prompts=PROMPTS,
    denoises=True,
    defaults={"cfg_scale": 2.0},  # of its own code
    blank_prompts=network.blank_ids,
    decode_images=images.decode_images,
    encode_images=images.encode_images,
    normalise_pixels=_normalise_pixels,
    stand_in_image=_make_stand_in_image,
    tokenizer_loss=tokenizer_loss,
)
