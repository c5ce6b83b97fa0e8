"""Decoding with matrices gathered once a rollout, and with matrices split as training has them.

The samplers do the former. The latter leaves it to XLA when the loop over tokens gathers what a
step reads; for the time of the measurement it takes the place of the samplers' own layout.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax

from corl_jax.devices import mesh as device_mesh
from corl_jax.policies import decoding
from corl_jax.policies.janus import sampling
from tools.bench.generation import make_keys, make_prompts, make_samplers
from tools.bench.setting import COMPUTE, Setting
from tools.bench.timing import Record


def measure_layouts(setting: Setting) -> Iterator[Record]:
    """Seconds of a rollout of images without their pixels, in both layouts, on a mesh with `fsdp`.

    The same completions, up to rounding; the parameters start as training lays them out.
    """
    params = setting.make_policy(COMPUTE)
    prompts, drawn = setting.place(make_prompts(setting, "t2i")), make_keys(setting, "t2i")
    sample = functools.partial(make_samplers(setting)["t2i"], params, prompts, drawn)
    for name, layout in (
        ("gathered once", contextlib.nullcontext),
        ("as in training", use_training_layout),
    ):
        with layout():
            timing = setting.measure(f"layout_{name}", sample)
        yield Record("layouts", f"image tokens, matrices {name}", timing, {})


@contextlib.contextmanager
def use_training_layout() -> Iterator[None]:
    """Takes what lays matrices out for decoding away from the samplers; activations keep theirs."""

    def constrain(x: jax.Array, *names: str | None) -> jax.Array:
        return device_mesh.constrain(x, *names) if names[0] == "batch" else x

    def keep(params: Any) -> Any:
        return params

    sampling._image_program.clear_cache()  # it would not notice
    try:
        with (
            mock.patch.object(decoding, "constrain", constrain),
            mock.patch.object(sampling, "gather_over_fsdp", keep),
        ):
            yield
    finally:
        sampling._image_program.clear_cache()
