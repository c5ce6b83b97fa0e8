"""Measures answers that end at different lengths: their rollout, and the update that reads them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from corl_jax.policies import causal_answers
from corl_jax.policies.completions import TextDraw, make_text_draw
from corl_jax.policies.janus import sampling
from corl_jax.policies.packing import PACKED, pack_rows
from corl_jax.train.step import TaskBatch
from tools.bench import inputs
from tools.bench.generation import make_keys, make_prompts, make_samplers
from tools.bench.replacing import replace_inside
from tools.bench.setting import COMPUTE, Setting
from tools.bench.timing import Record
from tools.bench.training import choose_answer_blocks, start_training

MEANS = (60 / 512, 150 / 512, 250 / 512)
"""Mean lengths of answers, as shares of the most tokens."""
DEVIATION = 0.6  # standard deviation over the mean
SHARED = 0.3  # variance of the logarithm that the answers of a prompt share, of all of it


def draw_lengths(setting: Setting, mean: float) -> np.ndarray:
    """Returns log-normal lengths [prompts, group]; `mean` is a share of the most tokens."""
    rng, most = np.random.default_rng(6), setting.size.new_tokens
    variance = np.log(1 + DEVIATION**2)
    prompts = rng.standard_normal((setting.prompts, 1))
    answers = rng.standard_normal((setting.prompts, setting.group))
    noise = np.sqrt(SHARED) * prompts + np.sqrt(1 - SHARED) * answers
    lengths = most * mean * np.exp(np.sqrt(variance) * noise - variance / 2)
    return np.clip(np.round(lengths), 1, most).astype(np.int32)


def measure_lengths(setting: Setting) -> Iterator[Record]:
    """Measures rollouts and updates of answers with log-normal lengths.

    A rollout makes as many steps as its longest answer. It is measured with answers that end, and
    with answers that all are as long as the longest. An update is measured with each answer in a
    row of its own, and with packed rows, of which `rows` is the number over that of the answers.
    """
    for mean in MEANS:
        lengths = draw_lengths(setting, mean)
        yield from _measure_rollout(setting, lengths)
        yield from _measure_update(setting, lengths)


def _measure_rollout(setting: Setting, lengths: np.ndarray) -> Iterator[Record]:
    params, special = setting.make_policy(COMPUTE), setting.processor.special
    prompts, keys = setting.place(make_prompts(setting, "mm2t")), make_keys(setting, "mm2t")
    sample = functools.partial(
        make_samplers(setting, special=special)["mm2t"], params, prompts, keys
    )
    for name, ends in (
        ("answers that end", lengths),
        ("answers as long as the longest", np.full_like(lengths, lengths.max())),
    ):
        with end_answers(ends.ravel()):
            timing = setting.measure(f"lengths_{lengths.mean():.0f}", sample)
        figures = {
            "ms_per_longest_token": float(1e3 * timing.median / lengths.max()),
            "tokens_per_s": float(ends.sum() / timing.median),
            "mean": float(lengths.mean()),
            "longest": int(lengths.max()),
        }
        yield Record("lengths", f"mean {lengths.mean():.0f}: {name}", timing, figures)


def end_answers(ends: np.ndarray) -> AbstractContextManager[None]:
    """Ends the sampled answers of the block after `ends` [N] tokens."""

    def make_ending_draw(model: Any, choice: Any, keys: jax.Array, eos: int) -> TextDraw:
        draw = make_text_draw(model, choice, keys, eos)

        def draw_or_end(hidden: jax.Array, step: jax.Array, done: jax.Array):
            token, logprob, _ = draw(hidden, step, done)
            is_last = step + 1 >= jnp.asarray(ends)
            return jnp.where(is_last, eos, token), logprob, done | is_last

        return draw_or_end

    return replace_inside(sampling.text_program, causal_answers, "make_text_draw", make_ending_draw)


def make_answers(setting: Setting, lengths: np.ndarray) -> TaskBatch:
    """Returns answers of the given lengths, on the host."""
    size, length = setting.size, setting.size.new_tokens
    prompts = make_prompts(setting, "mm2t")
    special = setting.processor.special
    task = inputs.make_task_batch(size, special, prompts, setting.group, length)
    (text,) = task.segments
    mask = np.arange(length) < lengths.reshape(-1, 1)
    return dataclasses.replace(task, segments=(dataclasses.replace(text, mask=mask),))


def _measure_update(setting: Setting, lengths: np.ndarray) -> Iterator[Record]:
    task, blocks = make_answers(setting, lengths), choose_answer_blocks(setting)
    (text,) = task.segments
    rows = blocks and pack_rows(lengths, text.values.shape[1], blocks)
    replays: dict[str, dict[str, Any]] = {"rows of single answers": {}}
    if rows is not None:
        replays["packed rows"] = {PACKED: rows}
    state, frozen, step = start_training(setting)
    for name, replay in replays.items():
        segment = dataclasses.replace(text, replay=replay)
        batch = setting.place({"mm2t": dataclasses.replace(task, segments=(segment,))})

        def update(batch: Any = batch) -> dict[str, Any]:
            nonlocal state  # the step has taken over the buffers of the last one
            state, metrics = step(state, frozen, batch)
            return metrics

        timing = setting.measure(f"lengths_{lengths.mean():.0f}_update", update)
        figures = {
            "rows": len(replay.get(PACKED, text.mask)) / text.mask.shape[0],
            "tokens_per_s": float(lengths.sum() / timing.median),
            "entropy": float(update()["mm2t/entropy"].value),
        }
        yield Record("lengths", f"mean {lengths.mean():.0f}: update, {name}", timing, figures)
