"""Holds the values that all parts share: sizes, repeats, mesh, and the random policy."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from corl_jax.devices.mesh import BATCH, batch_sharding, param_spec
from corl_jax.models.attention import AttentionKernel
from corl_jax.models.layers import Remat
from corl_jax.policies.family import Unmasking
from corl_jax.types import Params
from tools.bench.ceilings import Ceilings
from tools.bench.inputs import ENDLESS
from tools.bench.sizes import Size
from tools.bench.timing import Timing, measure
from tools.bench.weights import draw_params

COMPUTE = jnp.bfloat16


@dataclasses.dataclass(frozen=True)
class Setting:
    """One run of the benchmark."""

    size: Size
    prompts: int
    group: int
    repeats: int
    micro_batch: int | None  # prompts of one backward pass; None: all
    remat: Remat  # what the backward pass keeps, as model.remat
    attention: AttentionKernel  # of the update, as model.attention
    pixel_dtype: Any  # of codes to pixels; training uses float32
    offload: bool  # rewards are measured with offloaded networks too
    folder: Path  # for the small files of networks
    processor: Any  # of the policy, with a small tokenizer
    mesh: Mesh
    ceilings: Ceilings  # of one device
    batch_prompts: int | None = None  # prompts sampled at once in an iteration; None: all
    plan: int = 0  # tokens of the plan before an image of a recipe
    windows: tuple[int, ...] = (1,)  # image codes that a pass reads, of windows and acceptance
    trace: Path | None = None  # folder for a profile of one call of each thing

    @property
    def completions(self) -> int:
        return self.prompts * self.group

    @property
    def has_adapters(self) -> bool:
        """Whether adapters alone are trained."""
        return bool(self.size.family.lora_of(self.size.policy))

    @property
    def num_batch_shards(self) -> int:
        """Number of parts into which the mesh splits prompts."""
        return math.prod(self.mesh.shape[axis] for axis in BATCH)

    @property
    def unmasking(self) -> Unmasking:
        """How codes are drawn and scored in any order; of denoising, only its steps."""
        return Unmasking(self.size.steps)

    @property
    def endless(self) -> Any:
        """The special tokens with an end of text that is never sampled."""
        return dataclasses.replace(self.processor.special, eos=ENDLESS)

    def compare_with_products(self, operations: float, seconds: float) -> dict[str, float]:
        """Returns how much was computed, and as a fraction of the measured rate of products."""
        rate = self.ceilings.matmul * self.mesh.size
        return {"tflop": operations / 1e12, "mfu": operations / rate / seconds}

    def make_policy(self, dtype: Any) -> Params:
        """Makes a random policy, laid out by the sharding rules."""
        family = self.size.family

        def place(path: str, shape: tuple[int, ...]) -> NamedSharding:
            return NamedSharding(self.mesh, param_spec(path, shape, self.mesh, family.rules))

        shapes = family.abstract(self.size.policy)
        return draw_params(shapes, 0, dtype, place, family.float32_parts)

    def place(self, tree: Any) -> Any:
        """Moves arrays to the devices, their leading axis spread over them like prompts."""
        return jax.device_put(tree, batch_sharding(self.mesh))

    def measure(self, name: str, call: Callable[[], Any]) -> Timing:
        """Measures the seconds of a call; with `trace` one more call is profiled."""
        timing = measure(call, self.repeats)
        if self.trace is not None:
            # One more call, because profiling slows a call down.
            with jax.profiler.trace(self.trace / name, create_perfetto_trace=True):
                jax.block_until_ready(call())
        return timing


def trained_patterns(setting: Setting) -> tuple[str, ...]:
    """Returns the regexes of trained parameters: the adapters, or those of the family."""
    family = setting.size.family
    if family.adapters is not None and setting.has_adapters:
        return (family.adapters.paths,)
    return family.trainable
