"""Measures what a model's image tokenizer loses of the drawn world, by the exact checker."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from corl_jax.data.drawn_world import checker, generator, scene
from corl_jax.data.drawn_world.held_out import HELD_OUT_SEEDS
from corl_jax.devices.batches import split_rows
from corl_jax.errors import InputError
from corl_jax.evaluation.intervals import Rate
from corl_jax.policies import Model, load_policy

BATCH = 100  # images encoded at once


def measure_roundtrip(model: Path, rows: int, seed: int) -> Rate:
    """Measures how many of `rows` held-out images the checker accepts after the round trip.

    Raises: InputError for wrong numbers, for a model that cannot be read, and for too small images.
    """
    limits = {"--rows": (rows, 1), "--seed": (seed, 0)}
    problems = [
        f"{name}: found {value}, expected an integer of at least {least}"
        for name, (value, least) in limits.items()
        if value < least
    ]
    if problems:
        raise InputError(problems)
    loaded = load_policy(model)
    side = loaded.family.limits(loaded.sizes).image_side
    world = scene.choose_world(side)
    if side < (least := scene.WORLDS[world].min_image_size):
        raise InputError(
            f"{loaded.folder}: generates images of {side} pixels a side; the drawn world "
            f"needs at least {least}"
        )
    hits = 0
    for index in split_rows(rows, BATCH):
        chunk_rows = [
            generator.make_row(
                HELD_OUT_SEEDS + seed, int(i), side, "test", encode=False, world=world
            )
            for i in index
        ]
        decoded = reconstruct(loaded, np.stack([row["real_image"] for row in chunk_rows]))
        fresh = len(np.unique(index))  # a last chunk [8, 9, 9, 9] has 2 images, the rest fills it
        specs = [row["spec"] for row in chunk_rows[:fresh]]
        hits += sum(checker.check_all(decoded[:fresh], specs))
    return Rate.of(hits, rows)


def reconstruct(model: Model, images: np.ndarray) -> np.ndarray:
    """Encodes and decodes images uint8 [N, S, S, 3]."""
    # 0..255 -> [-1, 1], as the image tokenizer reads them.
    pixels = jnp.asarray(images, jnp.float32) / 127.5 - 1.0
    codes = model.family.encode_images(model.sizes, model.params, pixels)
    decoded = model.family.decode_images(model.sizes, model.params, codes)
    return np.asarray(jax.device_get(decoded))
