"""Checks whether the same call gives the same bits again, in this process and in the next."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from corl_jax.runs.fingerprints import fingerprint_tree
from tools.bench.generation import STREAMS, make_codes, make_keys, make_prompts, make_samplers
from tools.bench.setting import COMPUTE, Setting
from tools.bench.timing import Record
from tools.bench.training import make_batch, start_training

UPDATES = 2


def measure_bits(setting: Setting) -> Iterator[Record]:
    """Measures rollouts, pixels, and the state after UPDATES optimizer steps from the same start.

    `results` is the number of different results of --repeats + 1 calls. `digest` is a hash of the
    last result's bits; compare it between two runs of the benchmark. On GPUs, run it with and
    without XLA_FLAGS=--xla_gpu_deterministic_ops=true.
    """
    yield from _measure_samplers(setting)
    name = f"{UPDATES} updates, {setting.attention}"
    yield repeat_call(setting, name, functools.partial(run_updates, setting))


def _measure_samplers(setting: Setting) -> Iterator[Record]:
    params, sampler_of = setting.make_policy(COMPUTE), make_samplers(setting)
    for task in STREAMS:
        prompts = setting.place(make_prompts(setting, task))
        sample = functools.partial(sampler_of[task], params, prompts, make_keys(setting, task))
        yield repeat_call(setting, f"rollout {task}", sample)
    decode = functools.partial(
        setting.size.family.decode_images, setting.size.policy, params, make_codes(setting),
        dtype=setting.pixel_dtype,
    )  # fmt: skip
    yield repeat_call(setting, "pixels", decode)


def repeat_call(setting: Setting, name: str, call: Callable[[], Any]) -> Record:
    """Returns the record of a call that is repeated."""
    digests = [fingerprint_tree(call()) for _ in range(setting.repeats + 1)]
    figures = {"results": len(set(digests)), "of": len(digests), "digest": digests[-1][:12]}
    return Record("bits", name, None, figures)


def run_updates(setting: Setting) -> Any:
    """Returns trained parameters and moments after UPDATES updates from a new start."""
    # Made anew, because the step takes over the buffers of its state.
    state, frozen, step = start_training(setting)
    batch = make_batch(setting)
    for _ in range(UPDATES):
        state, _ = step(state, frozen, batch)
    return {"params": state.params, "moments": state.opt_state}
