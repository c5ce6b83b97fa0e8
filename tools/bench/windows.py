"""Measures windows of image codes: the time of a pass, and how many codes it makes final."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from corl_jax.assets import SHIPPED
from corl_jax.data.drawn_world.language import write_caption
from corl_jax.data.drawn_world.scene import WORLDS, choose_world, sample_spec
from corl_jax.policies import Model, jacobi, load_policy
from corl_jax.policies.choices import sample_keys
from corl_jax.policies.family import LogprobOptions
from corl_jax.policies.jacobi import WindowState, draw_in_windows, make_pass
from corl_jax.policies.janus import sampling
from corl_jax.tasks import IMAGE_GENERATION
from corl_jax.types import EncodedPrompts, Segment
from tools.bench.correctness import measure_difference
from tools.bench.generation import make_keys, make_prompts, make_samplers
from tools.bench.replacing import replace_inside
from tools.bench.setting import COMPUTE, Setting
from tools.bench.timing import Record

PASSES = 96
"""Passes that are measured of an image that is half complete; their mean has its mean length."""
TRAINED = ("nano", "mini")
SCALES = (5.0, 1.0)


def measure_windows(setting: Setting) -> Iterator[Record]:
    """Measures passes of the image sampler by the number of codes that each reads of every row.

    Milliseconds a pass include a small share of the prefill. `break_even` is the number of codes
    that a pass must make final so that images take as long as with the first window, usually 1.
    Weights are random: what a trained model makes final is measured by `acceptance`.
    """
    params, length = setting.make_policy(COMPUTE), setting.size.limits.image_tokens
    prompts, keys = setting.place(make_prompts(setting, "t2i")), make_keys(setting, "t2i")
    single = None
    for window in (w for w in setting.windows if w <= length):
        sample = make_samplers(setting, image_window=window)["t2i"]
        passes = length if window == 1 else min(PASSES, length - 1)
        with replace_loop(functools.partial(run_passes, passes)):
            timing = setting.measure(
                f"window_{window}", functools.partial(sample, params, prompts, keys)
            )
        spent = 1e3 * timing.median / passes
        single = single or spent
        figures = {"ms_per_pass": spent, "break_even": spent / single}
        yield Record("windows", f"passes of {window} codes", timing, figures)


def run_passes(
    passes: int, draw: Any, read: Any, first: Any, length: int, window: int, caches: Any
) -> WindowState:
    """Makes `passes` passes in the middle of an image, instead of all passes of an image."""
    start = jacobi.start_windows(first, length, window, caches)
    # Rows are at different places, as they are in a rollout.
    places = (length - passes) // 2 + jnp.arange(len(start.count)) % window
    count = jnp.clip(places, 1, length - 1).astype(jnp.int32)
    start = WindowState(count, start.passes, start.codes, start.logprobs, start.caches)
    return lax.fori_loop(
        0, passes, lambda _, state: make_pass(draw, read, state, length, window), start
    )


def replace_loop(loop: Callable[..., WindowState]) -> AbstractContextManager[None]:
    """Replaces the loop over the passes of an image in the block."""
    return replace_inside(sampling.image_program, sampling, "draw_in_windows", loop)


def measure_acceptance(setting: Setting) -> Iterator[Record]:
    """Measures how many codes a pass makes final in the shipped models, which are trained.

    `codes_per_pass` is the mean over all images, `codes_per_loop` that of the loop, which ends with
    its slowest image. `difference_max` is the largest one of recorded log-probs and the trainer's.
    Images are drawn for captions of the drawn world, on a CPU in float32.
    """
    dtype = jnp.float32 if jax.default_backend() == "cpu" else COMPUTE
    for name in TRAINED:
        model = load_policy(SHIPPED[name], dtype=dtype)
        length = model.family.limits(model.sizes).image_tokens
        prompts = encode_captions(model, setting.prompts)
        for scale in SCALES:
            for window in (w for w in setting.windows if w <= length):
                drawn, passes = draw_images(model, prompts, setting.group, scale, window, dtype)
                figures = {
                    "codes_per_pass": length / passes.mean(),
                    "codes_per_loop": length / passes.max(),
                    **measure_difference(drawn.logprobs, score_images(model, prompts, drawn)),
                }
                label = f"{name}, guidance {scale:g}, {window} codes"
                yield Record("acceptance", label, None, figures)


def encode_captions(model: Model, count: int) -> EncodedPrompts:
    """Encodes captions of random scenes of the world that the model was trained on."""
    world = WORLDS[choose_world(model.family.limits(model.sizes).image_side)]
    rng, kind = np.random.default_rng(0), IMAGE_GENERATION.turn.prompt
    captions = [write_caption(rng, sample_spec(rng, world=world)) for _ in range(count)]
    ids = [model.processor.prompt_ids(kind, {"prompt": caption}) for caption in captions]
    return model.processor.encode(kind, ids)


def draw_images(
    model: Model, prompts: EncodedPrompts, group: int, scale: float, window: int, dtype: Any
) -> tuple[Segment, np.ndarray]:
    """Returns images, and the passes [N] of each, the prefill, which gives one code, included."""
    counts: list[np.ndarray] = []

    def draw_and_count(*arguments: Any) -> WindowState:
        state = draw_in_windows(*arguments)
        jax.debug.callback(lambda passes: counts.append(np.asarray(passes)), state.passes)
        return state

    keys = sample_keys(0, np.arange(len(prompts.input_ids)), group)
    with replace_loop(draw_and_count):
        drawn = sampling.sample_images(
            model.sizes, model.params, prompts, keys, special=model.processor.special,
            cfg_scale=scale, window=window, dtype=dtype,
        )  # fmt: skip
        jax.block_until_ready(drawn.values)
        jax.effects_barrier()
    # Code by code there is no loop of windows, and a pass for each code.
    passes = counts[0] + 1 if counts else np.full(len(keys), drawn.values.shape[1])
    return drawn, passes


def score_images(model: Model, prompts: EncodedPrompts, drawn: Segment) -> jax.Array:
    """Returns the log-probs [N, T] of images as the trainer computes them."""
    options = LogprobOptions(model.processor.special, remat="none")
    program = model.family.turns[IMAGE_GENERATION.turn_kinds]

    @jax.jit
    def score(params: Any, codes: jax.Array) -> jax.Array:
        segment = dataclasses.replace(drawn, values=codes)
        (scores,) = program.logprobs(model.sizes, params, prompts, (segment,), options)
        return scores[0]

    return score(model.params, drawn.values)
