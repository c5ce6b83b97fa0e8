"""Finds adapters, Git LFS pointers and texts with a byte order mark in a model's folder."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from corl_jax.errors import InputError
from corl_jax.input_files import BYTE_ORDER_MARK, describe_lfs_pointer, is_lfs_pointer
from corl_jax.weights.selection import BIN_NAME, INDEX, SAFE_NAME, STANDARD
from corl_jax.weights.storage import read_json

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_ADAPTER_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, "adapter_model.bin")
SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
    "open_clip_config.json",
    "1_Pooling/config.json",
    f"{SAFE_NAME}{INDEX}",
    f"{BIN_NAME}{INDEX}",
)
"""Small files of a model folder that are read or copied."""


def refuse_adapter(path: Path) -> None:
    """Refuses a PEFT adapter, which is no model without its base.

    `path` is a folder, or a file of weights.

    Raises: InputError in one line that names the base model and the remedy.
    """
    folder = path.parent if path.is_file() else path
    adapter = [name for name in _ADAPTER_FILES if (folder / name).is_file()]
    # A file of weights beside an adapter was named explicitly, so it is what the user means.
    if not adapter or (path != folder and path.name not in adapter):
        return
    base = _read_base_model(folder / ADAPTER_CONFIG)
    beside = next((name for name in STANDARD if (folder / name).is_file()), None)
    if beside:
        raise InputError(
            f"{path}: holds both a model ({beside}) and {adapter[0]}, which makes it an adapter of "
            f"{base}, and transformers would load that; keep one of the two in the folder"
        )
    raise InputError(
        f"{path}: is an adapter of {base}, expected a whole model; merge the two with peft "
        "(PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(DIR)) and "
        "give DIR"
    )


def _read_base_model(file: Path) -> str:
    name = read_json(file).get("base_model_name_or_path") if file.is_file() else None
    # The name goes into a message, and a hostile file can hold anything.
    if isinstance(name, str) and 0 < len(name) <= 400 and name.isprintable():
        return name
    return "a model that it does not name"


def find_pointers(folder: Path, names: Iterable[str] = SMALL_FILES) -> list[str]:
    """Returns a line for each small file of a folder that is a Git LFS pointer."""
    return [describe_lfs_pointer(folder / name) for name in names if is_lfs_pointer(folder / name)]


def read_unmarked(file: Path) -> bytes:
    """Returns a text file's bytes without a byte order mark at the beginning."""
    return file.read_bytes().removeprefix(BYTE_ORDER_MARK)


@contextlib.contextmanager
def open_unmarked_folder(folder: Path) -> Iterator[Path]:
    """Yields a folder whose small files other libraries can read: the same, or a copy.

    Raises: InputError listing the small files that are Git LFS pointers.
    """
    if problems := find_pointers(folder):
        raise InputError(problems)
    files = [folder / name for name in SMALL_FILES if (folder / name).is_file()]
    # A byte order mark stops the JSON parsers of other libraries, and silently joins the first line
    # of a vocabulary.
    if not any(_is_marked(file) for file in files):
        yield folder
        return
    with tempfile.TemporaryDirectory() as place:
        for file in files:
            copy = Path(place) / file.relative_to(folder)
            copy.parent.mkdir(exist_ok=True)
            copy.write_bytes(read_unmarked(file))
        yield Path(place)


def _is_marked(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(len(BYTE_ORDER_MARK)) == BYTE_ORDER_MARK
