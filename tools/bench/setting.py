"""What all parts share: the sizes, how often, where, and the random Janus."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from corl_jax.data.processor import Processor
from corl_jax.models import janus
from corl_jax.types import Params, SpecialTokens
from tools.bench.ceilings import Ceilings
from tools.bench.inputs import ENDLESS
from tools.bench.sizes import Size
from tools.bench.weights import draw

COMPUTE = jnp.bfloat16


@dataclasses.dataclass(frozen=True)
class Setting:
    """One run of the benchmark."""

    size: Size
    prompts: int
    group: int
    repeats: int
    micro_batch: int | None  # prompts of one backward pass; None: all
    offload: bool  # rewards are measured with offloaded networks too
    folder: Path  # for the small files of networks
    processor: Processor  # of the mini Janus's words, with the size's pictures
    mesh: Mesh  # of one device
    ceilings: Ceilings

    @property
    def completions(self) -> int:
        return self.prompts * self.group

    @property
    def everywhere(self) -> NamedSharding:
        """Where all arrays lie."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def endless(self) -> SpecialTokens:
        """The special tokens with an end of text that is never drawn."""
        return dataclasses.replace(self.processor.special, eos=ENDLESS)

    def policy(self, dtype: Any) -> Params:
        """A random Janus."""
        return self.placed(draw(janus.abstract(self.size.janus), 0, dtype))

    def placed(self, tree: Any) -> Any:
        """Arrays on the device."""
        return jax.device_put(tree, self.everywhere)
