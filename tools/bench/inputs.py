"""Random inputs of fixed sizes: left-padded prompts, completions, images, rows of a data set."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from corl_jax.policies.janus.network import JanusConfig
from corl_jax.policies.janus.tokens import SpecialTokens
from corl_jax.tasks import CODES, TEXT
from corl_jax.train.step import TaskBatch
from corl_jax.types import EncodedPrompts, Segment
from tools.bench.vocabularies import COMMON

SHORTEST = 0.75  # a prompt's least share of the padded length
IMAGE_SIZE = (512, 448)  # width and height of a real image, pixels
CAPTION_WORDS = 12
ENDLESS = -1  # an end of text that no network draws, so that every answer has all its tokens


def _find_plain_ids(config: JanusConfig, special: SpecialTokens) -> np.ndarray:
    """Returns the ids of ordinary tokens."""
    structure = [special.bos, special.eos, special.pad, special.boi, special.eoi, special.image]
    return np.setdiff1d(np.arange(config.llama.vocab_size), structure)


def _make_left_padded(
    rng: np.random.Generator, special: SpecialTokens, plain: np.ndarray, count: int, length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns ids and mask [count, length], starts [count]: BOS and words; row 0 is full."""
    shortest = max(1, round(SHORTEST * length))
    # length 8, 6 tokens: start 2, mask [0, 0, 1, 1, 1, 1, 1, 1], BOS at place 2.
    start = length - rng.integers(shortest, length + 1, count)
    start[0] = 0
    mask = np.arange(length) >= start[:, None]
    ids = np.where(mask, rng.choice(plain, (count, length)), special.pad).astype(np.int32)
    ids[np.arange(count), start] = special.bos
    return ids, mask, start


def make_image_prompts(
    config: JanusConfig, special: SpecialTokens, count: int, length: int, seed: int = 0
) -> EncodedPrompts:
    """Returns prompts [BOS, words, BOI] of different lengths."""
    rng = np.random.default_rng([seed, 0])
    ids, mask, _ = _make_left_padded(rng, special, _find_plain_ids(config, special), count, length)
    ids[:, -1] = special.boi
    return EncodedPrompts(ids, mask)


def make_questions(
    config: JanusConfig, special: SpecialTokens, count: int, length: int, seed: int = 0
) -> EncodedPrompts:
    """Returns questions [BOS, BOI, image, EOI, words] of different lengths, with pixel values."""
    rng = np.random.default_rng([seed, 1])
    slots, side = config.num_image_tokens, config.siglip.image_size
    words, mask, _ = _make_left_padded(
        rng, special, _find_plain_ids(config, special), count, length - slots - 2
    )
    image = np.array([special.boi, *[special.image] * slots, special.eoi], np.int32)
    ids = np.full((count, length), special.pad, np.int32)
    for row, text, real_mask in zip(ids, words, mask, strict=True):
        # [BOS, words] -> [BOS, BOI, image x slots, EOI, words]
        real = np.concatenate([text[real_mask][:1], image, text[real_mask][1:]])
        row[length - len(real) :] = real
    real_mask = np.arange(length) >= length - (mask.sum(axis=1) + len(image))[:, None]
    pixels = rng.standard_normal((count, side, side, 3)).astype(np.float32)
    return EncodedPrompts(ids, real_mask, pixels)


def make_task_batch(
    config: JanusConfig, special: SpecialTokens, prompts: EncodedPrompts, group: int, length: int
) -> TaskBatch:
    """Returns completions of prompts; answers end somewhere in their second half."""
    is_image = prompts.pixel_values is None
    rng = np.random.default_rng(3 + is_image)
    rows = len(prompts.input_ids) * group
    ids = np.arange(config.vq.num_embeddings) if is_image else _find_plain_ids(config, special)
    ends = np.full(rows, length) if is_image else rng.integers(length // 2, length + 1, rows)
    return TaskBatch(
        prompts=prompts,
        segments=(
            Segment(
                CODES if is_image else TEXT,
                rng.choice(ids, (rows, length)).astype(np.int32),
                np.arange(length) < ends[:, None],
                # The log-prob of a uniform choice, close to that of random weights.
                np.full((rows, length), -np.log(len(ids)), np.float32),
            ),
        ),
        advantages=rng.standard_normal(rows).astype(np.float32),
    )


# ---- what rewards read


def make_images(count: int, side: int, seed: int = 0) -> np.ndarray:
    """Returns images of random blocks, uint8 [count, side, side, 3]."""
    rng = np.random.default_rng([seed, 2])
    return np.stack([np.asarray(_make_blocks(rng, (side, side))) for _ in range(count)])


def _make_blocks(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    blocks = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize(size, Image.Resampling.BICUBIC)


def make_rows(count: int, group: int, seed: int = 0) -> dict[str, list[Any]]:
    """Returns columns of `count` data rows, each repeated for the completions of its group."""
    rng = np.random.default_rng([seed, 4])

    def write_sentence() -> str:
        return " ".join(rng.choice(COMMON, CAPTION_WORDS))

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
