"""Measures decoding with matrices gathered once a rollout, and with matrices split as in training.

The samplers gather once. For the other layout this module replaces the samplers' layout during
the measurement; XLA then decides when the loop over tokens gathers the matrices.
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
from tools.bench.generation import make_keys, make_prompts, make_samplers
from tools.bench.setting import COMPUTE, Setting
from tools.bench.timing import Record


def measure_layouts(setting: Setting) -> Iterator[Record]:
    """Measures image rollouts without their pixels, in both layouts, on a mesh with `fsdp`.

    The completions are the same, up to rounding. The parameters start as training lays them out.
    """
    params = setting.make_policy(COMPUTE)
    prompts, keys = setting.place(make_prompts(setting, "t2i")), make_keys(setting, "t2i")
    sample = functools.partial(make_samplers(setting)["t2i"], params, prompts, keys)
    for name, layout in (
        ("gathered once", contextlib.nullcontext),
        ("as in training", functools.partial(use_training_layout, setting.size.measured.sampling)),
    ):
        with layout():
            timing = setting.measure(f"layout_{name}", sample)
        yield Record("layouts", f"image tokens, matrices {name}", timing, {})


@contextlib.contextmanager
def use_training_layout(sampling: Any) -> Iterator[None]:
    """Removes the samplers' layout of matrices in the block; activations keep theirs.

    `sampling` is the module of the samplers.
    """

    def constrain(x: jax.Array, *names: str | None) -> jax.Array:
        # Activations begin with the batch axis; other arrays are matrices.
        return device_mesh.constrain(x, *names) if names[0] == "batch" else x

    def keep(params: Any, rules: Any) -> Any:
        return params

    sampling.image_program.clear_cache()  # jit does not notice the patched functions
    try:
        with (
            mock.patch.object(decoding, "constrain", constrain),
            mock.patch.object(sampling, "gather_over_fsdp", keep),
        ):
            yield
    finally:
        sampling.image_program.clear_cache()
