"""Samples and scores turns that think first: a text, the plan, and then an image.

The context is the prompt, the plan without its end token, BOI and the image codes. Everything is
read once into one cache. The places behind a short plan are not left empty: BOI and the codes
follow the plan's last token directly, in the cache and in positions. So an image depends on its
prompt, its plan and its key, and on no other length.

The unconditional row of guidance reads the same context by Janus's rule for prompts: every id but
BOS and BOI becomes padding, and so does every token of the plan. So it knows how long prompt and
plan are, and not a word of them.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from corl_jax.devices.compiling import SamplerProgram
from corl_jax.devices.mesh import gather_over_fsdp
from corl_jax.models import attention as attentions
from corl_jax.models.llama import KVCache
from corl_jax.policies.causal_answers import compute_scoring_states
from corl_jax.policies.choices import Choice, completion_mask
from corl_jax.policies.chunked_logprobs import chunked_logprobs
from corl_jax.policies.completions import (
    check_group_size,
    count_plan_tokens,
    fold_image_keys,
    make_text_draw,
    sample_until_ended,
)
from corl_jax.policies.decoding import Rows, prefill, read_prompts
from corl_jax.policies.family import LogprobOptions, SamplingOptions
from corl_jax.policies.janus import network
from corl_jax.policies.janus.layout import RULES
from corl_jax.policies.janus.logprobs import score_code_states
from corl_jax.policies.janus.network import Janus, JanusConfig
from corl_jax.policies.janus.sampling import (
    choose_kernel,
    make_code_draw,
    make_code_reader,
    sample_all_codes,
    unconditional_ids,
)
from corl_jax.policies.janus.tokens import SpecialTokens
from corl_jax.tasks import CODES, TEXT
from corl_jax.types import EncodedPrompts, Params, Segment

# ---- sampling


@functools.partial(
    SamplerProgram,
    static_argnames=(
        "config", "special", "max_new_tokens", "top_k", "top_p", "guided", "image_logprobs",
        "greedy", "with_greedy", "window", "dtype", "attention",
    ),
)  # fmt: skip
def _think_program(
    config: JanusConfig,
    params: Params,
    prompts: EncodedPrompts,
    keys: jax.Array,
    cfg_scale: jax.Array,
    temperature: jax.Array,
    *,
    special: SpecialTokens,
    max_new_tokens: int,
    top_k: int,
    top_p: float,
    guided: bool,
    image_logprobs: str,
    greedy: bool,
    with_greedy: bool = False,
    window: int = 1,
    dtype: Any,
    attention: attentions.DecodeKernel,
) -> tuple[jax.Array, ...]:
    model = network.bind(config, gather_over_fsdp(network.cast(params, dtype), RULES))
    rows = Rows(check_group_size(prompts, keys), guided)
    embeds = model.embed_text(prompts.input_ids)
    decoder, last = read_prompts(model.language_model, embeds, prompts.attention_mask, attention)
    greedy_last = rows.group_size if with_greedy else 0
    choice = Choice(temperature, greedy, top_k, top_p, greedy_last)
    draw_text = make_text_draw(model, choice, keys, special.eos)
    # A step more than an answer has: the last token of a plan that was cut is read as well.
    state = sample_until_ended(
        model, decoder, draw_text, rows.fan_out(last), max_new_tokens, special.eos
    )
    plan, logprobs = (x[:, :max_new_tokens] for x in (state.tokens, state.logprobs))
    code_keys = fold_image_keys(keys)
    code_choice = Choice(temperature, greedy, greedy_last=greedy_last)
    draw_code = make_code_draw(model, rows, code_choice, code_keys, cfg_scale, image_logprobs)
    length = config.num_image_tokens
    caches = decoder.make_room(state.caches, max_new_tokens, length + window - 1)
    if guided:
        padded = _read_padding(model, prompts, max_new_tokens, special)
        decoder, caches = decoder.add_unconditional(rows, caches, padded)
    # Plans of 2 and 4 tokens: BOI is token 2 and 4 of the completion, code t is token 3 + t and
    # 5 + t. What the cache has there of the steps after a plan's end is written over.
    start = rows.repeat_samples(count_plan_tokens(plan, special.eos))
    begin = model.embed_text(jnp.full(start.shape, special.boi))
    hidden, caches = decoder(begin, start, caches)
    read = make_code_reader(model, rows, decoder, start + 1, window)
    codes = sample_all_codes(draw_code, read, hidden, length, caches, window)
    mask = completion_mask(plan, state.step, special.eos)
    return plan, mask, logprobs, *codes


def _read_padding(
    model: Janus, prompts: EncodedPrompts, length: int, special: SpecialTokens
) -> list[KVCache]:
    """Reads the unconditional prompts with `length` tokens of padding behind them."""
    # All plans of a prompt are the same padding, and an early token does not know the later ones.
    # So one pass over the longest serves all completions, of any lengths; to decode the padding
    # beside the plans would double the rows of each step.
    blank = unconditional_ids(prompts.input_ids, special)
    ids = jnp.pad(blank, ((0, 0), (0, length)), constant_values=special.pad)
    mask = jnp.pad(prompts.attention_mask, ((0, 0), (0, length)), constant_values=True)
    return prefill(model.language_model, model.embed_text(ids), mask)[0]


def sample_thinking(
    sizes: JanusConfig, params: Params, prompts: EncodedPrompts, keys: jax.Array,
    options: SamplingOptions,
) -> tuple[Segment, ...]:  # fmt: skip
    """Samples a plan and the codes of its image for each key.

    A plan ends with EOS, or is cut after `max_new_tokens`. Tokens after its end are EOS and masked
    out. Guidance, its scale 1 and `image_logprobs` are as in `sampling.sample_images`; they do not
    change plans.
    """
    guided = options.cfg_scale != 1.0
    # A pass reads a window of codes in each row.
    rows = len(keys) * (1 + guided) * options.image_window
    program = _think_program.choose_build(rows, params, prompts, keys)
    plan, mask, logprobs, codes, code_logprobs = program(
        sizes, params, prompts, keys, jnp.float32(options.cfg_scale),
        jnp.float32(options.temperature), special=options.special,
        max_new_tokens=options.max_new_tokens, top_k=options.top_k, top_p=options.top_p,
        guided=guided, image_logprobs=options.image_logprobs, greedy=options.greedy,
        with_greedy=options.greedy_last, window=options.image_window, dtype=options.dtype,
        attention=choose_kernel(sizes, options.attention, options.dtype),
    )  # fmt: skip
    return (
        Segment(TEXT, plan, mask, logprobs),
        Segment(CODES, codes, jnp.ones(codes.shape, bool), code_logprobs),
    )


# ---- scoring


def score_thinking(
    sizes: JanusConfig, params: Params, prompts: EncodedPrompts, segments: tuple[Segment, ...],
    options: LogprobOptions,
) -> tuple[tuple[jax.Array, jax.Array], ...]:  # fmt: skip
    """Computes (log-probs, entropies) of plans [N, T] and of codes [N, K], in one pass.

    Each prompt is read once for its completions. With guided log-probs of images a second pass
    reads the unconditional rows.
    """
    (text, codes), mask = segments, prompts.attention_mask
    model, special = network.bind(sizes, params), options.special
    plan_lengths = count_plan_tokens(text.values, special.eos)
    drawn = model.embed_image_tokens(codes.values)
    begin = model.embed_text(jnp.full((len(drawn), 1), special.boi))
    (_, longest), length = text.values.shape, codes.values.shape[1]
    # The source has the longest plan, BOI and the codes; the completion has no gap between them.
    # T = 3, plan [a, b]: source [a, b, EOS, BOI, c0, ..], places [0, 1, 3, 4, ..]
    # `unshifted` scores a code by the state after it, which is one place later.
    places = jnp.arange(longest + 1 + length + options.unshifted)
    behind = longest - plan_lengths[:, None]
    places = jnp.where(places < plan_lengths[:, None], places, places + behind)
    shifted = dataclasses.replace(options, unshifted=False)

    def compute_states(input_ids: jax.Array, plan: jax.Array) -> jax.Array:
        source = jnp.concatenate([model.embed_text(plan), begin, drawn], axis=1)
        # Behind the last code of a short plan anything may stand: no state before it sees it.
        completion = jnp.take_along_axis(source, places[..., None], axis=1, mode="clip")
        embeds = model.embed_text(input_ids)
        return compute_scoring_states(model.language_model, embeds, mask, completion, shifted)

    # Place 0 follows the prompt, place `plan_lengths` is BOI, and the first code follows it.
    code_places = (plan_lengths[:, None] + 1 + options.unshifted + jnp.arange(length))[..., None]

    def take_code_states(states: jax.Array) -> jax.Array:
        return jnp.take_along_axis(states, code_places, axis=1)

    states = compute_states(prompts.input_ids, text.values)
    unconditional = None
    if options.image_logprobs == "guided":
        blank = unconditional_ids(prompts.input_ids, special)
        padded = compute_states(blank, jnp.full_like(text.values, special.pad))
        unconditional = take_code_states(padded)
    return (
        chunked_logprobs(
            model.text_logits, states[:, :longest], text.values, options.temperature, options.chunk
        ),
        score_code_states(model, take_code_states(states), unconditional, codes.values, options),
    )
