"""Rewards in which a Janus looks at the drawings: similarity, captions, answers.

`scorer` says which: `policy` is the policy as it stands at this step, so that the reward moves
with it and can be gamed (arXiv 2505.17534 does this; Q26 in
docs/explained/released_code.md); `initial` is a frozen copy of what the run started from; anything
else is the path of another checkpoint. All rows of a step run through programs of one shape: pieces
of equal size, prompts padded to a bucket of the longest.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from corl_jax.config.fields import Fraction, Positive
from corl_jax.devices.batches import find_mesh, process_shard, run_in_pieces
from corl_jax.devices.processes import all_max
from corl_jax.policies.choices import sample_keys
from corl_jax.policies.family import Family, SamplingOptions
from corl_jax.rewards import text
from corl_jax.rewards.samples import (
    Context,
    Policy,
    Samples,
    read_class_questions,
    read_question_types,
    score_rows,
)
from corl_jax.tasks import IMAGE_UNDERSTANDING, QUESTION_STREAMS
from corl_jax.types import EncodedPrompts, Params, Sizes

CHUNK = 64
"""Images looked at in one program; bounds the memory of caches and attention."""
NO_QUESTION = "?"  # fills up rows to which a reward does not apply
QUESTION = IMAGE_UNDERSTANDING.turn  # a question about an image, answered with a text

# ---- similarity of image and caption


def score_ti_sim(
    samples: Samples,
    context: Context,
    *,
    fixed_spans: bool = False,
    scorer: str = "policy",
    normalise: bool = False,
    chunk: Positive = CHUNK,
) -> np.ndarray:
    """How alike image and caption are in the scorer's last hidden states, in [-1, 1].

    The image re-enters as in understanding, the caption follows it. Every image token's largest
    cosine with a caption token and every caption token's with an image token, averaged.
    `fixed_spans` takes the released positions instead of the caption's own tokens (Q7),
    counted in the unpadded row. `normalise` brings x to (x + 1) / 2, in [0, 1]. `chunk` images
    run at once. NaN for an empty caption.
    Source: arXiv 2505.17534 eq. 4; the released code. Its v3 says "normalised to [0, 1]" and
    gives no formula.
    """
    with context.scorer(scorer) as policy:
        rewards = _similarities(policy, samples, fixed_spans, chunk)
    return (0.5 * (rewards + 1.0) if normalise else rewards).astype(np.float32)


def _similarities(policy: Policy, samples: Samples, fixed_spans: bool, chunk: int) -> np.ndarray:
    captions = [caption or "" for caption in samples.column("prompt")]
    prompt_of = {
        caption: policy.processor.caption_prompt(caption, fixed_spans)
        for caption in dict.fromkeys(captions)
    }
    rows = [prompt_of[caption] for caption in captions]
    prompts = _padded(policy, [row.ids for row in rows])
    padding = prompts.input_ids.shape[1] - np.array([len(row.ids) for row in rows])
    start = (padding + [row.image_start for row in rows]).astype(np.int32)
    is_caption = np.zeros(prompts.attention_mask.shape, bool)
    for padded, row in zip(is_caption, rows, strict=True):
        padded[len(padded) - len(row.ids) :] = row.is_caption
    image_tokens = policy.family.limits(policy.config).input_image_tokens

    def program(prompts: EncodedPrompts, start: jax.Array, is_caption: jax.Array) -> jax.Array:
        return _similarity_program(
            policy.params, prompts, start, is_caption, family=policy.family, sizes=policy.config,
            special=policy.processor.special, dtype=policy.dtype, image_tokens=image_tokens,
        )  # fmt: skip

    (rewards,) = _run(
        policy, samples.require_images(), prompts, (start, is_caption), program, chunk
    )
    return rewards


@functools.partial(jax.jit, static_argnames=("family", "sizes", "special", "dtype", "image_tokens"))
def _similarity_program(
    params: Params,
    prompts: EncodedPrompts,
    image_start: jax.Array,
    is_caption: jax.Array,
    *,
    family: Family,
    sizes: Sizes,
    special: Any,
    dtype: Any,
    image_tokens: int,
) -> jax.Array:
    assert family.hidden_states is not None  # the config was checked
    hidden = family.hidden_states(sizes, params, prompts, special, dtype)
    places = image_start[:, None] + jnp.arange(image_tokens)
    images = jnp.take_along_axis(hidden, places[..., None], axis=1)
    return matched_similarity(images, hidden, is_caption)


def matched_similarity(pictures: jax.Array, tokens: jax.Array, kept: jax.Array) -> jax.Array:
    """Mean best cosine, both ways: pictures [B, I, D] against the kept of tokens [B, P, D].

    `kept` is [B, P] bool; [B] float32, NaN where nothing is kept.
    """
    pictures, tokens = (
        x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
        for x in (pictures.astype(jnp.float32), tokens.astype(jnp.float32))
    )
    cosine = jnp.einsum("bid,btd->bit", pictures, tokens, precision="highest")
    count = kept.sum(axis=-1)
    of_picture = jnp.where(kept[:, None], cosine, -jnp.inf).max(axis=-1).mean(axis=-1)
    of_token = jnp.where(kept, cosine.max(axis=1), 0.0).sum(axis=-1) / jnp.maximum(count, 1)
    return jnp.where(count > 0, 0.5 * (of_picture + of_token), jnp.nan)


# ---- captions and answers


def score_qa(
    samples: Samples,
    context: Context,
    *,
    scorer: str = "policy",
    greedy: bool = True,
    max_new_tokens: Positive = 512,
    chunk: Positive = CHUNK,
) -> np.ndarray:
    """Whether the scorer answers the row's question right from the drawing, in [0, 1].

    The question is the row's `qa_problem`, instructions included. `greedy` false draws the
    answer at temperature 1, as the released code does. NaN without a question or a solution.
    Source: the released code; scores in `text.qa_answer_score`.
    """
    questions = samples.column("qa_problem")
    answers = ask_scorer(
        samples, context, questions, stream="qa", scorer=scorer, greedy=greedy,
        max_new_tokens=max_new_tokens, chunk=chunk,
    )  # fmt: skip
    columns = (samples.column("qa_solution"), read_question_types(samples), questions)
    return _where_asked(questions, score_rows(text.qa_answer_score, answers, *columns))


def score_oc(
    samples: Samples,
    context: Context,
    *,
    substrings: bool = False,
    scorer: str = "policy",
    greedy: bool = True,
    max_new_tokens: Positive = 512,
    chunk: Positive = CHUNK,
) -> np.ndarray:
    """How well the scorer names the class that the drawing should show, in [0, 1].

    As `score_qa`, with `cls_problem` and `cls_solution`, or the `qa_` columns in rows without them.
    `substrings` is the released comparison.
    Source: the released code; scores in `text.oc_answer_score`.
    """
    questions, solutions = read_class_questions(samples)
    answers = ask_scorer(
        samples, context, questions, stream="oc", scorer=scorer, greedy=greedy,
        max_new_tokens=max_new_tokens, chunk=chunk,
    )  # fmt: skip
    score = functools.partial(text.oc_answer_score, substrings=substrings)
    scores = score_rows(score, answers, solutions, samples.column("prompt"))
    return _where_asked(questions, scores)


def score_od(
    samples: Samples,
    context: Context,
    *,
    min_iou: Fraction = 0.5,
    scorer: str = "policy",
    greedy: bool = True,
    max_new_tokens: Positive = 512,
    chunk: Positive = CHUNK,
) -> np.ndarray:
    """How well the scorer finds `od_solution`'s boxes in the drawing, in [0, 1].

    As `score_qa`, with `od_problem` and `od_solution`. Source: ours; see `text.od_answer_score`.
    """
    questions = samples.column("od_problem")
    answers = ask_scorer(
        samples, context, questions, stream="od", scorer=scorer, greedy=greedy,
        max_new_tokens=max_new_tokens, chunk=chunk,
    )  # fmt: skip
    score = functools.partial(text.od_answer_score, min_iou=min_iou)
    return _where_asked(questions, score_rows(score, answers, samples.column("od_solution")))


def _where_asked(questions: Sequence[str | None], scores: np.ndarray) -> np.ndarray:
    asked = np.array([bool((question or "").strip()) for question in questions], bool)
    return np.where(asked, scores, np.nan).astype(np.float32)


def ask_scorer(
    samples: Samples,
    context: Context,
    questions: Sequence[str | None],
    *,
    stream: str,
    scorer: str = "policy",
    greedy: bool,
    max_new_tokens: int,
    chunk: int = CHUNK,
) -> list[str]:
    """The scorer's answers to one question about each image, N strings.

    A row's draws depend on its number, the seed, the step and `stream` (a key of QUESTION_STREAMS).
    Rows without a question are asked something all the same, so that every process of a run
    calls the same programs.
    """
    with context.scorer(scorer) as policy:
        mesh = find_mesh(policy.params)
        first = 0 if mesh is None else process_shard(mesh)[0] * len(samples)
        row = first + np.arange(len(samples))
        keys = sample_keys(context.seed, row, 1, QUESTION_STREAMS[stream])
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys, context.step)
        data = np.asarray(jax.random.key_data(keys))
        return _answers(
            policy, samples.require_images(), questions, data, greedy, max_new_tokens, chunk
        )


def _answers(
    policy: Policy,
    images: np.ndarray,
    questions: Sequence[str | None],
    keys: np.ndarray,
    greedy: bool,
    max_new_tokens: int,
    chunk: int,
) -> list[str]:
    asked = [q if (q or "").strip() else NO_QUESTION for q in questions]
    ids = {question: question_ids(policy.processor, question) for question in dict.fromkeys(asked)}
    prompts = _padded(policy, [ids[question] for question in asked])
    sample = policy.family.turns[QUESTION.segments].sample
    options = SamplingOptions(
        special=policy.processor.special, greedy=greedy, max_new_tokens=max_new_tokens,
        dtype=policy.dtype,
    )  # fmt: skip

    def program(prompts: EncodedPrompts, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
        (answer,) = sample(
            policy.config, policy.params, prompts, jax.random.wrap_key_data(keys), options
        )
        return answer.values, answer.mask

    tokens, mask = _run(policy, images, prompts, (keys,), program, chunk)
    return [policy.processor.decode(row[kept]) for row, kept in zip(tokens, mask, strict=True)]


# ---- running


def pixel_values(processor: Any, images: np.ndarray) -> np.ndarray:
    """uint8 [N, H, W, 3] for the vision tower: [N, S, S, 3], float32, or uint8 as they are.

    What has nothing to resize or pad stays uint8, a quarter of the bytes, for `_normalised` to
    finish on the device.
    """
    if images.shape[1:3] == (processor.image.size, processor.image.size):
        return images
    return np.stack([processor.preprocess_image(Image.fromarray(one)) for one in images])


@jax.jit
def _normalised(levels: jax.Array, images: jax.Array) -> jax.Array:
    """uint8 [N, S, S, 3] by a table [256, 3] of each channel's levels; float32 stays."""
    if images.dtype != jnp.uint8:
        return images
    channels = (jnp.take(levels[:, c], images[..., c], axis=0) for c in range(levels.shape[1]))
    return jnp.stack(list(channels), axis=-1)


def normalised_levels(processor: Any) -> np.ndarray:
    """What each of the 256 levels of a channel becomes, [256, 3] float32.

    A table, because a device's own division by the standard deviation rounds otherwise.
    """
    levels = np.arange(256, dtype=np.float32)[:, None] / np.float32(255)
    mean, std = (np.asarray(x, np.float32) for x in (processor.image.mean, processor.image.std))
    return (levels - mean) / std


def question_ids(processor: Any, question: str) -> list[int]:
    """Returns the prompt of a question about an image, unpadded."""
    return processor.prompt_ids(QUESTION.prompt, {"qa_problem": question})


def _padded(policy: Policy, rows: list[list[int]]) -> EncodedPrompts:
    """Left-padded to the bucket of the longest row of all processes."""
    longest = all_max(max(map(len, rows)))
    return policy.processor.pad(rows, policy.processor.bucket(longest))


def _run(
    policy: Policy,
    images: np.ndarray,
    prompts: EncodedPrompts,
    extras: tuple[np.ndarray, ...],
    program: Callable,
    chunk: int,
) -> list[np.ndarray]:
    """`program(prompts with pixels, *extras)` over all rows: its outputs, each with N rows."""

    def take(index: np.ndarray) -> tuple:
        pixels = pixel_values(policy.processor, images[index])
        piece = EncodedPrompts(prompts.input_ids[index], prompts.attention_mask[index], pixels)
        return (piece, *(extra[index] for extra in extras))

    levels = normalised_levels(policy.processor)

    def finished(piece: EncodedPrompts, *extras: jax.Array) -> Any:
        pixels = _normalised(levels, piece.pixel_values)
        return program(dataclasses.replace(piece, pixel_values=pixels), *extras)

    return run_in_pieces(finished, take, len(images), chunk, policy.params)
