"""Many prompts through the samplers: batches of fixed shape, samples in whatever order.

A sample depends on the seed, its prompt's place in the input and its number, and on nothing
else: batch size, company and devices change it only where rounding decides a near tie.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

from corl_jax.devices.mesh import make_mesh
from corl_jax.policies.janus import sampling
from corl_jax.startup import Model
from corl_jax.types import STREAMS


@dataclasses.dataclass(frozen=True)
class Sample:
    """One drawing or one answer."""

    prompt: int  # place in the input
    number: int  # among the samples of its prompt
    tokens: np.ndarray  # [T] int32; of an answer up to and including its EOS
    pixels: np.ndarray | None = None  # of a drawing, uint8 [S, S, 3]


@dataclasses.dataclass(frozen=True)
class Piece:
    """One call of a sampler: `group` samples, from number `first` on, of each of some prompts."""

    length: int  # padded prompt length
    prompts: tuple[int, ...]
    rows: int  # prompts in every call of this length; the last call repeats one to fill up
    first: int
    group: int

    @property
    def filled(self) -> list[int]:
        return [*self.prompts, *[self.prompts[0]] * (self.rows - len(self.prompts))]

    def keys(self, seed: int, task: str) -> jax.Array:
        """[rows * group], prompt-major."""
        last = self.first + self.group
        keys = sampling.sample_keys(seed, self.filled, last, STREAMS[task])
        return keys.reshape(self.rows, last)[:, self.first :].reshape(-1)


def pieces(lengths: Sequence[int], samples: int, batch_size: int) -> Iterator[Piece]:
    """Splits prompts of padded `lengths`, `samples` each, into calls of `batch_size` at most.

    All calls of one length have one shape, hence one program.
    """
    rounds = math.ceil(samples / batch_size)
    group = math.ceil(samples / rounds)
    for length in sorted(set(lengths)):
        members = [i for i, other in enumerate(lengths) if other == length]
        calls = math.ceil(len(members) / (batch_size // group))
        rows = math.ceil(len(members) / calls)
        for start in range(0, len(members), rows):
            for number in range(rounds):
                prompts = tuple(members[start : start + rows])
                yield Piece(length, prompts, rows, number * group, group)


def draw_images(
    model: Model,
    prompts: Sequence[str],
    *,
    dtype: Any,
    samples: int = 1,
    batch_size: int = 16,
    seed: int = 0,
    show_progress: bool = False,
    **options: Any,
) -> Iterator[Sample]:
    """Drawings of each prompt; `options` as those of `sampling.sample_images`."""
    config, params, processor, _ = model
    bucket = processor.bucket
    lengths = [bucket(len(processor.t2i_ids(prompt))) for prompt in prompts]

    def call(piece: Piece) -> tuple[np.ndarray, np.ndarray]:
        rollout = sampling.sample_images(
            config, params,
            processor.encode_t2i([prompts[i] for i in piece.filled], piece.length),
            piece.keys(seed, "t2i"), special=processor.special, dtype=dtype, **options,
        )  # fmt: skip
        pixels = sampling.decode_images(config, params, rollout.tokens)
        return np.asarray(rollout.tokens), np.asarray(pixels)

    planned = list(pieces(lengths, samples, batch_size))
    yield from _run(planned, samples, call, "image", show_progress)


def answer_questions(
    model: Model,
    questions: Sequence[str],
    image_of: Callable[[int], Image.Image],
    *,
    dtype: Any,
    system_prompt: str = "",
    samples: int = 1,
    batch_size: int = 16,
    seed: int = 0,
    show_progress: bool = False,
    **options: Any,
) -> Iterator[Sample]:
    """Answers to each question about its picture; `options` as of `sampling.sample_text`."""
    config, params, processor, _ = model
    lengths = [processor.bucket(len(processor.mm2t_ids(q, system_prompt))) for q in questions]

    def call(piece: Piece) -> tuple[list[np.ndarray]]:
        encoded = processor.encode_mm2t(
            [questions[i] for i in piece.filled], [image_of(i) for i in piece.filled],
            piece.length, system_prompt,
        )  # fmt: skip
        rollout = sampling.sample_text(
            config, params, encoded, piece.keys(seed, "mm2t"),
            special=processor.special, dtype=dtype, **options,
        )  # fmt: skip
        tokens, mask = np.asarray(rollout.tokens), np.asarray(rollout.mask)
        return ([row[kept] for row, kept in zip(tokens, mask, strict=True)],)

    planned = list(pieces(lengths, samples, batch_size))
    yield from _run(planned, samples, call, "text", show_progress)


def _run(
    planned: Sequence[Piece], samples: int, call: Callable, unit: str, show_progress: bool
) -> Iterator[Sample]:
    """The pieces' samples, without what only filled a batch up."""
    total = samples * len({prompt for piece in planned for prompt in piece.prompts})
    with tqdm(total=total, unit=unit, disable=None if show_progress else True) as bar:
        for piece in planned:
            with jax.set_mesh(_mesh(piece.rows * piece.group)):
                results = zip(*call(piece), strict=True)
            numbers = range(piece.first, piece.first + piece.group)
            places = [(prompt, number) for prompt in piece.prompts for number in numbers]
            for (prompt, number), result in zip(places, results, strict=False):
                if number < samples:
                    yield Sample(prompt, number, *result)
                    bar.update()


def _mesh(rows: int) -> jax.sharding.Mesh:
    """As many of this process's devices as the rows divide among evenly."""
    devices = jax.local_devices()
    return make_mesh(devices=devices[: math.gcd(rows, len(devices))])
