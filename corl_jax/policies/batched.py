"""Samples many prompts in batches of fixed shape.

A sample depends on the seed, the position of its prompt in the input, and its number among the
prompt's samples. Batch size, the other prompts and the number of devices change it only by
rounding.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

from corl_jax.devices.batches import to_host_rows
from corl_jax.devices.mesh import make_mesh
from corl_jax.policies import Model, family
from corl_jax.policies.choices import row_keys
from corl_jax.policies.family import SamplingOptions
from corl_jax.policies.turns import bind_sampler, decode_segment, list_tokens, sample_turn
from corl_jax.tasks import (
    IMAGE_GENERATION,
    IMAGE_UNDERSTANDING,
    PLANNED_GENERATION,
    TEXT,
    Task,
)
from corl_jax.types import EncodedPrompts, Segment


@dataclasses.dataclass(frozen=True)
class Sample:
    """One generated image or one answer."""

    prompt: int  # position in the input
    number: int  # among the samples of its prompt
    tokens: np.ndarray  # [T] int32; an answer ends with its EOS
    pixels: np.ndarray | None = None  # of an image, uint8 [S, S, 3]
    plan: np.ndarray | None = None  # [T] int32, of a planned image; a plan ends with its EOS


@dataclasses.dataclass(frozen=True)
class Piece:
    """One call of a sampler: `group` samples of each of some prompts, from number `first` on."""

    length: int  # padded prompt length
    prompts: tuple[int, ...]
    rows: int  # prompts in every call of this length; the last call repeats a prompt to fill up
    first: int
    group: int


def split_in_pieces(lengths: Sequence[int], samples: int, batch_size: int) -> Iterator[Piece]:
    """Splits prompts of padded `lengths`, with `samples` each, into calls of one shape per length.

    No call has more than `batch_size` samples.
    """
    # XLA compiles a program for each shape, which takes longer than a few samples that are thrown
    # away. samples = 10, batch_size = 4: 3 rounds of 4, of which the last gives 2.
    rounds = math.ceil(samples / batch_size)
    group = math.ceil(samples / rounds)
    for length in sorted(set(lengths)):
        members = [i for i, other in enumerate(lengths) if other == length]
        # 5 prompts, at most 4 a call: 2 calls of 3 rows, not one of 4 and one of 1 filled up to 4.
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
    think: bool = False,
    sample: family.Sample | None = None,
) -> Iterator[Sample]:
    """Yields `samples` images of each prompt; with `think` each is drawn after a plan.

    `sample` replaces the family's sampler of images.
    """
    rows = [{"prompt": prompt} for prompt in prompts]
    yield from _sample_turn(
        model, PLANNED_GENERATION if think else IMAGE_GENERATION, rows, options, None,
        Batching(samples, batch_size, seed, "image", show_progress), sample=sample,
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


def answer_rows(
    model: Model,
    rows: Sequence[Mapping[str, Any]],
    images_of: Callable[[int], Sequence[Image.Image]],
    options: SamplingOptions,
    *,
    system_prompt: str = "",
    batch_size: int = 16,
    show_progress: bool = False,
) -> Iterator[Sample]:
    """Yields an answer to each row; `images_of(i)` opens its images, equally many for all rows."""
    yield from _sample_turn(
        model, IMAGE_UNDERSTANDING, rows, options, images_of,
        Batching(1, batch_size, 0, "text", show_progress), system_prompt,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Batching:
    """The number of samples, their batches, and the progress bar."""

    samples: int
    batch_size: int
    seed: int
    unit: str
    show_progress: bool


def _sample_turn(
    model: Model, task: Task, rows: Sequence[Mapping[str, Any]],
    options: SamplingOptions, image_of: Callable[[int], Any] | None, batching: Batching,
    system_prompt: str = "", sample: family.Sample | None = None,
) -> Iterator[Sample]:  # fmt: skip
    processor, turn = model.processor, task.turn
    sample = sample or model.family.turns[task.turn_kinds].sample
    sampler = bind_sampler(sample, model.sizes, options)
    ids = [processor.prompt_ids(turn.prompt, row, system_prompt) for row in rows]

    def call(piece: Piece) -> tuple[Sequence[Any], ...]:
        images = [image_of(i) for i in piece.prompts] if image_of is not None else None
        encoded = processor.encode(
            turn.prompt, [ids[i] for i in piece.prompts], images, piece.length
        )
        # Samples are numbered over all pieces of a prompt, so that the batch size changes no key.
        rollout = sample_turn(
            sampler, model.params, encoded, piece.prompts,
            seed=batching.seed, stream=task.stream, group_size=piece.group, first=piece.first,
            fill_to=piece.rows,
        )  # fmt: skip
        return _read_results(model, rollout.segments)

    lengths = [processor.bucket(len(row)) for row in ids]
    planned = list(split_in_pieces(lengths, batching.samples, batching.batch_size))
    yield from _run_pieces(planned, batching.samples, call, batching.unit, batching.show_progress)


def _read_results(model: Model, segments: Sequence[Segment]) -> tuple[Sequence[Any], ...]:
    """Returns tokens, and for images pixels and plans, each with an entry per row."""
    # The last segment of a turn is its result; a text before it is its plan.
    *plans, segment = segments
    tokens = list_tokens(segment)
    if segment.kind == TEXT:
        return (tokens,)
    pixels = decode_segment(model.family, model.sizes, model.params, model.processor, segment)
    return tokens, pixels, *map(list_tokens, plans)


@dataclasses.dataclass(frozen=True)
class Row:
    """One sample to draw, with the numbers that make its random key."""

    encoded: EncodedPrompts  # of its prompt alone, B = 1
    seed: int
    prompt: int  # position of its prompt in the input
    number: int  # among the samples of its prompt


def sample_rows(
    model: Model, task: Task, rows: Sequence[Row], options: SamplingOptions, fill_to: int
) -> list[Sample]:
    """Returns the sample of each row; prompts of one padded length.

    A sample is the one that `generate_images` or `answer_questions` makes of the same numbers.
    The last row is repeated up to `fill_to` rows, for the shape of an earlier call. Rows of one
    request, which share their encoded prompt, follow each other.
    """
    filled = [*rows, *[rows[-1]] * (fill_to - len(rows))]
    prompts = jax.tree.map(lambda *x: np.concatenate(x), *(row.encoded for row in filled))
    numbers = ([getattr(row, name) for row in filled] for name in ("seed", "prompt", "number"))
    keys = row_keys(*(np.array(values, np.uint32) for values in numbers), stream=task.stream)
    sampler = bind_sampler(model.family.turns[task.turn_kinds].sample, model.sizes, options)
    with jax.set_mesh(_choose_mesh(len(filled))):
        segments = sampler(model.params, prompts, keys)
        tokens = list_tokens(segments[-1])[: len(rows)]
    if segments[-1].kind == TEXT:
        return [Sample(r.prompt, r.number, x) for r, x in zip(rows, tokens, strict=True)]
    pixels = _decode_requests(model, rows, segments[-1])
    plans = [list_tokens(plan)[: len(rows)] for plan in segments[:-1]]
    results = zip(rows, tokens, pixels, *plans, strict=True)
    return [Sample(row.prompt, row.number, *x) for row, *x in results]


def _decode_requests(model: Model, rows: Sequence[Row], drawn: Segment) -> Iterator[np.ndarray]:
    """Yields the image of each row; rows that follow each other with one prompt are a request."""
    # In the shapes in which the request alone is decoded: rounding in another shape changes about
    # one value of a pixel in 40,000 by 1, so that images would depend on who else asked.
    kind, values = drawn.kind, to_host_rows(drawn.values)
    for _, members in itertools.groupby(range(len(rows)), key=lambda i: id(rows[i].encoded)):
        places = list(members)
        segment = Segment(kind, values[places], np.ones(len(places), bool))
        with jax.set_mesh(_choose_mesh(len(places))):
            yield from decode_segment(
                model.family, model.sizes, model.params, model.processor, segment
            )


def _run_pieces(
    planned: Sequence[Piece], samples: int, call: Callable, unit: str, show_progress: bool
) -> Iterator[Sample]:
    """Yields the samples of the pieces; leaves out samples that only fill a batch up."""
    total = samples * len({prompt for piece in planned for prompt in piece.prompts})
    with tqdm(total=total, unit=unit, disable=None if show_progress else True) as bar:
        for piece in planned:
            with jax.set_mesh(_choose_mesh(piece.rows * piece.group)):
                results = zip(*call(piece), strict=True)
            numbers = range(piece.first, piece.first + piece.group)
            places = [(prompt, number) for prompt in piece.prompts for number in numbers]
            # Not strict: the results of repeated prompts come last, and have no place.
            for (prompt, number), result in zip(places, results, strict=False):
                if number < samples:
                    yield Sample(prompt, number, *result)
                    bar.update()


def _choose_mesh(rows: int) -> jax.sharding.Mesh:
    """Returns a mesh of as many devices of this process as divide the rows evenly."""
    # 6 rows on 4 devices: gcd 2, so 2 devices with 3 rows each.
    devices = jax.local_devices()
    return make_mesh(devices=devices[: math.gcd(rows, len(devices))])
