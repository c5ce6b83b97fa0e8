"""Show-o as a family: the one place where the program meets `policies.show_o`."""

from __future__ import annotations

from pathlib import Path

import jax

from corl_jax.models.lora import Lora
from corl_jax.policies.family import Adapters, Family, Inpainting, Limits, TurnProgram, Unmasking
from corl_jax.policies.show_o import (
    images,
    inpainting,
    layout,
    logprobs,
    network,
    own_images,
    prompts,
    reading,
    sampling,
)
from corl_jax.policies.show_o.checkpoint import KIND, describe_missing_tower, find_tokenizer
from corl_jax.policies.show_o.checkpoint.show_o_keys import CLIP_FOLDER, CLIP_HUB_ID
from corl_jax.policies.show_o.hiding import choose_scored, count_steps
from corl_jax.policies.show_o.network import ShowOConfig
from corl_jax.policies.show_o.prompts import (
    BUCKET,
    GENERATE,
    MAX_TEXT,
    PLAIN_TEXT,
    QUESTION,
    ImageSettings,
    Processor,
)
from corl_jax.policies.show_o.tokenizer_training import tokenizer_loss
from corl_jax.policies.show_o.tokens import make_special_tokens
from corl_jax.tasks import CODES, TEXT, Task
from corl_jax.weights.checkpoint import load_config


def describe_limits(sizes: ShowOConfig) -> Limits:
    """Returns the sizes of a Show-o that checks and estimates need."""
    phi, image, clip = sizes.phi, describe_image(sizes), sizes.clip
    return Limits(
        positions=phi.max_position_embeddings,
        image_tokens=sizes.num_image_tokens,
        input_image_tokens=image.num_tokens,
        input_image_side=image.side,
        image_side=sizes.image_side,
        vocab_size=phi.vocab_size,
        layers=phi.num_layers,
        width=phi.hidden_size,
        inner_width=phi.intermediate_size,
        heads=phi.num_heads,
        kv_heads=phi.num_kv_heads,
        head_dim=phi.head_dim,
        caches_codes=False,
        image_prompt=MAX_TEXT + 1,  # and its end token
        unmasking_steps=count_steps(Unmasking(), sizes.num_image_tokens),
        sharded_heads={
            "heads of language_model": phi.num_heads,
            "key heads of language_model": phi.num_kv_heads,
            **({} if clip is None else {"heads of vision_tower": clip.vision.num_heads}),
        },
    )


def describe_image(sizes: ShowOConfig) -> ImageSettings:
    """Returns the sizes of an image in a question."""
    clip = sizes.clip
    if clip is None:
        return ImageSettings(sizes.image_side, sizes.num_image_tokens)
    return ImageSettings(clip.image_size, clip.num_patches, clip)


def find_size_lack(sizes: ShowOConfig, task: Task) -> str | None:
    """Returns what a model of these sizes lacks for a task."""
    prompts = [turn.prompt for turn in task.turns]
    if not sizes.w_clip_vit or QUESTION not in prompts:
        return None
    if len(prompts) > 1:
        return (
            "asks about the codes of the model's own images, and this model (w_clip_vit) reads "
            "CLIP's features of images"
        )
    if sizes.clip is None:
        return (
            "asks about images, which this model (w_clip_vit) reads by a vision tower that its "
            f"folder lacks: put {CLIP_HUB_ID} there as {CLIP_FOLDER}"
        )
    return None


def open_processor(folder: Path) -> Processor:
    """Opens the processor of a checkpoint.

    Raises:
        InputError: a config or a tokenizer that cannot be used.
    """
    sizes = load_config(folder, KIND)
    special = make_special_tokens(sizes.llm_vocab_size, sizes.num_codes)
    lacks_tower = sizes.w_clip_vit and sizes.clip is None
    return Processor(
        find_tokenizer(folder), special, describe_image(sizes),
        refusal=describe_missing_tower(folder) if lacks_tower else None,
    )  # fmt: skip


def _normalise_pixels(processor: Processor, pixels: jax.Array) -> jax.Array:
    return prompts.normalise_pixels(pixels, processor.image)


def _get_adapters(sizes: ShowOConfig) -> Lora | None:
    return sizes.phi.lora


def _reads_codes(sizes: ShowOConfig) -> bool:
    # A model with CLIP's tower reads the features of pixels.
    return not sizes.w_clip_vit


FAMILY = Family(
    kind=KIND,
    presets=network.PRESETS,
    open_processor=open_processor,
    stand_in_tokens=make_special_tokens(50295, 8192),
    prompt_bucket=BUCKET,
    trainable=layout.TRAINABLE,
    groups=layout.GROUPS,
    undecayed=layout.UNDECAYED,
    float32_parts=layout.FLOAT32_PARTS,
    tokenizer_parts=layout.TOKENIZER_PARTS,
    adapters=Adapters(
        paths=layout.ADAPTER_PATHS,
        targets=layout.ADAPTER_TARGETS,
        add=network.add_adapters,
        remove=network.remove_adapters,
        options_of=_get_adapters,
    ),
    limits=describe_limits,
    turns={
        ((CODES,),): TurnProgram(
            sampling.sample_codes, logprobs.score_codes, choose_scored=choose_scored
        ),
        ((TEXT,),): TurnProgram(
            sampling.sample_answers, logprobs.score_answers, choose_scored=choose_scored
        ),
        ((CODES,), (TEXT,)): TurnProgram(
            own_images.sample_own_answers, own_images.score_own_answers,
            passes_gradients=True, choose_scored=choose_scored,
        ),
    },
    prompts=(GENERATE, QUESTION, PLAIN_TEXT),
    blank_prompts=reading.blank_ids,
    decode_images=images.decode_images,
    encode_images=images.encode_images,
    place_codes=reading.place_codes,
    reads_codes=_reads_codes,
    tokenizer_loss=tokenizer_loss,
    normalise_pixels=_normalise_pixels,
    stand_in_image=describe_image,
    find_size_lack=find_size_lack,
    fit_pixels=prompts.fit_pixels,
    inpainting=Inpainting(inpainting.cut_given_image, inpainting.bind_given_image),
)  # fmt: skip
