"""Samples images by drawing their codes in any order, and answers token by token.

The keys and values of a prompt's text are computed once: a text does not see its image. Each step
reads the image behind them, with guidance also behind an empty text. A sample depends on its key
and its prompt only.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from corl_jax.devices.compiling import SamplerProgram
from corl_jax.devices.mesh import constrain, gather_over_fsdp
from corl_jax.models import attention as attentions
from corl_jax.policies.choices import Choice, completion_mask, mark_last_rows
from corl_jax.policies.completions import check_group_size, make_text_draw, sample_until_ended
from corl_jax.policies.decoding import Rows
from corl_jax.policies.family import LogprobOptions, SamplingOptions, Unmasking
from corl_jax.policies.show_o import network
from corl_jax.policies.show_o.answer_decoding import read_question_prompts
from corl_jax.policies.show_o.hiding import count_steps, list_passes, make_replay
from corl_jax.policies.show_o.layout import RULES
from corl_jax.policies.show_o.logprobs import image_logprobs
from corl_jax.policies.show_o.network import ShowO, ShowOConfig
from corl_jax.policies.show_o.reading import (
    IMAGE_ORDERS,
    compute_image_logits,
    embed_questions,
    frame_codes,
    prepare_texts,
    split_image_states,
)
from corl_jax.policies.show_o.tokens import SpecialTokens
from corl_jax.policies.show_o.unmasking import Drawn, Noise, Unmasker, give_noise, make_noise
from corl_jax.tasks import CODES, TEXT
from corl_jax.types import EncodedPrompts, Params, Segment

Known = tuple[jax.Array, jax.Array]
"""Codes [N, M] of images, and [N, M] bool: True where they are given."""


@dataclasses.dataclass(frozen=True)
class Drawing:
    """The static options of drawing images."""

    special: SpecialTokens
    guided: bool
    unmasking: Unmasking
    image_logprobs: str = "conditional"
    greedy: bool = False
    greedy_last: bool = False
    dtype: Any = jnp.bfloat16
    attention: attentions.DecodeKernel = "xla"
    count_unknown: bool = False  # in-painting: the schedule counts the unknown places
    record: bool = False  # every step


def draw_images(
    model: ShowO, prompts: EncodedPrompts, keys: jax.Array, cfg_scale: Any, temperature: Any,
    options: Drawing, known: Known | None = None, noise: Noise | None = None,
) -> Drawn:  # fmt: skip
    """Draws the codes of images; `known` are given ones, `noise` replaces that of the keys."""
    special, attention = options.special, options.attention
    rows = Rows(check_group_size(prompts, keys), options.guided)
    num_places, num_codes = model.config.num_image_tokens, model.config.num_codes
    image_logits = model.take_image_head()
    ids, lengths = prepare_texts(prompts, rows, special)
    _, caches = model.language_model.read_first(
        model.embed_text(ids), lengths, IMAGE_ORDERS[0], attention=attention
    )

    def read(codes: jax.Array) -> tuple[jax.Array, ...]:
        embeds = rows.repeat_samples(model.embed_text(frame_codes(codes, special)))
        hidden = model.language_model.read_second(
            embeds, caches, lengths, IMAGE_ORDERS[1], attention=attention
        )
        return split_image_states(hidden, rows)

    greedy: Any = options.greedy
    if options.greedy_last and not greedy:
        greedy = mark_last_rows(len(keys), rows.group_size)
    unmasker = Unmasker(
        read=read,
        logits_of=lambda states: compute_image_logits(image_logits, states, cfg_scale),
        noise=noise or make_noise(keys, num_places, num_codes),
        num_codes=num_codes,
        steps=count_steps(options.unmasking, num_places),
        temperature=temperature,
        greedy=greedy,
        count_unknown=options.count_unknown,
        record=options.record,
    )
    if known is None:
        codes = constrain(jnp.zeros((len(keys), num_places), jnp.int32), "batch", None)
        known = codes, codes > 0
    return unmasker.draw(*known)


def _run_image_program(
    config: ShowOConfig, params: Params, prompts: EncodedPrompts, keys: jax.Array,
    cfg_scale: jax.Array, temperature: jax.Array, known: Known | None = None,
    noise: tuple[jax.Array, jax.Array] | None = None, *, options: Drawing,
) -> tuple[Drawn, jax.Array | None, dict[str, jax.Array]]:  # fmt: skip
    """Returns what was drawn, the log-probs [N, M] of the recorded form, and the replay."""
    arrays = None if noise is None else give_noise(*noise)
    model = network.bind(config, gather_over_fsdp(network.cast(params, options.dtype), RULES))
    drawn = draw_images(model, prompts, keys, cfg_scale, temperature, options, known, arrays)
    group_size, unmasking = check_group_size(prompts, keys), options.unmasking
    # These numbers stay on the device until the update, two bytes for each code.
    committed_at = drawn.committed_at.astype(jnp.int16)
    replay = make_replay(keys, group_size, committed_at, unmasking)
    if unmasking.logprobs == "none":
        return drawn, None, replay
    segment = Segment(CODES, drawn.codes, jnp.ones(drawn.codes.shape, bool), replay=replay)
    if unmasking.logprobs == "trajectory":
        scored = list_passes(segment, unmasking)[1].any(axis=0)
        logprobs = drawn.guided if scores_guided(options) else drawn.conditional
        return drawn, jnp.where(scored, logprobs, 0.0), replay
    # One more pass, as the update makes it: so the two can be compared.
    scoring: Any = LogprobOptions(
        options.special, image_logprobs="guided" if scores_guided(options) else "conditional",
        remat="none", attention=options.attention, unmasking=unmasking,
    )  # fmt: skip
    scoring = dataclasses.replace(scoring, temperature=temperature, cfg_scale=cfg_scale)
    return drawn, image_logprobs(model, prompts, segment, scoring)[0], replay


def scores_guided(options: Drawing) -> bool:
    """Returns whether the recorded log-probs are those of guidance; at scale 1 it has no rows."""
    return options.guided and options.image_logprobs == "guided"


image_program = SamplerProgram(_run_image_program, static_argnames=("config", "options"))


def sample_codes(
    sizes: ShowOConfig, params: Params, prompts: EncodedPrompts, keys: jax.Array,
    options: SamplingOptions, known: Known | None = None,
) -> tuple[Segment, ...]:  # fmt: skip
    """Samples `len(keys) / B` images per prompt as codes [N, M]; `known` are given codes.

    `image_logprobs` names the distribution of the recorded log-probs, of the form that
    `unmasking` names. `cfg_scale` 1 has no unconditional rows.
    """
    drawing = make_drawing(sizes, options)
    program = image_program.choose_build(len(keys) * (1 + drawing.guided), params, prompts, keys)
    # Scale and temperature are traced, so that another value compiles nothing; whether there is
    # guidance decides the shapes.
    drawn, logprobs, replay = program(
        sizes, params, prompts, keys, jnp.float32(options.cfg_scale),
        jnp.float32(options.temperature), known, options=drawing,
    )  # fmt: skip
    return (make_code_segment(drawn.codes, logprobs, replay),)


def make_drawing(sizes: ShowOConfig, options: SamplingOptions) -> Drawing:
    """Returns the static options of drawing."""
    return Drawing(
        special=options.special, guided=options.cfg_scale != 1.0, unmasking=options.unmasking,
        image_logprobs=options.image_logprobs, greedy=options.greedy,
        greedy_last=options.greedy_last, dtype=options.dtype,
        attention=choose_kernel(sizes, options), count_unknown=options.unmasking.count_unknown,
    )  # fmt: skip


def make_code_segment(
    codes: jax.Array, logprobs: jax.Array | None, replay: dict[str, jax.Array]
) -> Segment:
    """Returns the segment of images, which always have all their codes."""
    return Segment(CODES, codes, jnp.ones(codes.shape, bool), logprobs, replay)


def choose_kernel(sizes: ShowOConfig, options: SamplingOptions) -> attentions.DecodeKernel:
    """Returns the attention kernel of sampling."""
    if options.attention != "auto":
        return options.attention
    return attentions.choose_decode_kernel(options.dtype, sizes.phi.head_dim)


# ---- answers


@dataclasses.dataclass(frozen=True)
class Answering:
    """The static options of answers."""

    special: SpecialTokens
    max_new_tokens: int
    top_k: int
    top_p: float
    greedy: bool
    greedy_last: bool
    dtype: Any
    attention: attentions.DecodeKernel


def _run_text_program(
    config: ShowOConfig, params: Params, prompts: EncodedPrompts, keys: jax.Array,
    temperature: jax.Array, *, options: Answering,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """Returns tokens, their mask and their log-probs, each [N, T]."""
    cast = network.cast(params, options.dtype)
    model = network.bind(config, gather_over_fsdp(cast, RULES, layers=True))
    special, most = options.special, options.max_new_tokens
    rows = Rows(check_group_size(prompts, keys))
    embeds, is_seen = embed_questions(model, prompts, special)
    is_real = jnp.asarray(prompts.input_ids) != special.pad
    decoder, last = read_question_prompts(
        model.language_model, embeds, is_real, is_seen, options.attention
    )
    greedy_last = rows.group_size if options.greedy_last else 0
    choice = Choice(temperature, options.greedy, options.top_k, options.top_p, greedy_last)
    draw = make_text_draw(model, choice, keys, special.eos)
    # One token comes from the prefill.
    state = sample_until_ended(model, decoder, draw, rows.fan_out(last), most - 1, special.eos)
    tokens, logprobs = (x[:, :most] for x in (state.tokens, state.logprobs))
    return tokens, completion_mask(tokens, state.step, special.eos), logprobs


text_program = SamplerProgram(_run_text_program, static_argnames=("config", "options"))


def sample_answers(
    sizes: ShowOConfig, params: Params, prompts: EncodedPrompts, keys: jax.Array,
    options: SamplingOptions,
) -> tuple[Segment, ...]:  # fmt: skip
    """Samples `len(keys) / B` answers per question; stops soon after all rows have ended.

    Tokens after the end of a row are EOS and masked out.
    """
    program = text_program.choose_build(len(keys), params, prompts, keys)
    tokens, mask, logprobs = program(
        sizes, params, prompts, keys, jnp.float32(options.temperature),
        options=make_answering(sizes, options),
    )  # fmt: skip
    return (Segment(TEXT, tokens, mask, logprobs),)


def make_answering(sizes: ShowOConfig, options: SamplingOptions) -> Answering:
    """Returns the static options of answers."""
    return Answering(
        special=options.special, max_new_tokens=options.max_new_tokens, top_k=options.top_k,
        top_p=options.top_p, greedy=options.greedy, greedy_last=options.greedy_last,
        dtype=options.dtype, attention=choose_kernel(sizes, options),
    )  # fmt: skip
