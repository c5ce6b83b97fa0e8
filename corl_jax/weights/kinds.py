"""`NetworkKind`: everything that this package knows about one kind of network.

Policies and reward networks are opened, checked, converted, loaded and exported by the same
functions; what differs between them are the values of this record.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flax import nnx
from jax.sharding import PartitionSpec

from corl_jax.models import modules
from corl_jax.params import flatten
from corl_jax.weights.table import Shape, Table

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt",
    "vocab.json", "merges.txt", "preprocessor_config.json", "processor_config.json",
    "1_Pooling/config.json",
)  # fmt: skip
"""Tokenizer and image settings that are copied with the weights, where the source has them."""

Rules = tuple[tuple[str, PartitionSpec], ...]
"""(regex of a whole parameter path, its layout on the mesh); the first that matches applies."""
WHOLE = PartitionSpec()
INNER, OUTER = PartitionSpec("fsdp", "tensor"), PartitionSpec("tensor", "fsdp")
COLUMN = PartitionSpec(None, "fsdp", "tensor")  # [L, in, out], outputs split
ROW = PartitionSpec(None, "tensor", "fsdp")  # [L, in, out], inputs split


@dataclasses.dataclass(frozen=True)
class NetworkKind:
    """How the checkpoints of one architecture are read."""

    name: str  # in commands and in the config.json of our own layout
    module: type[nnx.Module]
    config: type  # a frozen dataclass whose defaults are the published sizes
    tables: Mapping[str, Table]  # by layout
    # (folder, layout, torch key -> shape, problems to add to) -> config
    parse: Callable[[Path, str, Mapping[str, Shape], list[str]], Any]
    check: Callable[[Any, str], list[str]]  # (config, where it stands) -> what does not fit in it
    rules: Rules = ()
    # `model_type` of a foreign config.json -> its layout; None: the tensors' names tell the layout
    model_types: Mapping[str, str | None] = dataclasses.field(default_factory=dict)

    def shapes(self, config: Any) -> dict[str, Shape]:
        """Returns {path: shape} of every parameter."""
        abstract = modules.abstract(self.module, config)
        return {path: tuple(leaf.shape) for path, leaf in flatten(abstract).items()}
