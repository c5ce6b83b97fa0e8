"""Measures the image sampler in each build of `devices.compiling`."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from unittest import mock

from corl_jax.devices import compiling
from tools.bench.generation import make_keys, make_prompts, make_samplers
from tools.bench.setting import COMPUTE, Setting
from tools.bench.timing import Record


def measure_builds(setting: Setting) -> Iterator[Record]:
    """Measures guided tokens without their pixels; milliseconds a step include the prefill."""
    params, program = setting.make_policy(COMPUTE), setting.size.measured.sampling.image_program
    prompts, keys = setting.place(make_prompts(setting, "t2i")), make_keys(setting, "t2i")
    sample = functools.partial(make_samplers(setting)["t2i"], params, prompts, keys)
    steps = setting.size.measured.count_steps(setting.size.policy, setting.unmasking)
    for name in compiling.BUILDS:
        # The program otherwise chooses its build by the number of rows.
        with mock.patch.object(program, "choose_build", return_value=getattr(program, name)):
            timing = setting.measure(f"build_{name}", sample)
        figures = {"ms_per_step": 1e3 * timing.median / steps}
        yield Record("builds", f"image tokens, {name}", timing, figures)
