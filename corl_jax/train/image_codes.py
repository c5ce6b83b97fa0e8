"""Prepares given images for the image tokenizer, and turns those of questions into codes.

The images of questions have codes once, before the passes that score their answers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from PIL.Image import Image

from corl_jax.data import images as data_images
from corl_jax.policies.family import Family
from corl_jax.train.run import Run
from corl_jax.train.step import Batch, TaskBatch
from corl_jax.types import Array, Params, Sizes


def fit_pixels(run: Run, images: Sequence[Image]) -> np.ndarray:
    """Returns given images as the family codes them, float32 [N, S, S, 3] in [-1, 1]."""
    fit = run.family.fit_pixels or data_images.fit_pixels
    return fit(images, run.image_side)


def reads_codes(family: Family, sizes: Sizes) -> bool:
    """Returns whether questions have the codes of their images before an update reads them."""
    return family.place_codes is not None and family.reads_codes(sizes)


def read_images(run: Run, params: Params, batch: Batch) -> Batch:
    """Returns the batch with codes in the place of pixels, if the family reads codes.

    No gradient goes through them, so the policy, the old policy and the reference can share them.
    """
    place = run.family.place_codes
    if place is None or not reads_codes(run.family, run.sizes):
        return batch
    codes: dict[int, Array] = {}  # questions and captions may have the same array of pixels

    def read(part: TaskBatch) -> TaskBatch:
        prompts = part.prompts
        pixels = prompts.pixel_values
        if pixels is None:
            return part
        if id(pixels) not in codes:
            codes[id(pixels)] = run.family.encode_images(run.sizes, params, pixels)
        ids = place(prompts.input_ids, codes[id(pixels)], run.processor.special)
        prompts = dataclasses.replace(prompts, input_ids=ids, pixel_values=None)
        return dataclasses.replace(part, prompts=prompts)

    return {name: read(part) for name, part in batch.items()}
