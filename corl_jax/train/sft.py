"""The supervised stage (cold SFT): both tasks on one language model, by next-token loss.

Three kinds of rows come from each data row: the caption draws the image (`t2i`), the question
is answered (`mm2t`), and, if the data has captions, the captioning instruction is answered
(`caption`). Targets of `t2i` are the codes that the frozen VQ encoder gives the row's image.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageOps

from corl_jax.data import instructions
from corl_jax.data.columns import ANSWER_COLUMN
from corl_jax.devices.processes import all_max
from corl_jax.params import merge
from corl_jax.policies.janus import network
from corl_jax.policies.janus.network import JanusConfig
from corl_jax.policies.janus.sampling import unconditional_ids
from corl_jax.train.run import Iteration, Run, put
from corl_jax.train.step import Batch, TaskBatch, TrainState
from corl_jax.types import Params, Prompts, SpecialTokens

CFG_DROPOUT = 0.1
"""Fraction of image prompts that are blanked, so that the model learns guidance's unconditional
rows."""


def sft_iteration(run: Run, state: TrainState, prompts: Prompts, step: int):
    """(next state, Iteration) of one batch of rows."""
    with run.phases("data"):
        batch = put(run, supervised_batch(run, prompts, step))
        if "t2i" in batch:
            params = merge(state.params, run.frozen)
            codes = encode_images(run.model_config, params, batch["t2i"].tokens)
            ones = jnp.ones(codes.shape, bool)
            batch["t2i"] = dataclasses.replace(batch["t2i"], tokens=codes, mask=ones)
    with run.phases("update"):
        state, metrics = run.train_step(state, run.frozen, batch)
    return state, Iteration(metrics, {}, {}, [metrics])


def supervised_batch(run: Run, prompts: Prompts, step: int) -> Batch:
    """The rows of each kind as host arrays; `t2i` carries pixels where its codes will stand."""
    options, columns = run.sft, prompts.columns
    questions: Any = prompts.mm2t
    batch: Batch = {}
    if options.t2i_weight:
        total = run.train_loader.batch_size  # drawn for all processes, of which this takes its own
        draws = np.random.default_rng([run.seed, step, step * total]).random(total)
        dropped = draws[prompts.index - step * total] < CFG_DROPOUT
        encoded = blank_prompts(prompts.t2i, dropped, run.processor.special)
        pixels = np.stack([drawing_pixels(x, run.image_side) for x in columns["real_image"]])
        batch["t2i"] = TaskBatch(encoded, pixels, np.ones(len(prompts), bool))
    batch["mm2t"] = TaskBatch(questions, *targets(run, columns[ANSWER_COLUMN]))
    if options.caption_column:
        ids = run.processor.mm2t_ids(instructions.CAPTION)
        encoded = run.processor.pad([ids] * len(prompts))
        encoded = dataclasses.replace(encoded, pixel_values=questions.pixel_values)
        batch["caption"] = TaskBatch(encoded, *targets(run, columns[options.caption_column]))
    return batch


def blank_prompts(prompts: Any, dropped: np.ndarray, special: SpecialTokens) -> Any:
    """Dropped rows become guidance's unconditional rows, so that the model learns them."""
    blank = np.asarray(unconditional_ids(prompts.input_ids, special))
    ids = np.where(dropped[:, None], blank, prompts.input_ids)
    return dataclasses.replace(prompts, input_ids=ids)


def targets(run: Run, answers: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, mask) [B, T]: each answer and EOS, right-padded to a bucket."""
    processor = run.processor
    rows = [[*processor.answer_ids(text), processor.special.eos] for text in answers]
    length = processor.bucket(all_max(max(map(len, rows))))
    tokens = np.full((len(rows), length), processor.special.eos, np.int32)
    mask = np.zeros((len(rows), length), bool)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = row
        mask[index, : len(row)] = True
    return tokens, mask


def drawing_pixels(image: Image.Image, side: int) -> np.ndarray:
    """The centre square of an image as float32 [side, side, 3] in [-1, 1]."""
    if image.size != (side, side):
        image = ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC)
    return np.asarray(image, np.float32) / 127.5 - 1.0


@functools.partial(jax.jit, static_argnames="config")
def encode_images(config: JanusConfig, params: Params, pixels: jax.Array) -> jax.Array:
    """Codes [B, T] of pixels [B, S, S, 3] in [-1, 1], in float32."""
    return network.bind(config, network.cast(params, jnp.float32)).vqmodel.encode(pixels)
