"""Recognises which kind of network, and which layout of it, a directory holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from corl_jax.errors import InputError
from corl_jax.weights.kinds import NETWORK_TYPE, OWN_LAYOUT, NetworkKind
from corl_jax.weights.storage import open_any_store, read_json
from corl_jax.weights.table import Shape
from corl_jax.weights.wrong_names import Known, find_layout_of_names, find_wrong_names, is_known_to


def recognise_kind(folder: str | Path, kinds: Iterable[NetworkKind]) -> NetworkKind | None:
    """Returns the kind that a directory's config.json states; None if it states another kind."""
    file = Path(folder) / "config.json"
    data = read_json(file) if file.is_file() else {}
    stated, network = read_stated_type(data), data.get("network")
    for kind in kinds:
        is_own = stated == kind.own_format.model_type
        # Reward networks share one model_type in our layout; the field `network` tells them apart.
        if (is_own and (stated != NETWORK_TYPE or network == kind.name)) or (
            isinstance(stated, str)
            and stated in kind.model_types
            and kind.find_other_kind(data) is None
        ):
            return kind
    return None


def recognise_by_tensors(folder: str | Path, kinds: Iterable[NetworkKind]) -> NetworkKind | None:
    """Returns the kind whose layouts name most of a directory's tensors; None if none does.

    Only kinds are compared whose config.json need not say what they are.

    Raises: InputError for a directory without weights, or with damaged ones.
    """
    store = open_any_store(Path(folder))
    names = list(store.infos)
    store.close()
    for kind in kinds:
        if kind.needs_config:
            continue
        counts = (sum(map(table.matches, names)) for table in kind.tables.values())
        if 2 * max(counts) > len(names):
            return kind
    return None


def read_stated_type(data: Mapping[str, Any]) -> Any:
    """Returns what a config.json calls its network: transformers' name, or diffusers' class."""
    return data.get("model_type", data.get("_class_name"))


def read_config(folder: Path, kind: NetworkKind) -> dict[str, Any]:
    """Returns the JSON of a directory's config.json; empty if it is absent and not needed."""
    file = folder / "config.json"
    if file.is_file():
        return read_json(file)
    if kind.needs_config:
        raise InputError(
            f"{file}: not found, expected in a model directory; give the folder that holds the "
            "checkpoint's config.json and weights"
        )
    return {}


def find_stated_layout(data: Mapping[str, Any], folder: Path, kind: NetworkKind) -> str | None:
    """Returns the layout that config.json states; None if the tensors' names tell it.

    Raises: InputError for a config.json of another kind.
    """
    file, stated = folder / "config.json", read_stated_type(data)
    own_type = kind.own_format.model_type
    if stated == own_type:
        network = data.get("network")
        if own_type != NETWORK_TYPE or network == kind.name:
            return OWN_LAYOUT
        if isinstance(network, str):
            raise _describe_other_kind(folder, network, kind)
        raise InputError(f"{file}: network is {network!r}, expected {kind.name!r}")
    if not kind.needs_config:
        return None
    layout = kind.model_types.get(stated) if isinstance(stated, str) else None
    if layout is None:
        raise InputError(
            f"{file}: model_type is {stated!r}, expected one of "
            f"{', '.join([*kind.model_types, own_type])}; this is not a {kind.name} checkpoint"
        )
    if other := kind.find_other_kind(data):
        raise InputError(f"{file}: {other}")
    return layout


def _describe_other_kind(where: Path, stated: str, kind: NetworkKind) -> InputError:
    return InputError(
        f"{where}: holds a {stated} network, expected {kind.name}; give the other directory"
    )


def find_layout_of_tensors(
    stored: Mapping[str, Shape], where: Path, kind: NetworkKind, data: Mapping[str, Any]
) -> str:
    """Returns the layout whose key table matches the most tensors.

    Raises: InputError if no table matches a tensor, with the reason from config.json or the names.
    """
    # Not the first layout that matches: layouts of one kind can share names (see `layouts.blip`).
    counts = {
        layout: sum(table.matches(key) for key in stored) for layout, table in kind.tables.items()
    }
    layout = max(counts, key=lambda name: counts[name])
    if counts[layout]:
        return layout
    stated = read_stated_type(data)
    if isinstance(stated, str) and stated not in kind.model_types:
        raise _describe_other_kind(where, stated, kind)
    # The tensors' shapes tell some sizes, so wrong names would be reported as wrong sizes.
    wrong = [find_wrong_names(stored, table) for table in kind.tables.values()]
    if explained := [names for names in wrong if names]:
        best = max(explained, key=lambda names: len(names.corrected))
        raise InputError(f"{where}: {best.problem}")
    return layout


def check_named_layout(
    where: Path,
    kind: NetworkKind,
    layout: str,
    stored: Mapping[str, Shape],
    shapes: Mapping[str, Shape],
) -> None:
    """Checks that the tensors have the names of the config's layout.

    Raises: InputError for the names of another layout.
    """
    layouts: dict[str, Known] = {name: is_known_to(table) for name, table in kind.tables.items()}
    named = find_layout_of_names(stored, layouts | {OWN_LAYOUT: shapes.__contains__})
    if named not in (None, layout):
        raise InputError(
            f"{where}: its tensors are named as in the {named} layout, but its config.json is of "
            f"the {layout} layout; put the config.json there that came with the weights"
        )
