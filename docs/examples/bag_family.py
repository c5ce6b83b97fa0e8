"""The smallest policy family: tables of logits that draw 4 x 4 images and answer with one word.

A prompt chooses a row of two tables by the sum of its ids. One table has the logits of the 16 codes
of an image, the other those of a word. docs/how_to/add_a_policy.md explains each part; a test
trains, evaluates, resumes, exports and samples it through the unchanged program.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from PIL import Image

from corl_jax.policies.choices import mark_last_rows
from corl_jax.policies.family import Family, Limits, LogprobOptions, SamplingOptions, TurnProgram
from corl_jax.tasks import CODES, TEXT
from corl_jax.types import EncodedPrompts, Params, Segment
from corl_jax.weights.kinds import NetworkKind

SIDE = 4
WORDS = ("", "<answer>one</answer>", "<answer>two</answer>", "<answer>three</answer>")
"""The vocabulary; the first word is the end token."""
PALETTE = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0], [255, 255, 255]], np.uint8)
"""Color of each code."""

# ---- the network and its checkpoints


@dataclasses.dataclass(frozen=True)
class BagSizes:
    """Sizes of the tables."""

    rows: int = 8
    codes: int = len(PALETTE)
    words: int = len(WORDS)


class Bag(nnx.Module):
    """Logits of every code and word, by the row that a prompt chooses."""

    def __init__(self, sizes: BagSizes, *, rngs: nnx.Rngs):
        self.images = nnx.Param(jnp.zeros((sizes.rows, SIDE * SIDE, sizes.codes)))
        self.texts = nnx.Param(jnp.zeros((sizes.rows, sizes.words)))


KIND = NetworkKind("bag", Bag, BagSizes, rules=((r"images|texts", PartitionSpec()),))

# ---- prompts


@dataclasses.dataclass(frozen=True)
class BagTokens:
    """Ids of special tokens."""

    eos: int = 0
    pad: int = 0


class BagProcessor:
    """Prompts of characters, texts of one word."""

    special = BagTokens()
    image = None  # it does not normalise images
    num_tokens = len(WORDS)

    def prompt_ids(
        self, prompt: str, columns: Mapping[str, Any], system_prompt: str = ""
    ) -> list[int]:
        """Returns an id for each character of the prompt or the question."""
        text = columns["prompt" if prompt == "generate" else "qa_problem"]
        return [1 + ord(character) % 100 for character in system_prompt + text]

    def encode(
        self,
        prompt: str,
        ids: Sequence[Sequence[int]],
        images: Sequence[Image.Image] | None = None,
        length: int | None = None,
    ) -> EncodedPrompts:
        """Pads prompts; this model does not look at images."""
        return self.pad(ids, length)

    def pad(self, ids: Sequence[Sequence[int]], length: int | None = None) -> EncodedPrompts:
        """Pads prompts on the left with 0."""
        length = length or self.bucket(max(map(len, ids)))
        padded = np.array([[0] * (length - len(row)) + list(row) for row in ids], np.int32)
        return EncodedPrompts(padded, padded > 0)

    def bucket(self, length: int) -> int:
        """Returns the next multiple of 16."""
        return -(-length // 16) * 16

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns the words, joined."""
        return "".join(WORDS[int(token)] for token in ids)

    def answer_ids(self, text: str) -> list[int]:
        """Returns the id of a word."""
        return [WORDS.index(text)]


def open_processor(folder: Path) -> BagProcessor:
    """Returns the processor; it needs no files."""
    return BagProcessor()


# ---- sampling and log-probs


def choose_row(sizes: BagSizes, prompts: EncodedPrompts) -> jax.Array:
    """Returns the row [B] of the tables for each prompt."""
    return jnp.asarray(prompts.input_ids).sum(axis=-1) % sizes.rows


def image_logits(
    sizes: BagSizes, params: Params, prompts: EncodedPrompts, count: int, temperature: float
) -> jax.Array:
    """Returns float32 logits [count, 16, codes]."""
    logits = params["images"][choose_row(sizes, prompts)].astype(jnp.float32)
    return jnp.repeat(logits, count // len(logits), axis=0) / temperature


def text_logits(
    sizes: BagSizes, params: Params, prompts: EncodedPrompts, count: int, temperature: float
) -> jax.Array:
    """Returns float32 logits [count, 2, words]: a word, then the end token for certain."""
    words = params["texts"][choose_row(sizes, prompts)].astype(jnp.float32) / temperature
    end = jnp.where(jnp.arange(sizes.words) == BagTokens.eos, 0.0, -1e9)
    logits = jnp.stack(
        [words.at[:, BagTokens.eos].set(-1e9), jnp.broadcast_to(end, words.shape)], 1
    )
    return jnp.repeat(logits, count // len(logits), axis=0)


def log_softmax_of(logits: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (log-probs of the values, entropies), both [N, T]."""
    logprobs = jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(logprobs, values[..., None], axis=-1)[..., 0]
    return picked, jax.lax.stop_gradient(-(jnp.exp(logprobs) * logprobs).sum(axis=-1))


def make_turn(kind: str, logits_of: Any) -> TurnProgram:
    """Returns the sampler and the scorer of one kind of segment."""

    @functools.partial(jax.jit, static_argnames=("sizes", "options"))
    def sample(
        sizes: BagSizes, params: Params, prompts: EncodedPrompts, keys: jax.Array,
        options: SamplingOptions,
    ) -> tuple[Segment, ...]:  # fmt: skip
        logits = logits_of(sizes, params, prompts, len(keys), options.temperature)
        values = jnp.argmax(logits, axis=-1)
        if not options.greedy:
            drawn = jax.vmap(jax.random.categorical)(keys, logits)
            group_size = len(keys) // len(prompts.input_ids)
            is_greedy = options.greedy_last & mark_last_rows(len(keys), group_size)
            values = jnp.where(is_greedy[:, None], values, drawn)
        logprobs, _ = log_softmax_of(logits, values)
        return (Segment(kind, values, jnp.ones(values.shape, bool), logprobs),)

    def score(
        sizes: BagSizes, params: Params, prompts: EncodedPrompts, segments: tuple[Segment, ...],
        options: LogprobOptions,
    ) -> tuple[tuple[jax.Array, jax.Array], ...]:  # fmt: skip
        values = segments[0].values
        logits = logits_of(sizes, params, prompts, len(values), options.temperature)
        return (log_softmax_of(logits, values),)

    return TurnProgram(sample, score)


def decode_images(
    sizes: BagSizes, params: Params, values: jax.Array, *, dtype: Any = jnp.float32
) -> jax.Array:
    """Returns uint8 [N, 4, 4, 3]: the colors of the codes."""
    return jnp.asarray(PALETTE)[values].reshape(-1, SIDE, SIDE, 3)


def encode_images(sizes: BagSizes, params: Params, pixels: jax.Array) -> jax.Array:
    """Returns the code of the nearest color of each pixel of [N, 4, 4, 3] in [-1, 1]."""
    colors = jnp.asarray(PALETTE) / 127.5 - 1.0
    distance = jnp.square(pixels[..., None, :] - colors).sum(axis=-1)
    return jnp.argmin(distance, axis=-1).reshape(len(pixels), -1)


# ---- the family


def describe_limits(sizes: BagSizes) -> Limits:
    """Returns the numbers that the program checks and estimates with."""
    return Limits(
        positions=256, image_tokens=SIDE * SIDE, input_image_tokens=0, input_image_side=SIDE,
        image_side=SIDE, vocab_size=sizes.words, layers=1, width=sizes.words,
        inner_width=sizes.words, heads=1, kv_heads=1, head_dim=sizes.words,
    )  # fmt: skip


FAMILY = Family(
    kind=KIND,
    presets={"bag": BagSizes()},
    open_processor=open_processor,
    stand_in_tokens=BagTokens(),
    prompt_bucket=16,
    trainable=("images", "texts"),
    float32_parts=(),
    tokenizer_parts=(),
    limits=describe_limits,
    turns={((CODES,),): make_turn(CODES, image_logits), ((TEXT,),): make_turn(TEXT, text_logits)},
    blank_prompts=lambda ids, special: jnp.full_like(ids, special.pad),
    decode_images=decode_images,
    encode_images=encode_images,
)
