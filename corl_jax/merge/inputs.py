"""Opens the base and the models of a merge, and checks that they fit each other."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from corl_jax.assets import SHIPPED
from corl_jax.errors import InputError, Problems
from corl_jax.input_files import expand_path
from corl_jax.params import flatten
from corl_jax.policies import find_family
from corl_jax.policies.family import Family
from corl_jax.weights.adapter_leaves import is_adapter, open_adapters, read_adapter_settings
from corl_jax.weights.checkpoint import Checkpoint, open_checkpoint
from corl_jax.weights.hub import resolve_model_dir
from corl_jax.weights.sources import Leaves
from corl_jax.weights.storage import Store, read_json

TOKENIZER = "tokenizer.json"


@dataclasses.dataclass(frozen=True)
class MergeModel:
    """A model to merge: a checkpoint, or adapters on their base."""

    place: str  # as the user named it
    folder: Path
    leaves: Leaves
    carried: Mapping[str, Store]


@dataclasses.dataclass(frozen=True)
class MergeInputs:
    """The open files of a merge."""

    family: Family
    base_place: str  # as the user named it
    base: Checkpoint
    models: Sequence[MergeModel]
    notes: list[str]


def open_inputs(base: str, models: Sequence[str], stack: contextlib.ExitStack) -> MergeInputs:
    """Opens all files, which `stack` closes, and compares names, sizes and tokenizers.

    Raises:
        InputError: listing every file and tensor that is missing, malformed or not of this base.
    """
    folder = resolve_model_dir(base)
    family, problems, notes = find_family(folder), Problems(), []
    opened = stack.enter_context(open_checkpoint(folder, family.kind))
    entries = []
    for place in models:
        with problems.collect():
            entries.append(_open_model(place, opened, stack, notes))
            find_tokenizer = family.kind.find_tokenizer
            of_base, of_model = find_tokenizer(folder), find_tokenizer(entries[-1].folder)
            problems.add(_find_token_problems(of_base, of_model, notes))
    problems.raise_any()
    if len({entry.folder.resolve() for entry in entries}) < len(entries):
        notes.append("--models names one folder several times")
    return MergeInputs(family, base, opened, entries, notes)


def _open_model(
    place: str, base: Checkpoint, stack: contextlib.ExitStack, notes: list[str]
) -> MergeModel:
    folder = Path(expand_path(place))
    if folder.is_dir() and is_adapter(folder):
        adapter_base = _open_adapter_base(folder, base, stack, notes)
        leaves, store = open_adapters(folder, base.kind, adapter_base.leaves)
        stack.callback(store.close)
        return MergeModel(place, folder, leaves, adapter_base.carried)
    model = _open_like(resolve_model_dir(place), base, stack)
    return MergeModel(place, model.folder, model.leaves, model.carried)


def _open_adapter_base(
    folder: Path, base: Checkpoint, stack: contextlib.ExitStack, notes: list[str]
) -> Checkpoint:
    """Opens the base that an adapter names if it is on this machine; else returns `base`."""
    name = read_adapter_settings(folder).base
    if name is None or not (name in SHIPPED or Path(name).is_dir()):
        base_name = "no base" if name is None else f"the base {name}, which is no folder here"
        notes.append(f"{folder}: the adapter names {base_name}; it is merged into --base")
        return base
    named_base = resolve_model_dir(name)
    same = named_base.samefile(base.folder)
    return base if same else _open_like(named_base, base, stack)


def _open_like(folder: Path, base: Checkpoint, stack: contextlib.ExitStack) -> Checkpoint:
    """Opens a checkpoint that must have the sizes of the base."""
    model = stack.enter_context(open_checkpoint(folder, base.kind))
    ours, theirs = (flatten(dataclasses.asdict(item.config)) for item in (base, model))
    names = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
    if names:
        raise InputError(
            f"{folder}: {name.replace('/', '.')} is {theirs.get(name)}, expected {ours.get(name)} "
            f"as in the base {base.folder}; give models that were trained from this base"
            for name in names
        )
    return model


def _find_token_problems(base: Path, model: Path, notes: list[str]) -> list[str]:
    """Returns a problem if a model's tokenizer gives other ids than that of the base.

    `base` and `model` are the folders of the tokenizers.
    """
    if not (model / TOKENIZER).is_file() or not (base / TOKENIZER).is_file():
        if (model / TOKENIZER).is_file():
            notes.append(f"{base}: has no {TOKENIZER}; the tokenizers are not compared")
        return []
    ours, theirs = (_read_tokens(folder / TOKENIZER) for folder in (base, model))
    added = "added tokens"
    differences = [name for name in ours if name != added and ours[name] != theirs[name]]
    # A file may lack tokens that the other one has, as those of a Show-o, whose network has them.
    # But no text may have two ids, and no id two texts.
    pairs = {*ours[added].items(), *theirs[added].items()}
    texts, ids = ({pair[place] for pair in pairs} for place in (0, 1))
    if len(pairs) > min(len(texts), len(ids)):
        differences.append(added)
    if not differences:
        return []
    return [
        f"{model / TOKENIZER}: its {' and '.join(differences)} differ from those of the base; "
        "expected a model with the tokenizer of its base"
    ]


def _read_tokens(file: Path) -> dict[str, Any]:
    """Returns the parts of a tokenizer.json that decide the ids of a text. Raises: InputError."""
    # Not the whole file: layouts place the BOS in different parts of it, and versions of the
    # library add settings or write a merge as "a b" or ["a", "b"].
    data = read_json(file)
    model = data.get("model")
    model = model if isinstance(model, dict) else {}
    try:
        merges = model.get("merges") or []
        added = [token for token in data.get("added_tokens") or [] if isinstance(token, dict)]
        return {
            "vocabulary": model.get("vocab"),
            "merges": [pair if isinstance(pair, str) else " ".join(pair) for pair in merges],
            "added tokens": {str(token.get("content")): str(token.get("id")) for token in added},
        }
    except TypeError as error:
        raise InputError(
            f"{file}: not a usable tokenizer.json ({error}); expected lists of merges and of "
            "added_tokens; copy it again"
        ) from error
