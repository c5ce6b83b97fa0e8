"""Rewards in which a unified model looks at the images: similarity, captions, answers.

The option `scorer` chooses the model. `policy` is the policy at this step, as in arXiv 2505.17534.
The reward then changes with the policy, which can exploit it (Q26 in
docs/explained/released_code.md). `initial` is a frozen copy of the run's first policy. Any other
value is the path of a checkpoint.

All rows of a step run through programs of one shape: pieces have equal size, and prompts are
padded to a bucket of the longest.
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
from corl_jax.devices.batches import (
    PendingRows,
    find_mesh,
    plan_pieces,
    process_shard,
    run_in_pieces,
)
from corl_jax.devices.processes import all_max
from corl_jax.policies.family import Family, LogprobOptions, SamplingOptions
from corl_jax.policies.processor import Processor
from corl_jax.policies.turns import Sampler, bind_sampler, decode_segment, sample_turn
from corl_jax.rewards import text
from corl_jax.rewards.samples import (
    Context,
    Policy,
    Samples,
    read_class_questions,
    read_question_types,
    score_rows,
)
from corl_jax.tasks import IMAGE_UNDERSTANDING, QUESTION_STREAMS, TEXT
from corl_jax.types import EncodedPrompts, Params, Segment, Sizes

CHUNK = 64
"""Images of one program; bounds the memory of caches and attention."""
NO_QUESTION = "?"  # for rows to which a reward does not apply
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
) -> PendingRows:
    """Computes R_TIM, the similarity of image and prompt in the scorer's last hidden states.

    The value is in [-1, 1], see `matched_similarity`; NaN for an empty prompt. The scorer reads the
    image and then the prompt, as in image understanding. `fixed_spans` takes the released positions
    instead of the prompt's tokens (Q7), counted in the unpadded row. `normalise` maps x to
    (x + 1) / 2, in [0, 1]. `chunk` images run at once.
    Source: arXiv 2505.17534 eq. 4; the released code.
    """
    # The paper's v3 says "normalised to [0, 1]" without a formula. (x + 1) / 2 keeps the order of
    # negative values, which clipping would lose.
    with context.scorer(scorer) as policy:
        similarities = _measure_similarities(policy, samples, fixed_spans, chunk)
    return similarities.then(lambda x: (0.5 * (x + 1.0) if normalise else x).astype(np.float32))


def _measure_similarities(
    policy: Policy, samples: Samples, fixed_spans: bool, chunk: int
) -> PendingRows:
    family = policy.family
    assert family.hidden_states is not None  # the config was checked
    captions = [caption or "" for caption in samples.column("prompt")]
    # Tokenised once per prompt: the G images of a group share it.
    prompt_of = {
        caption: family.hidden_states.caption_prompt(policy.processor, caption, fixed_spans)
        for caption in dict.fromkeys(captions)
    }
    rows = [prompt_of[caption] for caption in captions]
    ids = [row.ids for row in rows]
    length = _choose_length(policy, ids)
    # Left padding shifts a row's positions. P = 8, 5 ids, image at 1 and 2 -> padding 3, image at
    # 4 and 5: [pad pad pad bos img img cap cap], is_caption [F F F F F F T T]
    is_caption = np.zeros((len(rows), length), bool)
    for padded, row in zip(is_caption, rows, strict=True):
        padded[length - len(row.ids) :] = row.is_caption
    places = np.stack([length - len(row.ids) + row.image_places for row in rows]).astype(np.int32)
    images = samples.require_images()

    def take(index: np.ndarray) -> tuple:
        prompts = encode_questions(policy, [ids[i] for i in index], images[index], length)
        return prompts, places[index], is_caption[index]

    def program(prompts: EncodedPrompts, places: jax.Array, is_caption: jax.Array) -> jax.Array:
        return _compute_similarity(
            policy.params, normalise_pixels(policy, prompts), places, is_caption,
            family=family, sizes=policy.config, special=policy.processor.special,
            dtype=policy.dtype,
        )  # fmt: skip

    return run_in_pieces(program, take, len(rows), chunk, policy.params)[0]


@functools.partial(jax.jit, static_argnames=("family", "sizes", "special", "dtype"))
def _compute_similarity(
    params: Params,
    prompts: EncodedPrompts,
    image_places: jax.Array,
    is_caption: jax.Array,
    *,
    family: Family,
    sizes: Sizes,
    special: Any,
    dtype: Any,
) -> jax.Array:
    assert family.hidden_states is not None  # the config was checked
    hidden = family.hidden_states.compute(sizes, params, prompts, special, dtype)
    # The places differ by row, [B, I] = [[4, 5, 6], [2, 3, 4]]; hidden [B, P, D] -> [B, I, D].
    images = jnp.take_along_axis(hidden, image_places[..., None], axis=1)
    return matched_similarity(images, hidden, is_caption)


def matched_similarity(images: jax.Array, tokens: jax.Array, is_caption: jax.Array) -> jax.Array:
    """Computes the mean of the best cosines in both directions, [B] float32 in [-1, 1].

    `images` [B, I, D] are states of image tokens, `tokens` [B, P, D] states of the whole prompt.
    `is_caption` [B, P] bool selects the caption's tokens. Each image token's best caption token and
    each caption token's best image token count. NaN without a caption token.
    Source: arXiv 2505.17534 eq. 4.
    """
    # float32, also inside the products: the released code computes in bfloat16.
    images, tokens = (
        x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
        for x in (images.astype(jnp.float32), tokens.astype(jnp.float32))
    )
    cosine = jnp.einsum("bid,btd->bit", images, tokens, precision="highest")
    count = is_caption.sum(axis=-1)
    # cosine [B, I, P]: other tokens must win no maximum over P, hence -inf, and must add nothing to
    # the sum over P, hence 0.
    of_image = jnp.where(is_caption[:, None], cosine, -jnp.inf).max(axis=-1).mean(axis=-1)
    of_token = jnp.where(is_caption, cosine.max(axis=1), 0.0).sum(axis=-1) / jnp.maximum(count, 1)
    return jnp.where(count > 0, 0.5 * (of_image + of_token), jnp.nan)


# ---- captions and answers


def score_qa(
    samples: Samples,
    context: Context,
    *,
    scorer: str = "policy",
    greedy: bool = True,
    max_new_tokens: Positive = 512,
    chunk: Positive = CHUNK,
) -> PendingRows:
    """Scores the scorer's answer to the row's question about the generated image, in [0, 1].

    The question is the row's `qa_problem`, instructions included. `greedy` false samples the answer
    at temperature 1, as the released code does. NaN without a question or a solution.
    Source: the released code; scores in `text.qa_answer_score`.
    """
    questions = samples.column("qa_problem")
    columns = (samples.column("qa_solution"), read_question_types(samples), questions)
    wait_for_answers = ask_scorer(
        samples, context, questions, stream="qa", scorer=scorer, greedy=greedy,
        max_new_tokens=max_new_tokens, chunk=chunk,
    )  # fmt: skip

    def finish() -> np.ndarray:
        scores = score_rows(text.qa_answer_score, wait_for_answers(), *columns)
        return _blank_unasked_rows(questions, scores)

    return PendingRows(finish)


def score_oc(
    samples: Samples,
    context: Context,
    *,
    substrings: bool = False,
    scorer: str = "policy",
    greedy: bool = True,
    max_new_tokens: Positive = 512,
    chunk: Positive = CHUNK,
) -> PendingRows:
    """Scores the class that the scorer names for the generated image, in [0, 1].

    Works as `score_qa` with `cls_problem` and `cls_solution`, or the `qa_` columns in rows without
    them. `substrings` is the released comparison.
    Source: the released code; scores in `text.oc_answer_score`.
    """
    questions, solutions = read_class_questions(samples)
    wait_for_answers = ask_scorer(
        samples, context, questions, stream="oc", scorer=scorer, greedy=greedy,
        max_new_tokens=max_new_tokens, chunk=chunk,
    )  # fmt: skip
    score = functools.partial(text.oc_answer_score, substrings=substrings)

    def finish() -> np.ndarray:
        scores = score_rows(score, wait_for_answers(), solutions, samples.column("prompt"))
        return _blank_unasked_rows(questions, scores)

    return PendingRows(finish)


def score_od(
    samples: Samples,
    context: Context,
    *,
    min_iou: Fraction = 0.5,
    scorer: str = "policy",
    greedy: bool = True,
    max_new_tokens: Positive = 512,
    chunk: Positive = CHUNK,
) -> PendingRows:
    """Scores the boxes that the scorer detects in the generated image, in [0, 1].

    Works as `score_qa` with `od_problem` and `od_solution`.
    Source: ours; see `text.od_answer_score`.
    """
    questions = samples.column("od_problem")
    wait_for_answers = ask_scorer(
        samples, context, questions, stream="od", scorer=scorer, greedy=greedy,
        max_new_tokens=max_new_tokens, chunk=chunk,
    )  # fmt: skip
    score = functools.partial(text.od_answer_score, min_iou=min_iou)

    def finish() -> np.ndarray:
        scores = score_rows(score, wait_for_answers(), samples.column("od_solution"))
        return _blank_unasked_rows(questions, scores)

    return PendingRows(finish)


def score_answer_logprob(
    samples: Samples, context: Context, *, scorer: str = "policy", chunk: Positive = CHUNK
) -> PendingRows:
    """Computes how likely the scorer finds the true answer about the generated image, in [0, 1].

    The value is exp of the mean log-probability of the tokens of `qa_solution` and of the end
    token, given the image and `qa_problem`. NaN without a question or a solution.
    Source: ours; a denser reward for agreement with oneself (arXiv 2505.23380).
    """
    images, questions = samples.require_images(), samples.column("qa_problem")
    solutions = samples.column("qa_solution")
    with context.scorer(scorer) as policy:
        processor = policy.processor
        ids = [question_ids(processor, question or NO_QUESTION) for question in questions]
        length = _choose_length(policy, ids)
        rows = [[*processor.answer_ids(text or ""), processor.special.eos] for text in solutions]
        width = _choose_length(policy, rows)
        lengths = np.array([len(row) for row in rows])
        tokens = np.array([row + row[-1:] * (width - len(row)) for row in rows], np.int32)
        mask = np.arange(width) < lengths[:, None]

        def take(index: np.ndarray) -> tuple:
            prompts = encode_questions(policy, [ids[i] for i in index], images[index], length)
            return prompts, tokens[index], mask[index]

        def program(prompts: EncodedPrompts, tokens: jax.Array, mask: jax.Array) -> jax.Array:
            return _compute_likelihood(
                policy.params, normalise_pixels(policy, prompts), Segment(TEXT, tokens, mask),
                family=policy.family, sizes=policy.config, special=processor.special,
                dtype=policy.dtype,
            )  # fmt: skip

        scores = run_in_pieces(program, take, len(rows), chunk, policy.params)[0]
    has_solution = np.array([bool((text or "").strip()) for text in solutions], bool)
    return scores.then(lambda x: _blank_unasked_rows(questions, np.where(has_solution, x, np.nan)))


@functools.partial(jax.jit, static_argnames=("family", "sizes", "special", "dtype"))
def _compute_likelihood(
    params: Params, prompts: EncodedPrompts, answer: Segment, *, family: Family, sizes: Sizes,
    special: Any, dtype: Any,
) -> jax.Array:  # fmt: skip
    score = family.turns[IMAGE_UNDERSTANDING.turn_kinds].logprobs
    options = LogprobOptions(special, remat="none")
    ((logprobs, *_),) = score(sizes, family.cast(params, dtype), prompts, (answer,), options)
    total = jnp.where(answer.mask, logprobs, 0.0).sum(axis=-1)
    return jnp.exp(total / answer.mask.sum(axis=-1))


def _blank_unasked_rows(questions: Sequence[str | None], scores: np.ndarray) -> np.ndarray:
    # These rows were asked NO_QUESTION, see `ask_scorer`; their answers mean nothing.
    has_question = np.array([bool((question or "").strip()) for question in questions], bool)
    return np.where(has_question, scores, np.nan).astype(np.float32)


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
) -> Callable[[], list[str]]:
    """Asks the scorer one question about each image, without waiting for the answers.

    Returns a function that waits for them, N strings. A row's random numbers depend on its number
    in the batch, the seed, the step and `stream`, a key of QUESTION_STREAMS. A row without a
    question gets NO_QUESTION.
    """
    images = samples.require_images()
    # Rows without a question run too, so that every process of a run calls the same programs.
    texts = [q if q and q.strip() else NO_QUESTION for q in questions]
    with context.scorer(scorer) as policy:
        ids_of = {text: question_ids(policy.processor, text) for text in dict.fromkeys(texts)}
        ids = [ids_of[text] for text in texts]
        length = _choose_length(policy, ids)
        # Numbers of the global batch: 2 processes with 4 rows each -> [0..3] and [4..7]. So the
        # answers do not depend on the number of processes.
        mesh = find_mesh(policy.params)
        first = 0 if mesh is None else process_shard(mesh)[0] * len(samples)
        sampler = _bind_answering(policy, greedy, max_new_tokens)
        pieces, place = plan_pieces(len(samples), chunk, policy.params)
        answers = [
            sample_turn(
                sampler, policy.params,
                encode_questions(policy, [ids[i] for i in index], images[index], length),
                first + index, seed=context.seed, stream=QUESTION_STREAMS[stream],
                step=context.step, place=place,
            ).segments[-1]
            for index in pieces
        ]  # fmt: skip
        model = (policy.family, policy.config, policy.params, policy.processor)

    def wait() -> list[str]:
        texts = [text for answer in answers for text in decode_segment(*model, answer)]
        # Without the rows that fill up the last piece.
        return texts[: len(samples)]

    return wait


def _bind_answering(policy: Policy, greedy: bool, max_new_tokens: int) -> Sampler:
    """Returns the sampler of answers to prompts that `encode_questions` made."""
    options = SamplingOptions(
        special=policy.processor.special, greedy=greedy, max_new_tokens=max_new_tokens,
        dtype=policy.dtype,
    )  # fmt: skip
    sample = bind_sampler(
        policy.family.turns[IMAGE_UNDERSTANDING.turn_kinds].sample, policy.config, options
    )
    return lambda params, prompts, keys: sample(params, normalise_pixels(policy, prompts), keys)


# ---- prompts


def question_ids(processor: Processor, question: str) -> list[int]:
    """Returns the prompt of a question about an image, unpadded."""
    return processor.prompt_ids(QUESTION.prompt, {"qa_problem": question})


def _choose_length(policy: Policy, rows: list[list[int]]) -> int:
    """Returns the padded length of prompts: the bucket of the longest row of all processes."""
    # Of all processes: they must call the same program, and its shape depends on the length.
    return policy.processor.bucket(all_max(max(map(len, rows))))


def encode_questions(
    policy: Policy, ids: list[list[int]], images: np.ndarray, length: int
) -> EncodedPrompts:
    """Returns questions about images uint8 [N, H, W, 3] on the host.

    Their pixel values are still uint8 if `normalise_pixels` can finish them on the device.
    """
    processor, side = policy.processor, policy.family.limits(policy.config).input_image_side
    # Generated images usually have this size. As uint8 they are a quarter of the bytes to move to
    # the device.
    if policy.family.normalise_pixels is not None and images.shape[1:3] == (side, side):
        return dataclasses.replace(processor.pad(ids, length), pixel_values=images)
    pictures = [Image.fromarray(image) for image in images]
    return processor.encode(QUESTION.prompt, ids, pictures, length)


def normalise_pixels(policy: Policy, prompts: EncodedPrompts) -> EncodedPrompts:
    """Finishes, on the device, the pixel values that `encode_questions` left as uint8."""
    normalise, pixels = policy.family.normalise_pixels, prompts.pixel_values
    if normalise is None or pixels is None or pixels.dtype != jnp.uint8:
        return prompts
    return dataclasses.replace(prompts, pixel_values=normalise(policy.processor, pixels))
