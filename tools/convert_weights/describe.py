"""What a checkpoint directory holds, as text."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

from corl_jax.errors import InputError
from corl_jax.policies.janus.tokens import special_tokens
from corl_jax.weights.checkpoint import Checkpoint, open_checkpoint
from corl_jax.weights.networks import open_network
from corl_jax.weights.storage import Store


def describe(folder: Path) -> Iterator[str]:
    """Lines to print. Raises: InputError listing everything that does not add up."""
    with open_checkpoint(folder) as checkpoint:
        yield f"{folder}"
        made_from = f", made from {checkpoint.source_layout}" if checkpoint.layout == "jax" else ""
        yield f"layout      {checkpoint.layout}{made_from}"
        yield from _sizes(checkpoint)
        yield from _parts(checkpoint)
        yield from _files(checkpoint.store)
    yield from _tokens(folder)


def describe_network(path: Path, kind: str) -> Iterator[str]:
    """As `describe`, for a reward network."""
    with open_network(path, kind) as opened:
        yield f"{path}"
        yield f"network     {kind}, layout {opened.layout}"
        yield f"sizes       {dataclasses.asdict(opened.config)}"
        yield f"  {'parameters':<24} {opened.parameters:>16,}"
        yield from _files(opened.store)


def _sizes(checkpoint: Checkpoint) -> Iterator[str]:
    for part in ("llama", "siglip", "vq"):
        fields = dataclasses.asdict(getattr(checkpoint.config, part))
        yield f"{part:<11} {', '.join(f'{name} {value}' for name, value in fields.items())}"


def _parts(checkpoint: Checkpoint) -> Iterator[str]:
    counts: collections.Counter[str] = collections.Counter()
    for path, shape in checkpoint.leaves.shapes.items():
        counts[path.split("/")[0]] += math.prod(shape)
    for part, count in counts.items():
        yield f"  {part:<24} {count:>16,}"
    yield f"  {'parameters':<24} {sum(counts.values()):>16,}"
    carried = sum(math.prod(s.infos[key].shape) for key, s in checkpoint.carried.items())
    if carried:
        yield f"  {'carried, unused':<24} {carried:>16,} in {len(checkpoint.carried)} tensors"


def _files(store: Store) -> Iterator[str]:
    dtypes: collections.Counter[str] = collections.Counter()
    sizes: collections.Counter[Path] = collections.Counter()
    for info in store.infos.values():
        dtypes[info.dtype.name] += 1
        sizes[info.file] += info.nbytes
    total = sum(dtypes.values())
    yield f"tensors     {total}: {', '.join(f'{n} {name}' for name, n in dtypes.most_common())}"
    for file, size in sorted(sizes.items()):
        yield f"  {file.name:<40} {size / 1e6:>12,.1f} MB"


def _tokens(folder: Path) -> Iterator[str]:
    try:
        tokens = dataclasses.asdict(special_tokens(folder))
    except InputError as error:
        yield f"tokens      {error.problems[0]}"
        return
    yield f"tokens      {', '.join(f'{name} {number}' for name, number in tokens.items())}"
