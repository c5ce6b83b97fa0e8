"""Whether the same call gives the same bits again, in this process and in the next."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from corl_jax.policies.janus.images import decode_images
from corl_jax.runs.fingerprints import fingerprint_tree
from tools.bench.generation import STREAMS, codes, keys, prompts_of, samplers
from tools.bench.setting import COMPUTE, Setting
from tools.bench.timing import Record
from tools.bench.training import batch_of, start

UPDATES = 2


def bits(setting: Setting) -> Iterator[Record]:
    """Rollouts, pixels, and the state after UPDATES optimizer steps from the same start.

    `results`: how many different ones --repeats + 1 calls gave. `digest` is of the last one's
    bits: two runs of the benchmark compare by it. On GPUs both are of interest with and without
    XLA_FLAGS=--xla_gpu_deterministic_ops=true.
    """
    yield from _drawn(setting)
    name = f"{UPDATES} updates, {setting.attention}"
    yield repeated(setting, name, functools.partial(updated, setting))


def _drawn(setting: Setting) -> Iterator[Record]:
    params, drawn = setting.policy(COMPUTE), samplers(setting)
    for task in STREAMS:
        prompts = setting.placed(prompts_of(setting, task))
        sample = functools.partial(drawn[task], params, prompts, keys(setting, task))
        yield repeated(setting, f"rollout {task}", sample)
    decode = functools.partial(
        decode_images, setting.size.janus, params, codes(setting),
        dtype=setting.pixel_dtype,
    )  # fmt: skip
    yield repeated(setting, "pixels", decode)


def repeated(setting: Setting, name: str, call: Callable[[], Any]) -> Record:
    """The record of one thing that is called several times."""
    digests = [fingerprint_tree(call()) for _ in range(setting.repeats + 1)]
    figures = {"results": len(set(digests)), "of": len(digests), "digest": digests[-1][:12]}
    return Record("bits", name, None, figures)


def updated(setting: Setting) -> Any:
    """The trained parameters and moments, a fresh start some updates on."""
    state, frozen, step = start(setting)
    batch = batch_of(setting)
    for _ in range(UPDATES):
        state, _ = step(state, frozen, batch)
    return {"params": state.params, "moments": state.opt_state}
