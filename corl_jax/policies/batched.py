"""Samples many prompts in batches of fixed shape.

A sample depends on the seed, its prompt's place in the input and its number. Batch size, the other
prompts and the number of devices change it only by rounding.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

from corl_jax.devices.mesh import make_mesh
from corl_jax.policies import Model
from corl_jax.policies.choices import sample_keys
from corl_jax.policies.family import SamplingOptions
from corl_jax.tasks import IMAGE_GENERATION, IMAGE_UNDERSTANDING, TEXT, Task


@dataclasses.dataclass(frozen=True)
class Sample:
    """One generated image or one answer."""

    prompt: int  # place in the input
    number: int  # among the samples of its prompt
    tokens: np.ndarray  # [T] int32; of an answer up to and including its EOS
    pixels: np.ndarray | None = None  # of an image, uint8 [S, S, 3]


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

    def keys(self, seed: int, stream: int) -> jax.Array:
        """Returns the keys [rows * group], prompt-major."""
        last = self.first + self.group
        keys = sample_keys(seed, self.filled, last, stream)
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


def generate_images(
    model: Model,
    prompts: Sequence[str],
    options: SamplingOptions,
    *,
    samples: int = 1,
    batch_size: int = 16,
    seed: int = 0,
    show_progress: bool = False,
) -> Iterator[Sample]:
    """Yields `samples` images of each prompt."""
    rows = [{"prompt": prompt} for prompt in prompts]
    yield from _sample_turn(
        model, IMAGE_GENERATION, rows, options, None,
        Batching(samples, batch_size, seed, "image", show_progress),
    )  # fmt: skip


def answer_questions(
    model: Model,
    questions: Sequence[str],
    image_of: Callable[[int], Image.Image],
    options: SamplingOptions,
    *,
    system_prompt: str = "",
    samples: int = 1,
    batch_size: int = 16,
    seed: int = 0,
    show_progress: bool = False,
) -> Iterator[Sample]:
    """Yields `samples` answers to each question about its image; `image_of(i)` opens image i."""
    rows = [{"qa_problem": question} for question in questions]
    yield from _sample_turn(
        model, IMAGE_UNDERSTANDING, rows, options, image_of,
        Batching(samples, batch_size, seed, "text", show_progress), system_prompt,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Batching:
    """How many samples, how they are batched, and how progress is shown."""

    samples: int
    batch_size: int
    seed: int
    unit: str
    show_progress: bool


def _sample_turn(
    model: Model, task: Task, rows: Sequence[Mapping[str, Any]],
    options: SamplingOptions, image_of: Callable[[int], Image.Image] | None, batching: Batching,
    system_prompt: str = "",
) -> Iterator[Sample]:  # fmt: skip
    processor, turn = model.processor, task.turn
    program = model.family.turns[turn.segments]
    ids = [processor.prompt_ids(turn.prompt, row, system_prompt) for row in rows]

    def call(piece: Piece) -> tuple[Sequence[Any], ...]:
        images = [image_of(i) for i in piece.filled] if image_of is not None else None
        encoded = processor.encode(
            turn.prompt, [ids[i] for i in piece.filled], images, piece.length
        )
        keys = piece.keys(batching.seed, task.stream)
        result = program.sample(model.sizes, model.params, encoded, keys, options)[-1]
        tokens, mask = np.asarray(result.values), np.asarray(result.mask)
        if result.kind == TEXT:
            return ([row[kept] for row, kept in zip(tokens, mask, strict=True)],)
        pixels = model.family.decode_images(model.sizes, model.params, result.values)
        return tokens, np.asarray(pixels)

    lengths = [processor.bucket(len(row)) for row in ids]
    planned = list(pieces(lengths, batching.samples, batching.batch_size))
    yield from _run(planned, batching.samples, call, batching.unit, batching.show_progress)


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
