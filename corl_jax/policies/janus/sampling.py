"""Samples images and texts: one prefill per prompt, then its G completions decode together.

Each sampler is one XLA program per padded shape. The keys and values of a prompt are computed once
and shared by its completions; see `policies.decoding`. A sample depends on its key and its prompt
only; see `policies.choices`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from corl_jax.devices.compiling import SamplerProgram
from corl_jax.devices.mesh import gather_over_fsdp
from corl_jax.models import attention as attentions
from corl_jax.models.llama import KVCache
from corl_jax.policies.causal_answers import make_text_program
from corl_jax.policies.choices import Choice, guide, token_logprobs
from corl_jax.policies.completions import DecodeState, advance, check_group_size, start_state
from corl_jax.policies.decoding import Decoder, Rows, read_prompts
from corl_jax.policies.family import SamplingOptions
from corl_jax.policies.jacobi import draw_in_windows
from corl_jax.policies.janus import network
from corl_jax.policies.janus.layout import RULES
from corl_jax.policies.janus.network import Janus, JanusConfig
from corl_jax.policies.janus.tokens import SpecialTokens
from corl_jax.tasks import CODES, TEXT
from corl_jax.types import EncodedPrompts, Params, Segment

Attention = Literal["auto", "xla", "cudnn"]
"""The attention kernel of a decode step; "auto": the fastest for the device and the dtype."""


def unconditional_ids(input_ids: jax.Array, special: SpecialTokens) -> jax.Array:
    """Returns the ids of the unconditional row: all ids but BOS and BOI become padding.

    The attention mask is that of the conditional row.
    """
    # [pad, BOS, a, cat, BOI] -> [pad, BOS, pad, pad, BOI]. The inner pads are attended to, as in
    # Janus; the left one is masked in both rows. By id, not by position: with left padding the
    # rule of the released code overwrites BOS (Q6).
    is_boundary = (input_ids == special.bos) | (input_ids == special.boi)
    return jnp.where(is_boundary, input_ids, special.pad)


CodeDraw = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
"""(hidden states of all rows, step) -> (codes, log-probs), each [N].

The step is a number, or one of each sample.
"""
CodeReader = Callable[[jax.Array, jax.Array, list[KVCache]], tuple[jax.Array, list[KVCache]]]
"""(codes [N], their number in the image, caches) -> (states of all rows after them, caches).

A reader of windows takes codes [N, W], and of each sample the number of the first one.
"""


def make_code_draw(
    model: Janus, rows: Rows, choice: Choice, keys: jax.Array, cfg_scale: jax.Array,
    image_logprobs: str,
) -> CodeDraw:  # fmt: skip
    """Returns the function that draws an image code for each sample."""

    def draw(hidden: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        # float32 before the guidance: a scale of 5 enlarges the rounding of bfloat16 (Q39).
        conditional, other = rows.split(model.image_logits(hidden).astype(jnp.float32))
        mixed = guide(conditional, other, cfg_scale) if rows.guided else conditional
        token = choice.draw(keys, step, mixed / choice.temperature)
        # Sampled from the guided distribution, recorded under the one that the loss scores (Q27).
        scored = mixed if image_logprobs == "guided" else conditional
        return token, token_logprobs(scored / choice.temperature, token)

    return draw


def make_code_reader(
    model: Janus, rows: Rows, decoder: Decoder, before: Any, window: int
) -> CodeReader:
    """Returns the function that reads a code of each sample, or a window of more than one.

    `before` counts the completion tokens before the first code: a number, or one of each row.
    """

    def read(code: jax.Array, number: jax.Array, caches: list[KVCache]):
        # The conditional and the unconditional row of a sample read the same token.
        embeds = rows.repeat_samples(model.embed_image_tokens(code))
        return decoder(embeds, before + number, caches)

    def read_window(codes: jax.Array, number: jax.Array, caches: list[KVCache]):
        embeds = rows.repeat_samples(model.embed_image_tokens(codes))
        return decoder.read_window(embeds, before + rows.repeat_samples(number), caches)

    return read if window == 1 else read_window


def sample_all_codes(
    draw: CodeDraw,
    read: CodeReader,
    hidden: jax.Array,
    length: int,
    caches: list[KVCache],
    window: int,
) -> tuple[jax.Array, jax.Array]:
    """Samples `length` codes; returns them and their log-probs, each [N, `length`].

    `hidden` are the states of all rows that give the first code. With a window of more than one
    code, several become final in a pass; see `policies.jacobi`.
    """
    token, logprob = draw(hidden, jnp.int32(0))
    if window > 1:
        draw_window = jax.vmap(draw, in_axes=1, out_axes=1)
        drawn = draw_in_windows(draw_window, read, (token, logprob), length, window, caches)
        return drawn.codes[:, :length], drawn.logprobs[:, :length]

    def step(state: DecodeState) -> DecodeState:
        hidden, caches = read(state.token, state.step - 1, state.caches)
        token, logprob = draw(hidden, state.step)
        return advance(state, token, logprob, caches)

    state = start_state(token, logprob, jnp.zeros(token.shape, bool), length, 0, caches)
    state = lax.fori_loop(1, length, lambda _, state: step(state), state)
    return state.tokens, state.logprobs


@functools.partial(
    SamplerProgram,
    static_argnames=(
        "config",
        "special",
        "guided",
        "image_logprobs",
        "greedy",
        "greedy_last",
        "window",
        "dtype",
        "attention",
    ),
)
def image_program(
    config: JanusConfig,
    params: Params,
    prompts: EncodedPrompts,
    keys: jax.Array,
    cfg_scale: jax.Array,
    temperature: jax.Array,
    *,
    special: SpecialTokens,
    guided: bool,
    image_logprobs: str,
    greedy: bool,
    greedy_last: int = 0,  # of so many neighbouring completions the last one is greedy
    window: int = 1,
    dtype: Any,
    attention: attentions.DecodeKernel,
) -> tuple[jax.Array, jax.Array]:
    model = _open_model(config, params, dtype)
    ids, mask = prompts.input_ids, prompts.attention_mask
    rows, length = Rows(check_group_size(prompts, keys), guided), config.num_image_tokens
    embeds = model.embed_text(rows.interleave_prompts(ids, unconditional_ids(ids, special)))
    mask = rows.interleave_prompts(mask, mask)
    decoder, last = read_prompts(model.language_model, embeds, mask, attention)
    hidden = rows.fan_out(last)
    choice = Choice(temperature, greedy, greedy_last=greedy_last)
    draw = make_code_draw(model, rows, choice, keys, cfg_scale, image_logprobs)

    # The prefill's last state gives token 0; step t reads token t - 1 and samples token t.
    read = make_code_reader(model, rows, decoder, 0, window)
    caches = decoder.new_caches(len(hidden), length + window - 1)
    return sample_all_codes(draw, read, hidden, length, caches, window)


def choose_kernel(config: JanusConfig, attention: Attention, dtype: Any) -> attentions.DecodeKernel:
    return (
        attentions.choose_decode_kernel(dtype, config.llama.head_dim)
        if attention == "auto"
        else attention
    )


def sample_images(
    config: JanusConfig,
    params: Params,
    prompts: EncodedPrompts,
    keys: jax.Array,
    *,
    special: SpecialTokens,
    cfg_scale: float = 5.0,
    temperature: float = 1.0,
    image_logprobs: Literal["conditional", "guided"] = "conditional",
    greedy: bool = False,
    greedy_last: bool = False,
    window: int = 1,
    dtype: Any = jnp.bfloat16,
    attention: Attention = "auto",
) -> Segment:
    """Samples `len(keys) / B` images per prompt as codes [N, T]; every image has all its codes.

    `image_logprobs` names the distribution of the recorded log-probs. `cfg_scale` 1 has no
    unconditional rows. `window` is the number of codes that a pass reads; it changes images by
    rounding only.
    """
    # Scale and temperature are traced, so that another value compiles nothing; whether there is
    # guidance decides the shapes.
    guided = cfg_scale != 1.0
    # A pass reads a window of codes in each row.
    rows = len(keys) * (1 + guided) * window
    program = image_program.choose_build(rows, params, prompts, keys)
    tokens, logprobs = program(
        config, params, prompts, keys, jnp.float32(cfg_scale), jnp.float32(temperature),
        special=special, guided=guided, image_logprobs=image_logprobs, greedy=greedy,
        greedy_last=check_group_size(prompts, keys) if greedy_last else 0, window=window,
        dtype=dtype, attention=choose_kernel(config, attention, dtype),
    )  # fmt: skip
    return Segment(CODES, tokens, jnp.ones(tokens.shape, bool), logprobs)


def _open_model(config: JanusConfig, params: Params, dtype: Any) -> Janus:
    return network.bind(config, gather_over_fsdp(network.cast(params, dtype), RULES))


text_program = make_text_program(_open_model)


def sample_text(
    config: JanusConfig,
    params: Params,
    prompts: EncodedPrompts,
    keys: jax.Array,
    *,
    special: SpecialTokens,
    max_new_tokens: int = 512,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    greedy: bool = False,
    greedy_last: bool = False,
    dtype: Any = jnp.bfloat16,
    attention: Attention = "auto",
) -> Segment:
    """Samples `len(keys) / B` answers per prompt; stops soon after all rows have ended.

    Tokens after the end of a row are EOS and masked out. A row is truncated if its mask is full
    and its last token is not EOS.
    """
    program = text_program.choose_build(len(keys), params, prompts, keys)
    tokens, mask, logprobs = program(
        config, params, prompts, keys, jnp.float32(temperature),
        special=special, max_new_tokens=max_new_tokens, top_k=top_k, top_p=top_p,
        greedy=greedy, greedy_last=check_group_size(prompts, keys) if greedy_last else 0,
        dtype=dtype, attention=choose_kernel(config, attention, dtype),
    )  # fmt: skip
    return Segment(TEXT, tokens, mask, logprobs)


def sample_codes(
    sizes: JanusConfig, params: Params, prompts: EncodedPrompts, keys: jax.Array,
    options: SamplingOptions,
) -> tuple[Segment, ...]:  # fmt: skip
    """Samples the image codes of a turn; see `sample_images`."""
    return (
        sample_images(
            sizes, params, prompts, keys, special=options.special, cfg_scale=options.cfg_scale,
            temperature=options.temperature, image_logprobs=options.image_logprobs,
            greedy=options.greedy, greedy_last=options.greedy_last, window=options.image_window,
            dtype=options.dtype, attention=options.attention,
        ),
    )  # fmt: skip


def sample_answers(
    sizes: JanusConfig, params: Params, prompts: EncodedPrompts, keys: jax.Array,
    options: SamplingOptions,
) -> tuple[Segment, ...]:  # fmt: skip
    """Samples the text of a turn; see `sample_text`."""
    return (
        sample_text(
            sizes, params, prompts, keys, special=options.special,
            max_new_tokens=options.max_new_tokens, temperature=options.temperature,
            top_k=options.top_k, top_p=options.top_p, greedy=options.greedy,
            greedy_last=options.greedy_last, dtype=options.dtype, attention=options.attention,
        ),
    )  # fmt: skip
