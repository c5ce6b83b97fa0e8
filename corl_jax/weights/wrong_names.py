"""Explains tensors whose names are all wrong in one way by one line, not by one per tensor."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

from corl_jax.weights.table import Shape, Slot, Table

# Parts that DistributedDataParallel, torch.compile and FSDP put into names, anywhere.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_VOTERS = 200  # names from which a prefix is guessed; a strange file may hold very many
_MAX_PARTS = 12  # of a prefix

Known = Callable[[str], bool]


@dataclasses.dataclass(frozen=True)
class WrongNames:
    """Names that one change turns into names of a layout."""

    corrected: dict[str, str]  # by the name in the file
    problem: str  # without the file, which the caller puts in front


def is_known_to(table: Table) -> Known:
    """Returns a test whether a layout has a name, also of a tensor that the model does not use."""
    return lambda key: table.matches(key) or table.is_carried(key) or table.is_dropped(key)


def find_wrong_names(keys: Collection[str], table: Table) -> WrongNames | None:
    """Returns the change that turns most of the unknown names into a layout's; None without one."""
    is_known = is_known_to(table)
    unknown = [key for key in keys if not is_known(key)]
    candidates = [
        _strip_wrappers(unknown),
        _strip_prefix(unknown, is_known),
        _add_prefix(unknown, is_known, table),
    ]
    best: dict[str, str] = {}
    for candidate in candidates:
        # A name that the file has as well is no correction: two tensors would have it.
        usable = {a: b for a, b in candidate.items() if b not in keys and is_known(b)}
        best = usable if len(usable) > len(best) else best
    # A change that explains less than half of the names would hide the real problem.
    if not best or 2 * len(best) < len(unknown):
        return None
    return WrongNames(best, _describe(best, len(keys), table.name))


def shorten_wrong_names(
    problems: list[str], table: Table, slots: list[Slot], stored: Mapping[str, Shape], where: Path
) -> list[str]:
    """Returns the `problems` that a table has with the tensors `stored`, one line for each cause.

    All names that are wrong in the same way are one line. Lines about other tensors stay.
    """
    if unmerged := [key for key in stored if ".lora_" in key]:
        return [
            f"{where}: {len(unmerged)} of {len(stored)} tensors are of an adapter that is not "
            f"merged ({unmerged[0]}); merge it with peft (merge_and_unload) and save the model"
        ]
    wrong = find_wrong_names(stored, table)
    if wrong is None:
        return problems
    corrected = {wrong.corrected.get(key, key): shape for key, shape in stored.items()}
    return [f"{where}: {wrong.problem}", *table.find_problems(slots, corrected, where)]


def find_layout_of_names(keys: Collection[str], layouts: dict[str, Known]) -> str | None:
    """Returns the layout that knows the most names, if it knows at least half; else None."""
    counts = {name: sum(map(is_known, keys)) for name, is_known in layouts.items()}
    best = max(counts, key=lambda name: counts[name])
    return best if keys and 2 * counts[best] >= len(keys) else None


def _strip_wrappers(keys: Iterable[str]) -> dict[str, str]:
    shorter = {key: ".".join(p for p in key.split(".") if p not in _WRAPPERS) for key in keys}
    return {key: name for key, name in shorter.items() if name != key}


def _strip_prefix(keys: list[str], is_known: Known) -> dict[str, str]:
    """Removes the prefix that most of the names should not have."""
    # "model.student.layers.0.weight": "layers.0.weight" is known -> a vote for "model.student."
    votes: collections.Counter[str] = collections.Counter()
    for key in keys[:_VOTERS]:
        parts = key.split(".")
        for count in range(1, min(len(parts), _MAX_PARTS)):
            if is_known(".".join(parts[count:])):
                votes[".".join(parts[:count]) + "."] += 1
    if not votes:
        return {}
    prefix = votes.most_common(1)[0][0]
    return {key: key.removeprefix(prefix) for key in keys if key.startswith(prefix)}


def _add_prefix(keys: list[str], is_known: Known, table: Table) -> dict[str, str]:
    """Adds the prefix that most of the names lack."""
    # Beginnings of the layout's names without a layer's number: "bert.", "bert.embeddings.", ..
    prefixes = {
        ".".join(parts[:count]) + "."
        for parts in (row.key.split(".") for row in table.rows)
        for count in range(1, len(parts))
        if not any("{" in part for part in parts[:count])
    }
    voters = keys[:_VOTERS]
    counts = {prefix: sum(is_known(prefix + key) for key in voters) for prefix in sorted(prefixes)}
    if not any(counts.values()):
        return {}
    best = max(counts, key=lambda prefix: counts[prefix])
    return {key: best + key for key in keys}


def _describe(corrected: dict[str, str], total: int, layout: str) -> str:
    count = f"the names of {len(corrected)} of {total} tensors"
    key, name = next(iter(corrected.items()))
    if name.endswith(key):
        prefix = name.removesuffix(key)
        return (
            f"{count} lack the {prefix!r} with which they begin in the {layout} layout; save the "
            f"whole model, or put {prefix!r} before the names"
        )
    if key.endswith(name):
        extra, where = key.removesuffix(name), "begin with"
        if not all(key == extra + name for key, name in corrected.items()):
            where = "contain parts such as"
    else:
        extra = next(part for part in key.split(".") if part in _WRAPPERS) + "."
        where = "contain"
    return (
        f"{count} {where} {extra!r}, which the {layout} layout does not have; a wrapper such as "
        "DistributedDataParallel, torch.compile or PEFT puts it there: save the model inside the "
        f"wrapper, or remove {extra!r} from the names"
    )
