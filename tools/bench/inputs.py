"""Random inputs of fixed sizes: left-padded prompts, completions, images, rows of a data set."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from PIL import Image

from corl_jax.policies.denoising import STEPS, take_step_transitions
from corl_jax.policies.family import NOISE_KEYS
from corl_jax.tasks import CODES, LATENTS, TEXT
from corl_jax.train.step import TaskBatch
from corl_jax.types import EncodedPrompts, Segment
from tools.bench.sizes import Size
from tools.bench.vocabularies import COMMON

SHORTEST = 0.75  # a prompt's least share of the padded length
IMAGE_SIZE = (512, 448)  # width and height of a real image, pixels
CAPTION_WORDS = 12
ENDLESS = -1  # an end of text that no network draws, so that every answer has all its tokens


def _find_plain_ids(size: Size, special: Any) -> np.ndarray:
    """Returns the ids of ordinary tokens."""
    structure = dataclasses.astuple(special)
    return np.setdiff1d(np.arange(size.measured.count_words(size.policy)), structure)


def _make_prompts(
    size: Size, special: Any, task: str, count: int, length: int, seed: list[int]
) -> EncodedPrompts:
    """Returns left-padded prompts [count, length] of different lengths; row 0 is full."""
    rng = np.random.default_rng(seed)
    front, back = size.measured.make_frame(task, special, size.limits.input_image_tokens)
    most, plain = length - len(front) - len(back), _find_plain_ids(size, special)
    counts = rng.integers(max(1, round(SHORTEST * most)), most + 1, count)
    counts[0] = most
    ids = np.full((count, length), special.pad, np.int32)
    for row, words in zip(ids, counts, strict=True):
        # length 8, 3 words, front [BOS], back [BOI]: [PAD, PAD, PAD, BOS, a, b, c, BOI]
        real = [*front, *rng.choice(plain, words), *back]
        row[length - len(real) :] = real
    lengths = counts + len(front) + len(back)
    return EncodedPrompts(ids, np.arange(length) >= length - lengths[:, None])


def make_image_prompts(
    size: Size, special: Any, count: int, length: int, seed: int = 0
) -> EncodedPrompts:
    """Returns prompts of images, of different lengths."""
    return _make_prompts(size, special, "t2i", count, length, [seed, 0])


def make_questions(
    size: Size, special: Any, count: int, length: int, seed: int = 0
) -> EncodedPrompts:
    """Returns questions about an image, of different lengths, with pixel values."""
    prompts = _make_prompts(size, special, "mm2t", count, length, [seed, 1])
    side = size.limits.input_image_side
    pixels = np.random.default_rng([seed, 2]).standard_normal((count, side, side, 3))
    return dataclasses.replace(prompts, pixel_values=pixels.astype(np.float32))


def make_task_batch(
    size: Size, special: Any, prompts: EncodedPrompts, group: int, length: int
) -> TaskBatch:
    """Returns completions of prompts; answers end somewhere in their second half.

    `length` is the number of tokens, which images that are made by denoising do not have.
    """
    is_image = prompts.pixel_values is None
    if is_image and size.family.denoises:
        return _make_denoised_batch(size, prompts, len(prompts.input_ids) * group)
    kind = CODES if is_image else TEXT
    rng = np.random.default_rng(3 + is_image)
    rows = len(prompts.input_ids) * group
    codes = np.arange(size.measured.count_codes(size.policy))
    ids = codes if is_image else _find_plain_ids(size, special)
    ends = np.full(rows, length) if is_image else rng.integers(length // 2, length + 1, rows)
    values = rng.choice(ids, (rows, length)).astype(np.int32)
    # The log-prob of a uniform choice, close to that of random weights.
    logprobs = np.full((rows, length), -np.log(len(ids)), np.float32)
    advantages, replay = rng.standard_normal(rows).astype(np.float32), {}
    if is_image and size.family.turns[((CODES,),)].choose_scored:
        # The bits of a key for each image, which choose the codes that are scored.
        replay = {NOISE_KEYS: rng.integers(0, 2**32, (rows, 2), np.uint32)}
    mask = np.arange(length) < ends[:, None]
    return TaskBatch(prompts, (Segment(kind, values, mask, logprobs, replay),), advantages)


def _make_denoised_batch(size: Size, prompts: EncodedPrompts, rows: int) -> TaskBatch:
    """Returns images with noisy steps from random latents, as if their velocities had been 0."""
    rng, denoising = np.random.default_rng(4), size.denoising
    shape = (rows, denoising.steps + 1, *size.policy.latent_shape)
    latents = rng.standard_normal(shape, np.float32)
    low, high = denoising.window.starts
    length = denoising.window.length
    assert length is not None, "sizes that denoise state their window"
    steps = rng.integers(low, high + 1, rows)[:, None] + np.arange(length)
    moves = take_step_transitions(jnp.asarray(steps), denoising)
    keep, std = (np.asarray(x).reshape(rows, length, 1, 1, 1) for x in (moves.keep, moves.std))
    for number in range(length):  # in order: a step begins where the one before ends
        places = np.arange(rows), steps[:, number]
        noise = rng.standard_normal(latents[places].shape, np.float32)
        latents[places[0], places[1] + 1] = (
            keep[:, number] * latents[places] + std[:, number] * noise
        )
    # The mean log-prob of Gaussian noise: its square is 1 on average.
    logprobs = np.float32(-0.5 - 0.5 * np.log(2 * np.pi)) - np.log(std.reshape(steps.shape))
    segment = Segment(
        LATENTS, latents, np.ones(steps.shape, bool), logprobs.astype(np.float32),
        {STEPS: steps.astype(np.int32)},
    )  # fmt: skip
    return TaskBatch(prompts, (segment,), rng.standard_normal(rows).astype(np.float32))


# ---- what rewards read


def make_images(count: int, side: int, seed: int = 0) -> np.ndarray:
    """Returns images of random blocks, uint8 [count, side, side, 3]."""
    rng = np.random.default_rng([seed, 2])
    return np.stack([np.asarray(_make_blocks(rng, (side, side))) for _ in range(count)])


def _make_blocks(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    blocks = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize(size, Image.Resampling.BICUBIC)


def make_rows(
    count: int, group: int, seed: int = 0, words: int = CAPTION_WORDS
) -> dict[str, list[Any]]:
    """Returns columns of `count` data rows, each repeated for the completions of its group.

    `words` are those of a prompt or a question.
    """
    rng = np.random.default_rng([seed, 4])

    def write_sentence() -> str:
        return " ".join(rng.choice(COMMON, words))

    def make_row(number: int) -> dict[str, Any]:
        kind = "MC" if number % 2 else "OE"
        choices = "Options:\nA. one\nB. two\nC. three\nD. four"
        return {
            "prompt": write_sentence(),
            "real_image": _make_blocks(rng, IMAGE_SIZE),
            "qa_problem": f"{write_sentence()}?\n{choices if kind == 'MC' else ''}",
            "qa_solution": f"<answer>{'B' if kind == 'MC' else write_sentence()}</answer>",
            "qa_type": kind,
            "cls_problem": "What is in the picture?",
            "cls_solution": f"<answer>{rng.choice(COMMON)}</answer>",
        }

    made = [make_row(number) for number in range(count)]
    return {name: [row[name] for row in made for _ in range(group)] for name in made[0]}


def make_answers(count: int, words: int, seed: int = 0) -> list[str]:
    """Returns texts of about `words` words: well-formed, with few answers, some without tags."""
    rng = np.random.default_rng([seed, 5])

    def write_answer(number: int) -> str:
        thought = " ".join(rng.choice(COMMON, max(1, words)))
        answer = rng.choice(["B", "B. two", "four", " ".join(rng.choice(COMMON, CAPTION_WORDS))])
        if number % 4 == 3:
            return f"{thought} {answer}"
        return f"<think>{thought}</think>\n<answer>{answer}</answer>"

    return [write_answer(number) for number in range(count)]
