"""The families of unified models; opens and loads their checkpoints."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from corl_jax.console import print_status
from corl_jax.devices.mesh import param_shardings
from corl_jax.errors import InputError, Problems
from corl_jax.policies.family import Family
from corl_jax.policies.janus.family import FAMILY as JANUS
from corl_jax.policies.janus_flow.family import FAMILY as JANUS_FLOW
from corl_jax.policies.show_o.family import FAMILY as SHOW_O
from corl_jax.types import Params, Sizes
from corl_jax.weights.checkpoint import load_config, load_params, load_sharded, open_checkpoint
from corl_jax.weights.folders import find_pointers
from corl_jax.weights.hub import resolve_model_dir
from corl_jax.weights.recognise import (
    read_stated_type,
    recognise_by_tensors,
    recognise_kind,
)
from corl_jax.weights.storage import read_json

FAMILIES: dict[str, Family] = {"janus": JANUS, "show_o": SHOW_O, "janus_flow": JANUS_FLOW}
"""Every kind of unified model that can be trained, by name."""


@dataclasses.dataclass(frozen=True)
class PolicyFiles:
    """A checkpoint with checked files; its weights are not read yet."""

    family: Family
    sizes: Sizes
    processor: Any  # processor.Processor
    folder: Path


@dataclasses.dataclass(frozen=True)
class Model(PolicyFiles):
    """A checkpoint, ready to use."""

    params: Params


def find_family(folder: Path) -> Family:
    """Returns the family that the config.json of a folder states, or else the tensors' names.

    The first family, if neither tells one.
    """
    first, *_ = families = tuple(FAMILIES.values())
    kinds, file = [family.kind for family in families], folder / "config.json"
    try:
        kind = recognise_kind(folder, kinds)
        if kind is None and read_stated_type(read_json(file) if file.is_file() else {}) is None:
            kind = recognise_by_tensors(folder, kinds)
    except InputError:
        return first  # its reader reports what is wrong with the folder
    return next((family for family in families if family.kind is kind), first)


def inspect_policy(path_or_hub_id: str | Path) -> PolicyFiles:
    """Reads the small files of a checkpoint, and checks names, shapes and sizes of its tensors.

    It does not read the weights and starts no device. Settings that no file states are noted on
    standard error, once for each folder.

    Raises:
        InputError: listing every file, setting and tensor that is missing, malformed or of
            another size than the config states.
    """
    folder = resolve_model_dir(path_or_hub_id)
    problems = Problems()
    # Git LFS pointers first: every other reader would call them corrupt.
    problems.add(find_pointers(folder))
    family = find_family(folder)
    sizes = problems.attempt(load_config, folder, family.kind)
    processor = problems.attempt(family.open_processor, folder)
    if sizes is not None:
        with problems.collect():
            open_checkpoint(folder, family.kind, sizes).close()
    if sizes is not None and processor is not None:
        # An id without a row in the table embeds as NaN. More rows than tokens are usual: tables
        # are padded.
        tokens, rows = processor.num_tokens, family.limits(sizes).vocab_size
        if tokens > rows:
            problems.add(
                f"{folder / 'tokenizer.json'}: found {tokens} tokens, the network embeds {rows}; "
                "copy the tokenizer from the checkpoint that the network came from"
            )
    problems.raise_any()
    assert sizes is not None and processor is not None
    _print_once(*family.kind.note_assumptions(folder, sizes))
    return PolicyFiles(family, sizes, processor, folder)


# The cache makes it print once: a run opens the same folder several times.
@functools.cache
def _print_once(*notes: str) -> None:
    for note in notes:
        print_status(f"note: {note}")


def load_policy(path_or_hub_id: str | Path, dtype: Any = None, mesh: Mesh | None = None) -> Model:
    """Loads a checkpoint of any family and layout, on a mesh or on the default device.

    `dtype` casts the parameters to a compute dtype; None keeps each as it is stored.

    Raises:
        InputError: as `inspect_policy`.
    """
    files = inspect_policy(path_or_hub_id)
    family, sizes, folder = files.family, files.sizes, files.folder
    if mesh is not None:
        shardings = param_shardings(family.abstract(sizes), mesh, family.rules)

        def choose_dtype(path: str) -> Any:
            return None if dtype is None else family.compute_dtype(path, dtype)

        params = load_sharded(folder, family.kind, sizes, shardings, choose_dtype)
    else:
        # Cast on the host, so that the device never holds the stored dtype and the copy together.
        params = load_params(folder, family.kind, sizes)
        if dtype is not None:
            params = family.cast(params, dtype)
        params = jax.device_put(params)
    return Model(family, sizes, files.processor, folder, params)
