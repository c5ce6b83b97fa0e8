"""Chooses the files of a folder that are its weights, if it has several sets of weights.

The order is that of transformers 5.24 (`modeling_utils._get_resolved_checkpoint_files`), so that
one folder means one model everywhere. A warning names the sets that are not read.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from corl_jax.errors import InputError

SAFE_NAME, BIN_NAME = "model.safetensors", "pytorch_model.bin"
INDEX = ".index.json"
STANDARD = tuple(f"{name}{end}" for name in (SAFE_NAME, BIN_NAME) for end in ("", INDEX))
SAFE_PATTERN, BIN_PATTERNS = "*.safetensors", ("*.bin", "*.pth", "*.pt")
# Files of trainers beside a model, with the suffixes of weights.
_STATE = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state.*)\.(bin|pt|pth)")
# "model-00001-of-00002.safetensors" -> model, 00001, 00002, .safetensors
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.\w+)")
_NAMED = 3  # files of a set that a warning names


@dataclasses.dataclass(frozen=True)
class Selection:
    """One set of weights: an index, or files without one."""

    files: Sequence[Path]  # empty if an index names them
    index: Path | None = None

    @property
    def is_bin(self) -> bool:
        """True for PyTorch's own files."""
        name = self.index.name.removesuffix(INDEX) if self.index else self.files[0].name
        return not name.endswith(".safetensors")


def select_weights(
    folder: Path, *, any_name: bool = False, stem: str | None = None
) -> Selection | None:
    """Returns the weights of a folder, or None; only `any_name` takes names other than STANDARD.

    Such files are taken together, all of safetensors or else all of PyTorch. Files named `stem`
    come before STANDARD.

    Raises: InputError for shards of several saves without an index.
    """
    for name in (*_list_names(stem), *STANDARD):
        # A link whose target is missing counts too: reading it says so, and no older set is taken.
        if os.path.lexists(folder / name):
            file = folder / name
            return Selection([], file) if name.endswith(INDEX) else Selection([file])
    if any_name:
        for group in ((SAFE_PATTERN,), BIN_PATTERNS):
            if files := list_weights(folder, group):
                _check_shards(folder, files)
                return Selection(files)
    return None


def _list_names(stem: str | None) -> list[str]:
    # diffusers' order: safetensors first, each as one file or as shards with an index
    ends = (".safetensors", ".bin")
    return [f"{stem}{end}{index}" for end in ends for index in ("", INDEX)] if stem else []


def warn_of_other_weights(folder: Path, selection: Selection, files: Iterable[Path]) -> None:
    """Warns, once for each folder, of weights beside the `files` that are read."""
    read = {*files, *([selection.index] if selection.index else [])}
    others = [f for f in list_weights(folder) if f not in read]
    if others:  # an index without its shards, which a download may leave, is no set of weights
        indexes = [file for file in sorted(folder.glob(f"*{INDEX}")) if file not in read]
        first = selection.index or selection.files[0]
        _warn_once(folder, first.name, tuple(file.name for file in (*indexes, *others)))


# The cache makes it print once: a run opens the same folder several times.
@functools.cache
def _warn_once(folder: Path, chosen: str, others: tuple[str, ...]) -> None:
    more = f" and {len(others) - _NAMED} more files" if len(others) > _NAMED else ""
    reason = "as transformers does, " if chosen in STANDARD else ""
    print(
        f"warning: {folder}: holds more than one set of weights: {chosen} is read, {reason}and not "
        f"{', '.join(others[:_NAMED])}{more}; remove the set that is not wanted",
        file=sys.stderr,
    )


def list_weights(
    folder: Path, patterns: Iterable[str] = (SAFE_PATTERN, *BIN_PATTERNS)
) -> list[Path]:
    """Returns the files of a folder with names of weights, without a trainer's state."""
    files = {file for pattern in patterns for file in folder.glob(pattern)}
    return sorted(file for file in files if not _STATE.fullmatch(file.name))


def _check_shards(folder: Path, files: Sequence[Path]) -> None:
    """Checks the shards of a folder without an index.

    Raises: InputError for shards of several saves, and for a save without all of its shards.
    """
    saves: dict[str, set[int]] = {}
    for file in files:
        if match := _SHARD.fullmatch(file.name):
            stem, number, count, suffix = match.groups()
            saves.setdefault(f"{stem}-*-of-{count}{suffix}", set()).add(int(number))
    if len(saves) > 1:
        raise InputError(
            f"{folder}: holds shards of {len(saves)} saves without an index: {', '.join(saves)}; "
            "keep one of them in the folder"
        )
    for pattern, numbers in saves.items():
        count = int(pattern.split("-of-")[-1].split(".")[0])
        missing = set(range(1, count + 1)) - numbers
        if missing:
            names = ", ".join(pattern.replace("*", f"{n:05d}") for n in sorted(missing)[:_NAMED])
            raise InputError(
                f"{folder}: {len(missing)} of {count} shards are missing ({names}); download or "
                "copy them again"
            )
