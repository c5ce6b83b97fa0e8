"""`NetworkKind`: everything that this package knows about one kind of network.

The same functions (`checkpoint`, `export`) open, check, convert, load and export policies and
reward networks. The values of this record are the differences between them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from corl_jax.devices.mesh import Rules
from corl_jax.errors import Problems
from corl_jax.models import modules
from corl_jax.params import flatten
from corl_jax.weights.table import Shape, Table

OWN_LAYOUT = "jax"
"""safetensors whose keys are parameter paths; every kind has this layout."""
NETWORK_TYPE = "corl_jax_network"
"""`model_type` of our own config.json that names the kind under `network`."""
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt",
    "vocab.json", "merges.txt", "preprocessor_config.json", "processor_config.json",
    "1_Pooling/config.json",
)  # fmt: skip
"""Tokenizer and image settings that are copied with the weights, if the source has them."""

WHOLE = PartitionSpec()
# A pair of products needs no communication between them: COLUMN splits the outputs of the first,
# ROW the same features as inputs of the second. INNER and OUTER are the same without layers.
INNER, OUTER = PartitionSpec("fsdp", "tensor"), PartitionSpec("tensor", "fsdp")
COLUMN = PartitionSpec(None, "fsdp", "tensor")  # [L, in, out], outputs split
ROW = PartitionSpec(None, "tensor", "fsdp")  # [L, in, out], inputs split


@dataclasses.dataclass(frozen=True)
class Assets:
    """The source of tokenizer and processor files, and their layout."""

    folder: Path
    layout: str
    config: Path  # the foreign config.json; may be absent


@dataclasses.dataclass(frozen=True)
class OwnFormat:
    """The names of a kind and its sizes in the config.json of our own layout."""

    model_type: str = NETWORK_TYPE
    sizes: str = "sizes"  # key of the sizes


@dataclasses.dataclass(frozen=True)
class ForeignExport:
    """Writes a kind's foreign layouts; a kind without it is written in our own layout only."""

    # (layout, sizes); raises InputError for sizes that the layout cannot express
    check: Callable[[str, Any], None]
    # (layout, sizes, dtype, folder of the tokenizer or None) -> a new config.json
    write_config: Callable[[str, Any, str, Path | None], dict[str, Any]]
    # (layout, the source's config.json) -> the same as an export in that layout must state it
    restate_config: Callable[[str, dict[str, Any]], dict[str, Any]]
    # (folder to write to, layout, sizes, source or None, values for generation_config.json) ->
    # notes for the user. Our own layout keeps the files of the source's layout.
    write_assets: Callable[[Path, str, Any, Assets | None, Mapping[str, Any]], list[str]]
    # sizes -> those that must be equal for the carried tensors of another checkpoint to fit
    carried_sizes: Callable[[Any], Any]
    usual_layout: str | None = None  # of an export that names none; None: the first table's


@dataclasses.dataclass(frozen=True)
class PeftFormat:
    """PEFT's names of a kind's adapters: one A and one B for each adapted dense layer."""

    table: Table  # `adapter_model.safetensors`
    auto_mapping: Mapping[str, str]  # the class that PEFT puts the adapters into
    layers: str  # regex of the adapted layers' names up to the last part, such as `q_proj`


@dataclasses.dataclass(frozen=True)
class WeightsPart:
    """One of several files of weights that a kind's foreign layouts have in folders of their own.

    An export writes a named file whole, whatever its size.
    """

    folder: str  # inside of the model's folder or beside it; "" is the model's folder
    # of the file that is written, and read before others; None: standard names, also of shards
    stem: str | None
    prefix: str  # of the names of its tensors in key tables, and not in the file
    hub_id: str  # its published source, for messages
    other_folders: tuple[str, ...] = ()  # names that are read as well
    # A tensor of the earlier parts without which this part is not the model's. Such a part may be
    # missing; None: always needed.
    only_with: str | None = None
    # A prefix that the file's names may have or lack, and that key tables have behind `prefix`.
    inner_prefix: str = ""


@dataclasses.dataclass(frozen=True, eq=False)  # compared and hashed by identity
class NetworkKind:
    """A kind of network: how to build it, and how to read and write its checkpoints."""

    name: str  # in commands and in the config.json of our own layout
    module: type[nnx.Module]
    config: type  # a frozen dataclass whose defaults are the published sizes
    tables: Mapping[str, Table] = dataclasses.field(default_factory=dict)  # by foreign layout
    # (folder, layout, torch key -> shape, problems to add to) -> sizes
    parse: Callable[[Path, str, Mapping[str, Shape], Problems], Any] | None = None
    # (sizes, where they stand) -> what does not fit in them
    check: Callable[[Any, str], list[str]] = lambda config, where: []
    # files of weights of foreign layouts; the first is the model's. None: one model, usual names
    parts: tuple[WeightsPart, ...] | None = None
    # sizes -> tensors of foreign layouts that follow from the sizes, by their names in key tables;
    # tables drop them when they are read
    derive: Callable[[Any], Mapping[str, np.ndarray]] = lambda config: {}
    # `model_type` or `_class_name` of a foreign config.json -> its layout; None: the tensors' names
    # tell the layout
    model_types: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    # (foreign config.json) -> what shows that it is of another kind with the same `model_type`, and
    # the remedy; None if it is of this kind
    find_other_kind: Callable[[Mapping[str, Any]], str | None] = lambda data: None
    # (folder, sizes) -> what no file of the folder states, and which values it is taken to have
    note_assumptions: Callable[[Path, Any], list[str]] = lambda folder, config: []
    rules: Rules = ()
    files: tuple[str, ...] = TOKENIZER_FILES  # copied with the weights
    # folder of a model -> the folder of its tokenizer, which may be one beside it
    find_tokenizer: Callable[[Path], Path] = lambda folder: folder
    own_format: OwnFormat = OwnFormat()
    foreign_export: ForeignExport | None = None
    # (problems, layout, config.json) -> the problems with what to do about some of them
    explain: Callable[[list[str], str, Mapping[str, Any]], list[str]] | None = None
    # safetensors of tensors that foreign files may lack, all of them together
    packaged: Path | None = None
    peft: PeftFormat | None = None  # None: adapters are only exported merged

    @property
    def needs_config(self) -> bool:
        """True if config.json states the layout. Else the tensors' names tell it."""
        return not self.tables or any(self.model_types.values())

    @property
    def carries(self) -> bool:
        """True if a layout has tensors that the model does not use."""
        return any(table.carried for table in self.tables.values())

    @property
    def written_layouts(self) -> tuple[str, ...]:
        """The layouts that an export can write."""
        return (*(self.tables if self.foreign_export else ()), OWN_LAYOUT)

    @property
    def usual_layout(self) -> str:
        """The layout of an export that names none."""
        if self.foreign_export is None:
            return OWN_LAYOUT
        return self.foreign_export.usual_layout or next(iter(self.tables))

    def shapes(self, config: Any) -> dict[str, Shape]:
        """Returns {path: shape} of every parameter."""
        # Without memory for the parameters: only shapes are traced.
        abstract = modules.make_abstract(self.module, config)
        return {path: tuple(leaf.shape) for path, leaf in flatten(abstract).items()}

    def is_stacked(self, path: str) -> bool:
        """Returns whether a parameter has a leading axis of layers, each a tensor in files."""
        # All layouts of a kind stack the same parameters. Without a foreign layout every parameter
        # is one tensor in every file.
        tables = list(self.tables.values())
        return bool(tables) and tables[0].find_row(path)[0].stacked
