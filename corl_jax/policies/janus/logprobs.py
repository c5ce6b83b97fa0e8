"""Log-probs of given completions under the policy, by one teacher-forced pass a task.

Logits are made and reduced a few tokens at a time: of [rows, T, 102400] only
[rows, chunk, 102400] ever exists, forward and backward.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from corl_jax.models.attention import AttentionKernel
from corl_jax.models.layers import Remat
from corl_jax.policies.janus.network import Janus
from corl_jax.policies.janus.sampling import guide, unconditional_ids
from corl_jax.types import EncodedPrompts, SpecialTokens


@dataclasses.dataclass(frozen=True)
class LogprobOptions:
    """How completions are scored; hashable, closed over by the jitted steps."""

    special: SpecialTokens
    temperature: float = 1.0
    cfg_scale: float = 5.0
    image_logprobs: Literal["conditional", "guided"] = "conditional"
    unshifted: bool = False  # compat Q1: the logits that follow a token score that token
    remat: Remat = "full"
    attention: AttentionKernel = "xla"
    chunk: int = 1024  # tokens, over all rows, whose logits exist at once


def fan_out(x: jax.Array, group_size: int) -> jax.Array:
    """Each prompt's entry repeated for its completions."""
    return jnp.repeat(x, group_size, axis=0)


def chunked_logprobs(
    logits_of: Callable[[Any], jax.Array],
    hidden: Any,
    tokens: jax.Array,
    temperature: float,
    chunk: int,
) -> tuple[jax.Array, jax.Array]:
    """(log-probs, entropies), both [N, T] float32, of `tokens` [N, T].

    `hidden` is an array [N, T, D] or a tuple of such; `logits_of` maps a slice of it to logits.
    The softmax is taken in float32. Entropies carry no gradient.
    """
    rows, length = tokens.shape
    size = max(1, min(length, chunk // rows))
    pieces = -(-length // size)

    def split(x: jax.Array) -> jax.Array:
        padding = [(0, 0), (0, pieces * size - length)] + [(0, 0)] * (x.ndim - 2)
        return jnp.pad(x, padding).reshape(rows, pieces, size, *x.shape[2:]).swapaxes(0, 1)

    @jax.checkpoint
    def score(piece: tuple[Any, jax.Array]) -> tuple[jax.Array, jax.Array]:
        states, targets = piece
        logits = logits_of(states).astype(jnp.float32) / temperature
        normalised = logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        picked = jnp.take_along_axis(normalised, targets[..., None], axis=-1)[..., 0]
        entropy = -(jnp.exp(normalised) * normalised).sum(axis=-1)
        return picked, lax.stop_gradient(entropy)

    out = lax.map(score, (jax.tree.map(split, hidden), split(tokens)))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(rows, -1)[:, :length], out)


def _completion_states(
    model: Janus, embeds: jax.Array, mask: jax.Array, completion: jax.Array, scoring: LogprobOptions
) -> jax.Array:
    """Hidden states [N, T, D] that score each completion token.

    `embeds` [B, P, D] and `mask` [B, P] of the prompts, `completion` [N, T, D] embedded tokens.
    The state that scores token j has read the tokens before it; the last token is not read.
    Each prompt is read once, not once per completion.
    """
    length = completion.shape[1]
    read = completion if scoring.unshifted else completion[:, : length - 1]
    group_size = len(completion) // len(embeds)
    if not read.shape[1]:
        hidden = model.language_model(embeds, mask, remat=scoring.remat)
        return fan_out(hidden[:, -1:], group_size)
    prompts, states = model.language_model.after_prompts(
        embeds, mask, read.astype(embeds.dtype), remat=scoring.remat, attention=scoring.attention
    )
    if scoring.unshifted:
        return states
    return jnp.concatenate([fan_out(prompts[:, -1:], group_size), states], axis=1)


def image_logprobs(
    model: Janus, prompts: EncodedPrompts, tokens: jax.Array, scoring: LogprobOptions
) -> tuple[jax.Array, jax.Array]:
    """(log-probs, entropies) [N, T] of image codes `tokens` [N, T] given B prompts."""
    drawn = model.embed_image_tokens(tokens)

    def states(input_ids: jax.Array) -> jax.Array:
        embeds = model.embed_text(input_ids)
        return _completion_states(model, embeds, prompts.attention_mask, drawn, scoring)

    def guided_logits(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
        with_prompt, without = (model.image_logits(x).astype(jnp.float32) for x in pair)
        return guide(with_prompt, without, scoring.cfg_scale)

    conditional = states(prompts.input_ids)
    if scoring.image_logprobs == "conditional":
        logits_of, hidden = model.image_logits, conditional
    else:
        hidden = (conditional, states(unconditional_ids(prompts.input_ids, scoring.special)))
        logits_of = guided_logits

    return chunked_logprobs(logits_of, hidden, tokens, scoring.temperature, scoring.chunk)


def text_logprobs(
    model: Janus, prompts: EncodedPrompts, tokens: jax.Array, scoring: LogprobOptions
) -> tuple[jax.Array, jax.Array]:
    """(log-probs, entropies) [N, T] of answers `tokens` [N, T] given B prompts."""
    features = None
    if prompts.pixel_values is not None:
        features = model.image_features(prompts.pixel_values, remat=scoring.remat)
    embeds = model.prompt_embeds(prompts.input_ids, scoring.special.image, features)
    scoring = dataclasses.replace(scoring, unshifted=False)
    answers = model.embed_text(tokens)
    hidden = _completion_states(model, embeds, prompts.attention_mask, answers, scoring)
    return chunked_logprobs(model.text_logits, hidden, tokens, scoring.temperature, scoring.chunk)


TASK_LOGPROBS = {"t2i": image_logprobs, "mm2t": text_logprobs}
"""The scoring function of each task."""
