"""Samples and scores answers behind a question, by a Llama that reads from left to right.

A question may hold images; how they are embedded is the family's. The keys and values of a question
are computed once and shared by its completions; see `policies.decoding`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from corl_jax.devices.compiling import SamplerProgram
from corl_jax.models.attention import DecodeKernel
from corl_jax.models.layers import Remat
from corl_jax.models.llama import Llama, PackedRows
from corl_jax.policies.choices import Choice, completion_mask
from corl_jax.policies.chunked_logprobs import chunked_logprobs, repeat_rows
from corl_jax.policies.completions import (
    TextModel,
    check_group_size,
    make_text_draw,
    sample_until_ended,
)
from corl_jax.policies.decoding import Rows, read_prompts
from corl_jax.policies.family import LogprobOptions
from corl_jax.policies.packing import Packing
from corl_jax.types import EncodedPrompts, Params, Sizes


class AnswerModel(TextModel, Protocol):
    """A network that answers questions about images."""

    language_model: Llama

    def embed_question(
        self, prompts: EncodedPrompts, special: Any, *, remat: Remat = "none"
    ) -> jax.Array:
        """Embeds the ids of prompts with their images to [B, P, D]."""
        ...


Open = Callable[[Sizes, Params, Any], AnswerModel]
"""(sizes, params, compute dtype) -> the network, inside a program."""


def make_text_program(open_model: Open) -> SamplerProgram:
    """Returns the program that samples answers: tokens, their mask and their log-probs, [N, T]."""

    def text_program(
        config: Sizes, params: Params, prompts: EncodedPrompts, keys: jax.Array,
        temperature: jax.Array, *, special: Any, max_new_tokens: int, top_k: int, top_p: float,
        greedy: bool, dtype: Any, attention: DecodeKernel,
        greedy_last: int = 0,  # of so many neighbouring completions the last one is greedy
    ) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
        model = open_model(config, params, dtype)
        embeds = model.embed_question(prompts, special)
        rows = Rows(check_group_size(prompts, keys))
        decoder, last = read_prompts(
            model.language_model, embeds, prompts.attention_mask, attention
        )
        hidden = rows.fan_out(last)
        choice = Choice(temperature, greedy, top_k, top_p, greedy_last)

        draw = make_text_draw(model, choice, keys, special.eos)
        # One token comes from the prefill.
        state = sample_until_ended(model, decoder, draw, hidden, max_new_tokens - 1, special.eos)
        tokens, logprobs = (x[:, :max_new_tokens] for x in (state.tokens, state.logprobs))
        return tokens, completion_mask(tokens, state.step, special.eos), logprobs

    return SamplerProgram(
        text_program,
        static_argnames=(
            "config", "special", "max_new_tokens", "top_k", "top_p", "greedy", "greedy_last",
            "dtype", "attention",
        ),
    )  # fmt: skip


def compute_scoring_states(
    language_model: Llama, embeds: jax.Array, mask: jax.Array, completion: jax.Array,
    options: LogprobOptions,
) -> jax.Array:  # fmt: skip
    """Computes the hidden states [N, T, D] whose logits score the completion tokens.

    `embeds` [B, P, D] and `mask` [B, P] are those of the prompts; `completion` [N, T, D] are the
    embedded tokens. Each prompt is read once, not once per completion.
    """
    # Tokens a, b, c after prompt p. Read: p, a, b; the states after them score a, b, c.
    # `unshifted` (Q1): read p, a, b, c; the states after a, b, c score a, b, c, which is the error
    # of CoRL's released code: these states predict the token that follows.
    length = completion.shape[1]
    read = completion if options.unshifted else completion[:, : length - 1]
    group_size = len(completion) // len(embeds)
    if not read.shape[1]:  # one token: the prompt's last state scores it
        hidden = language_model(embeds, mask, remat=options.remat)
        return repeat_rows(hidden[:, -1:], group_size)
    prompts, states = language_model.after_prompts(
        embeds, mask, read.astype(embeds.dtype), remat=options.remat, attention=options.attention
    )
    if options.unshifted:
        return states
    # Left padding: the last position of each prompt is a real token.
    return jnp.concatenate([repeat_rows(prompts[:, -1:], group_size), states], axis=1)


def score_text(
    model: AnswerModel, prompts: EncodedPrompts, tokens: jax.Array, options: LogprobOptions,
    packed: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Computes (log-probs, entropies) [N, T] of answers `tokens` [N, T] given B prompts.

    `packed` are rows that hold several answers, see `pack_rows`. Both are then 0 at tokens that
    stand in no row.
    """
    embeds = model.embed_question(prompts, options.special, remat=options.remat)
    if packed is not None:
        packing = Packing(packed, tokens.shape, len(tokens) // len(embeds))
        read = packing.pack(tokens)
        hidden = _compute_packed_states(
            model, embeds, prompts.attention_mask, read, packing.rows, options
        )
        scores = chunked_logprobs(
            model.text_logits, hidden, read, options.temperature, options.chunk
        )
        return packing.unpack(scores[0]), packing.unpack(scores[1])
    # CoRL's released code shifts texts correctly: Q1 is about images only.
    options = dataclasses.replace(options, unshifted=False)
    answers = model.embed_text(tokens)
    hidden = compute_scoring_states(
        model.language_model, embeds, prompts.attention_mask, answers, options
    )
    return chunked_logprobs(model.text_logits, hidden, tokens, options.temperature, options.chunk)


def _compute_packed_states(
    model: AnswerModel, embeds: jax.Array, mask: jax.Array, tokens: jax.Array, rows: PackedRows,
    options: LogprobOptions,
) -> jax.Array:  # fmt: skip
    """Computes the hidden states [rows, T, D] whose logits score packed tokens [rows, T]."""
    read = model.embed_text(tokens).astype(embeds.dtype)
    prompts, states = model.language_model.after_prompts(
        embeds, mask, read, packed=rows, remat=options.remat, attention=options.attention
    )
    # Answers a, b in a row: [a0, a1, b0, b1] are scored by the states of [p, a0, p, b0], where p is
    # the prompt's last token, which is real: the padding is on the left.
    last = rows.take(prompts[:, -1:])
    before = jnp.concatenate([last, states[:, :-1]], axis=1)
    return jnp.where((rows.offsets == 0)[..., None], last, before)
