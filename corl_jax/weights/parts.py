"""Reads and writes weights that lie in several files, each in a folder of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

from corl_jax.errors import InputError
from corl_jax.weights.kinds import NetworkKind, WeightsPart
from corl_jax.weights.shards import (
    Progress,
    TensorPlan,
    count_safetensors_bytes,
    write_bin,
    write_safetensors,
    write_tensors,
)
from corl_jax.weights.storage import JoinedStore, PrefixedStore, Store, open_any_store


def find_companion(folder: Path, *names: str) -> Path | None:
    """Returns a folder of one of these names inside of a model's folder, or else beside it."""
    # All names inside first: what is beside may belong to another model.
    places = (place / name for place in (folder, folder.absolute().parent) for name in names)
    return next((place for place in places if place.is_dir()), None)


def list_read_folders(folder: Path, kind: NetworkKind) -> list[Path]:
    """Returns the folders that a model is read from: its own, its parts' and its tokenizer's."""
    names = [name for part in kind.parts or () for name in (part.folder, *part.other_folders)]
    places = [find_companion(folder, name) for name in names if name]
    return [folder, *filter(None, places), kind.find_tokenizer(folder)]


def describe_missing(place: Path, hub_id: str, files: Sequence[str] = ()) -> str:
    """Describes a companion folder that is missing, with the command that downloads it.

    `files` are those to download, and the first of them is missing; () stands for the whole folder.
    """
    return (
        f"{place / files[0] if files else place}: not found, inside of the model's folder or "
        f"beside it; run `{' '.join(['hf download', hub_id, *files])} --local-dir {place}`, or "
        "copy the folder there"
    )


def join_parts(store: Store, kind: NetworkKind, folder: Path) -> Store:
    """Returns the store of a model's first part with the tensors of its other parts.

    Raises: InputError for a part that is missing or damaged.
    """
    for part in (kind.parts or ())[1:]:
        if part.only_with and part.only_with not in store.infos:
            continue
        place = find_companion(folder, part.folder, *part.other_folders)
        if place is None and part.only_with:
            continue
        if place is None:
            raise InputError(describe_missing(folder / part.folder, part.hub_id))
        of_part = open_any_store(place, part.stem)
        inner = part.inner_prefix
        if any(key.startswith(inner) for key in of_part.infos):
            inner = ""
        store = JoinedStore(store, PrefixedStore(of_part, part.prefix + inner))
    return store


def write_parts(
    folder: Path, kind: NetworkKind, plans: Sequence[TensorPlan], *, max_shard_bytes: int,
    as_bin: bool, progress: Progress | None,
) -> None:  # fmt: skip
    """Writes one file for each part of a kind, or shards of a part with standard names."""
    for part, part_plans in split_plans(kind, plans):
        place = folder / part.folder
        place.mkdir(exist_ok=True)
        if part.stem is None:
            write_tensors(
                place, part_plans, max_shard_bytes=max_shard_bytes, as_bin=as_bin,
                progress=progress,
            )  # fmt: skip
        elif as_bin:
            write_bin(place / f"{part.stem}.bin", part_plans, progress)
        else:
            write_safetensors(place / f"{part.stem}.safetensors", part_plans, progress)


def count_part_bytes(kind: NetworkKind, plans: Sequence[TensorPlan]) -> dict[str, int]:
    """Returns {file: bytes} of the safetensors files that `write_parts` writes without shards."""
    return {
        str(Path(part.folder, f"{part.stem or 'model'}.safetensors")): count_safetensors_bytes(
            part_plans
        )
        for part, part_plans in split_plans(kind, plans)
    }


def split_plans(
    kind: NetworkKind, plans: Sequence[TensorPlan]
) -> Iterator[tuple[WeightsPart, list[TensorPlan]]]:
    """Yields each part with its tensors in the order and under the names of its file."""
    assert kind.parts is not None
    # The longest prefix first: that of the model itself may be empty.
    by_prefix: dict[str, list[TensorPlan]] = {part.prefix: [] for part in kind.parts}
    prefixes = sorted(by_prefix, key=len, reverse=True)
    for plan in plans:
        prefix = next(prefix for prefix in prefixes if plan.key.startswith(prefix))
        renamed = dataclasses.replace(plan, key=plan.key.removeprefix(prefix))
        by_prefix[prefix].append(renamed)
    for part in kind.parts:
        if part.only_with and not by_prefix[part.prefix]:
            continue
        # By name, as the safetensors library orders tensors of one type.
        yield part, sorted(by_prefix[part.prefix], key=lambda plan: plan.key)
