"""Measures what the image tokenizer of a Janus loses of the drawn world, by the exact checker."""

from __future__ import annotations

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from corl_jax.data.drawn_world import checker, generator, scene
from corl_jax.data.drawn_world.held_out import HELD_OUT_SEEDS
from corl_jax.devices.batches import split_rows
from corl_jax.errors import InputError
from corl_jax.evaluation.intervals import Rate
from corl_jax.policies import load_policy
from corl_jax.policies.janus.images import decode_images, encode_images
from corl_jax.policies.janus.network import JanusConfig
from corl_jax.types import Params

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
    config, params, folder = loaded.sizes, loaded.params, loaded.folder
    # 64 tokens of 8 x 8 pixels: isqrt(64) * 8 = 64 pixels a side.
    side = math.isqrt(config.num_image_tokens) * config.vq.downsample
    world = scene.choose_world(side)
    if side < (least := scene.WORLDS[world].min_image_size):
        raise InputError(
            f"{folder}: generates images of {side} pixels a side; the drawn world needs at least "
            f"{least}"
        )
    hits = 0
    for index in split_rows(rows, BATCH):
        chunk_rows = [
            generator.make_row(
                HELD_OUT_SEEDS + seed, int(i), side, "test", encode=False, world=world
            )
            for i in index
        ]
        decoded = reconstruct(config, params, np.stack([row["real_image"] for row in chunk_rows]))
        fresh = len(np.unique(index))  # a last chunk [8, 9, 9, 9] has 2 images, the rest fills it
        specs = [row["spec"] for row in chunk_rows[:fresh]]
        hits += sum(checker.check_all(decoded[:fresh], specs))
    return Rate.of(hits, rows)


def reconstruct(config: JanusConfig, params: Params, images: np.ndarray) -> np.ndarray:
    """Encodes and decodes images uint8 [N, S, S, 3]."""
    # 0..255 -> [-1, 1], as the image tokenizer reads them.
    pixels = jnp.asarray(images, jnp.float32) / 127.5 - 1.0
    codes = encode_images(config, params, pixels)
    return np.asarray(jax.device_get(decode_images(config, params, codes)))
