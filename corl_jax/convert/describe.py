"""Describes what a checkpoint directory holds, as text."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from corl_jax.errors import InputError
from corl_jax.policies import FAMILIES
from corl_jax.policies.family import Family
from corl_jax.weights.checkpoint import Checkpoint, open_checkpoint
from corl_jax.weights.kinds import NetworkKind
from corl_jax.weights.storage import Store


def describe(path: Path, kind: NetworkKind) -> Iterator[str]:
    """Yields lines of text with a checkpoint's sizes, parts, files and special tokens.

    Raises: InputError listing everything that does not add up.
    """
    with open_checkpoint(path, kind) as checkpoint:
        source = checkpoint.source_layout
        made_from = f", made from {source}" if source != checkpoint.layout else ""
        yield f"{path}"
        yield f"network     {kind.name}, layout {checkpoint.layout}{made_from}"
        yield from _describe_sizes(checkpoint.config)
        yield from _describe_parts(checkpoint)
        yield from _describe_files(checkpoint.store)
        yield from (
            f"note        {note}" for note in kind.note_assumptions(path, checkpoint.config)
        )
    for family in FAMILIES.values():
        if family.kind is kind:
            yield from _describe_tokens(path, family)


def _describe_sizes(config: Any) -> Iterator[str]:
    """Yields a line for each part of the network, and one for the sizes outside of the parts."""
    sizes = dataclasses.asdict(config)
    parts = {name: part for name, part in sizes.items() if isinstance(part, dict)}
    rest = {name: value for name, value in sizes.items() if name not in parts}
    for name, part in {**parts, **({"sizes": rest} if rest else {})}.items():
        yield f"{name:<11} {', '.join(f'{key} {value}' for key, value in part.items())}"


def _describe_parts(checkpoint: Checkpoint) -> Iterator[str]:
    counts: collections.Counter[str] = collections.Counter()
    for path, shape in checkpoint.leaves.shapes.items():
        counts[path.split("/")[0]] += math.prod(shape)
    for part, count in counts.items():
        yield f"  {part:<24} {count:>16,}"
    yield f"  {'parameters':<24} {checkpoint.parameters:>16,}"
    carried = sum(math.prod(s.infos[key].shape) for key, s in checkpoint.carried.items())
    if carried:
        yield f"  {'carried, unused':<24} {carried:>16,} in {len(checkpoint.carried)} tensors"


def _describe_files(store: Store) -> Iterator[str]:
    dtypes: collections.Counter[str] = collections.Counter()
    sizes: collections.Counter[Path] = collections.Counter()
    for info in store.infos.values():
        dtypes[info.dtype.name] += 1
        sizes[info.file] += info.nbytes
    names = collections.Counter(file.name for file in sizes)
    total = sum(dtypes.values())
    yield f"tensors     {total}: {', '.join(f'{n} {name}' for name, n in dtypes.most_common())}"
    for file, size in sorted(sizes.items()):
        # Parts of a network can have files of one name in several folders.
        name = file.name if names[file.name] == 1 else f"{file.parent.name}/{file.name}"
        yield f"  {name:<40} {size / 1e6:>12,.1f} MB"


def _describe_tokens(folder: Path, family: Family) -> Iterator[str]:
    try:
        tokens = dataclasses.asdict(family.open_processor(folder).special)
    except InputError as error:
        yield f"tokens      {error.problems[0]}"
        return
    yield f"tokens      {', '.join(f'{name} {number}' for name, number in tokens.items())}"
