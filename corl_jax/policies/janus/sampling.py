"""Jitted sampling of images and texts: one prefill per prompt, then G completions decode together.

Both samplers are one XLA program per padded shape. The prompt's keys and values are computed
once and shared by its G completions, whose own are written in place into preallocated per-layer
buffers (`models.decoding`).

A sample depends on its own key and prompt only: not on the batch around it, its order or the
number of devices. Keys come from (seed, prompt index, sample index); step t folds t in.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from corl_jax.devices.compiling import SamplerProgram
from corl_jax.devices.mesh import constrain, context_batch_shards, gather_over_fsdp
from corl_jax.models import attention as attentions
from corl_jax.models.llama import KVCache
from corl_jax.policies.decoding import Rows, read_prompts
from corl_jax.policies.janus import network
from corl_jax.policies.janus.network import JanusConfig
from corl_jax.types import EncodedPrompts, Params, Rollout, SpecialTokens

VQ_BATCH = 8
"""Images that a device decodes at once: activations in float32 take 75 MB an image and layer."""
BLOCK = 512
"""Tokens of the vocabulary that are drawn from together; see `Choice.draw`."""
STRIDE = 16
"""Steps between looks at whether all texts have ended: to look, the host waits for the device."""

Attention = Literal["auto", "xla", "cudnn"]
"""How a decode step attends; "auto" is the fastest that the device and the dtype allow."""


def sample_keys(seed: int, prompt_index: Any, group_size: int, stream: int = 0) -> jax.Array:
    """Keys [N] of prompts' samples; `stream` tells tasks of the same prompt apart."""
    base = jax.random.fold_in(jax.random.key(seed), stream)
    index = jnp.asarray(prompt_index, jnp.uint32)
    fold = jax.random.fold_in
    grid = jax.vmap(
        lambda prompt: jax.vmap(lambda sample: fold(fold(base, prompt), sample))(
            jnp.arange(group_size)
        )
    )
    return grid(index).reshape(-1)


def unconditional_ids(input_ids: jax.Array, special: SpecialTokens) -> jax.Array:
    """The guidance row of a drawing prompt: all but BOS and BOI become padding, still attended.

    Left padding stays masked by the attention mask, which both rows share.
    """
    kept = (input_ids == special.bos) | (input_ids == special.boi)
    return jnp.where(kept, input_ids, special.pad)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """What one decode step hands to the next."""

    step: jax.Array  # scalar int32, completion tokens drawn so far
    token: jax.Array  # [N] int32, the newest token, not yet read by the network
    done: jax.Array  # [N] bool, rows that drew EOS
    tokens: jax.Array  # [N, T] int32
    logprobs: jax.Array  # [N, T] float32
    caches: list[KVCache]  # per layer


@dataclasses.dataclass(frozen=True)
class Choice:
    """How a token is drawn from logits."""

    temperature: jax.Array | float
    greedy: bool
    top_k: int = 0
    top_p: float = 1.0

    def draw(self, keys: jax.Array, step: jax.Array, logits: jax.Array) -> jax.Array:
        """Token ids [N] of float32 logits [N, V], already divided by the temperature."""
        if self.greedy:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        logits = nucleus(top_k_only(logits, self.top_k), self.top_p)
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
        return jax.vmap(_draw_one)(keys, in_blocks(logits))


def _draw_one(key: jax.Array, blocks: jax.Array) -> jax.Array:
    """A token id of logits [blocks, BLOCK]: first its block, then its place in there.

    A random number a token of a large vocabulary would cost more than its softmax.
    """
    block_key, place_key = jax.random.split(key)
    block = jax.random.categorical(block_key, jax.nn.logsumexp(blocks, axis=-1))
    place = jax.random.categorical(place_key, blocks[block])
    return (block * blocks.shape[-1] + place).astype(jnp.int32)


def in_blocks(logits: jax.Array) -> jax.Array:
    """[..., V] -> [..., blocks, BLOCK or fewer], the last block filled up with -inf."""
    size = min(BLOCK, logits.shape[-1])
    count = math.ceil(logits.shape[-1] / size)
    padding = [(0, 0)] * (logits.ndim - 1) + [(0, count * size - logits.shape[-1])]
    logits = jnp.pad(logits, padding, constant_values=-jnp.inf)
    return logits.reshape(*logits.shape[:-1], count, size)


def top_k_only(logits: jax.Array, k: int) -> jax.Array:
    """All but the k largest logits become -inf; 0 keeps all, ties with the k-th stay."""
    if not 0 < k < logits.shape[-1]:
        return logits
    threshold = lax.top_k(logits, k)[0][..., -1:]
    return jnp.where(logits < threshold, -jnp.inf, logits)


def nucleus(logits: jax.Array, top_p: float) -> jax.Array:
    """Keeps the smallest set of most likely tokens whose probability reaches `top_p`.

    Never empty; tokens that tie with the least likely kept one stay.
    """
    if top_p >= 1.0:
        return logits
    ordered = -jnp.sort(-logits, axis=-1)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = (before < top_p).at[..., 0].set(True)
    threshold = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < threshold, -jnp.inf, logits)


def token_logprobs(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """log-softmax of float32 logits [..., V] at tokens [...]."""
    picked = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    # By blocks, as the token was drawn: XLA then reads the logits once for both.
    by_block = jax.nn.logsumexp(in_blocks(logits), axis=-1)
    return picked - jax.nn.logsumexp(by_block, axis=-1)


def _group_size(prompts: EncodedPrompts, keys: jax.Array) -> int:
    """Raises: ValueError, while tracing, if the keys are not a whole number a prompt."""
    count = prompts.input_ids.shape[0]
    if keys.shape[0] % count or not keys.shape[0]:
        raise ValueError(f"{keys.shape[0]} keys for {count} prompts: expected a positive multiple")
    return keys.shape[0] // count


def _first_state(
    token: jax.Array, logprob: jax.Array, done: jax.Array, length: int, fill: int, caches
) -> DecodeState:
    rows = token.shape[0]
    return DecodeState(
        step=jnp.int32(1),
        token=token,
        done=done,
        tokens=jnp.full((rows, length), fill, jnp.int32).at[:, 0].set(token),
        logprobs=jnp.zeros((rows, length), jnp.float32).at[:, 0].set(logprob),
        caches=caches,
    )


@functools.partial(
    SamplerProgram,
    static_argnames=("config", "special", "guided", "score", "greedy", "dtype", "attention"),
)
def _image_program(
    config: JanusConfig,
    params: Params,
    prompts: EncodedPrompts,
    keys: jax.Array,
    cfg_scale: jax.Array,
    temperature: jax.Array,
    *,
    special: SpecialTokens,
    guided: bool,
    score: str,
    greedy: bool,
    dtype: Any,
    attention: attentions.DecodeKernel,
) -> tuple[jax.Array, jax.Array]:
    model = network.bind(config, gather_over_fsdp(network.cast(params, dtype)))
    ids, mask = prompts.input_ids, prompts.attention_mask
    rows, length = Rows(_group_size(prompts, keys), guided), config.num_image_tokens
    embeds = model.embed_text(rows.of_prompts(ids, unconditional_ids(ids, special)))
    mask = rows.of_prompts(mask, mask)
    decoder, last = read_prompts(model.language_model, embeds, mask, attention)
    hidden = rows.fan_out(last)
    choice = Choice(temperature, greedy)

    def draw(hidden: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        conditional, other = rows.split(model.image_logits(hidden).astype(jnp.float32))
        mixed = guide(conditional, other, cfg_scale) if guided else conditional
        token = choice.draw(keys, step, mixed / temperature)
        scored = mixed if score == "guided" else conditional
        return token, token_logprobs(scored / temperature, token)

    def step(state: DecodeState) -> DecodeState:
        embeds = rows.of_samples(model.embed_image_tokens(state.token))
        hidden, caches = decoder(embeds, state.step - 1, state.caches)
        token, logprob = draw(hidden, state.step)
        return _advance(state, token, logprob, caches)

    token, logprob = draw(hidden, jnp.int32(0))
    caches = decoder.new_caches(len(hidden), length)
    state = _first_state(token, logprob, jnp.zeros(token.shape, bool), length, 0, caches)
    state = lax.fori_loop(1, length, lambda _, state: step(state), state)
    return state.tokens, state.logprobs


def _advance(state: DecodeState, token, logprob, caches, done=None) -> DecodeState:
    return DecodeState(
        step=state.step + 1,
        token=token,
        done=state.done if done is None else done,
        tokens=lax.dynamic_update_slice(state.tokens, token[:, None], (0, state.step)),
        logprobs=lax.dynamic_update_slice(state.logprobs, logprob[:, None], (0, state.step)),
        caches=caches,
    )


def guide(conditional: jax.Array, unconditional: jax.Array, cfg_scale: Any) -> jax.Array:
    """Classifier-free guidance on logits; scale 1 is the conditional distribution.

    Source: Ho and Salimans 2022 (arXiv 2207.12598), as Janus applies it to image tokens.
    """
    return unconditional + cfg_scale * (conditional - unconditional)


def _implementation(
    config: JanusConfig, attention: Attention, dtype: Any
) -> attentions.DecodeKernel:
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
    score: Literal["conditional", "guided"] = "conditional",
    greedy: bool = False,
    dtype: Any = jnp.bfloat16,
    attention: Attention = "auto",
) -> Rollout:
    """Draws `len(keys) / B` images a prompt as codes; every image has all its tokens.

    `score` says which distribution the recorded log-probs are of. `cfg_scale` 1 runs no
    unconditional rows.
    """
    guided = cfg_scale != 1.0
    program = _image_program.built_for(len(keys) * (1 + guided), params, prompts, keys)
    tokens, logprobs = program(
        config, params, prompts, keys, jnp.float32(cfg_scale), jnp.float32(temperature),
        special=special, guided=guided, score=score, greedy=greedy, dtype=dtype,
        attention=_implementation(config, attention, dtype),
    )  # fmt: skip
    return Rollout(prompts, tokens, jnp.ones(tokens.shape, bool), logprobs)


@functools.partial(
    SamplerProgram,
    static_argnames=(
        "config", "special", "max_new_tokens", "top_k", "top_p", "greedy", "dtype", "attention",
    ),
)  # fmt: skip
def _text_program(
    config: JanusConfig,
    params: Params,
    prompts: EncodedPrompts,
    keys: jax.Array,
    temperature: jax.Array,
    *,
    special: SpecialTokens,
    max_new_tokens: int,
    top_k: int,
    top_p: float,
    greedy: bool,
    dtype: Any,
    attention: attentions.DecodeKernel,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    model = network.bind(config, gather_over_fsdp(network.cast(params, dtype)))
    features = None if prompts.pixel_values is None else model.image_features(prompts.pixel_values)
    embeds = model.prompt_embeds(prompts.input_ids, special.image, features)
    rows = Rows(_group_size(prompts, keys))
    mask = prompts.attention_mask
    decoder, last = read_prompts(model.language_model, embeds, mask, attention)
    hidden = rows.fan_out(last)
    choice = Choice(temperature, greedy, top_k, top_p)

    def draw(hidden: jax.Array, step: jax.Array, done: jax.Array):
        logits = model.text_logits(hidden).astype(jnp.float32) / temperature
        token = choice.draw(keys, step, logits)
        logprob = jnp.where(done, 0.0, token_logprobs(logits, token))
        token = jnp.where(done, special.eos, token)
        return token, logprob, done | (token == special.eos)

    def step(state: DecodeState) -> DecodeState:
        hidden, caches = decoder(model.embed_text(state.token), state.step - 1, state.caches)
        token, logprob, done = draw(hidden, state.step, state.done)
        return _advance(state, token, logprob, caches, done)

    token, logprob, done = draw(hidden, jnp.int32(0), jnp.zeros(keys.shape[0], bool))
    rounds, stride = strides(max_new_tokens - 1)
    length = 1 + rounds * stride
    caches = decoder.new_caches(len(hidden), length)
    state = lax.while_loop(
        lambda state: (state.step < length) & ~state.done.all(),
        lambda state: lax.fori_loop(0, stride, lambda _, state: step(state), state),
        _first_state(token, logprob, done, length, special.eos, caches),
    )
    tokens, logprobs = (x[:, :max_new_tokens] for x in (state.tokens, state.logprobs))
    return tokens, completion_mask(tokens, state.step, special.eos), logprobs


def strides(steps: int) -> tuple[int, int]:
    """(count, steps of each) that make at least `steps`, none longer than STRIDE."""
    count = math.ceil(steps / STRIDE)
    return count, math.ceil(steps / max(count, 1))


def completion_mask(tokens: jax.Array, steps: Any, eos: int) -> jax.Array:
    """[N, T] bool: drawn tokens up to and including the first EOS."""
    ended = jnp.cumsum(tokens == eos, axis=-1) - (tokens == eos)
    return (ended == 0) & (jnp.arange(tokens.shape[-1]) < steps)


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
    dtype: Any = jnp.bfloat16,
    attention: Attention = "auto",
) -> Rollout:
    """Answers each prompt `len(keys) / B` times; stops soon after all rows drew EOS.

    Tokens after a row's end are EOS and masked out. A row whose mask is full and whose last
    token is not EOS was truncated.
    """
    program = _text_program.built_for(len(keys), params, prompts, keys)
    tokens, mask, logprobs = program(
        config, params, prompts, keys, jnp.float32(temperature),
        special=special, max_new_tokens=max_new_tokens, top_k=top_k, top_p=top_p,
        greedy=greedy, dtype=dtype, attention=_implementation(config, attention, dtype),
    )  # fmt: skip
    return Rollout(prompts, tokens, mask, logprobs)


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def decode_images(
    config: JanusConfig, params: Params, tokens: jax.Array, *, dtype: Any = jnp.float32
) -> jax.Array:
    """uint8 [N, S, S, 3] of codes [N, T], computed in `dtype`, truncated like the original."""
    tokenizer = jax.tree.map(lambda x: x.astype(dtype), params["vqmodel"])
    model = network.bind(config, params | {"vqmodel": tokenizer})
    chunks, size = _vq_chunks(tokens.shape[0])
    padded = jnp.pad(tokens, ((0, chunks * size - tokens.shape[0]), (0, 0)))

    def decode(codes: jax.Array) -> jax.Array:
        pixels = model.vqmodel.decode(constrain(codes, "batch", "length"))
        pixels = (pixels.astype(jnp.float32) + 1) / 2 * 255
        return jnp.clip(pixels, 0, 255).astype(jnp.uint8)

    images = lax.map(decode, padded.reshape(chunks, size, -1))
    images = images.reshape(-1, *images.shape[2:])[: tokens.shape[0]]
    return constrain(images, "batch", None, None, None)


def _vq_chunks(images: int) -> tuple[int, int]:
    """(chunks, images a chunk): at most VQ_BATCH a device, spread evenly over all of them."""
    ways = context_batch_shards()
    chunks = math.ceil(images / (VQ_BATCH * ways))
    return chunks, math.ceil(images / (chunks * ways)) * ways
