"""Finds a model directory from a local path or a Hugging Face hub id."""

from __future__ import annotations

import re
from pathlib import Path

from corl_jax.assets import SHIPPED
from corl_jax.errors import InputError
from corl_jax.hub_headers import fetch_snapshot
from corl_jax.input_files import expand_path
from corl_jax.weights.folders import refuse_adapter

_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@(.*))?", re.DOTALL)
_REVISION = re.compile(r"\w[\w.+-]*(/[\w.+-]+)*")  # a branch, tag, commit or refs/pr/1
_SMALL = ["*.json", "*.jinja", "*.txt"]


def resolve_model_dir(path_or_hub_id: str | Path) -> Path:
    """Returns a directory as it is, or the downloaded (or cached) snapshot of a hub id.

    Raises: InputError without either, with the command that downloads the model elsewhere, and for
        the directory of an adapter.
    """
    path = Path(expand_path(path_or_hub_id))
    if path.is_file():
        raise InputError(f"{path}: is a file, expected a model directory or a hub id")
    return resolve_path(path_or_hub_id)


def resolve_path(path_or_hub_id: str | Path) -> Path:
    """Returns a directory as `resolve_model_dir` does, or a single file of weights."""
    if not str(path_or_hub_id).strip():  # Path("") is the working directory
        raise InputError(f"{str(path_or_hub_id)!r}: is empty, expected a path or a hub id")
    path = Path(expand_path(path_or_hub_id))
    if not path.exists() and str(path_or_hub_id) in SHIPPED:
        return SHIPPED[str(path_or_hub_id)]
    if not path.exists():
        path = _download(*split_hub_id(str(path_or_hub_id)))
    refuse_adapter(path)
    return path


def check_place(path_or_hub_id: str | Path) -> None:
    """Checks that a path exists, names a shipped model or has the form of a hub id.

    Raises:
        InputError: it is none of them.
    """
    text = str(path_or_hub_id)
    if text.strip() and text not in SHIPPED and not Path(expand_path(text)).exists():
        split_hub_id(text)


def split_hub_id(text: str) -> tuple[str, str | None]:
    """Returns (owner/name, revision) of `owner/name` or `owner/name@revision`.

    Raises: InputError for anything else.
    """
    match = _HUB_ID.fullmatch(text)
    # "./models" and "../models" match the pattern, but are paths of missing folders.
    if not match or text.startswith("."):
        raise InputError(
            f"{text}: no such directory, and not a hub id of the form owner/name or "
            "owner/name@revision"
        )
    hub_id, revision = match.groups()
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise InputError(
            f"{text}: no such directory, and as a hub id its revision is {revision!r}; expected a "
            "branch, a tag or a commit after the @, or no @"
        )
    return hub_id, revision


def _download(hub_id: str, revision: str | None) -> Path:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    name = hub_id if revision is None else f"{hub_id}@{revision}"

    # Only safetensors, or else only .bin: many repositories have both, and each is gigabytes.
    def fetch(pattern: str) -> Path:
        patterns = [*_SMALL, pattern]
        return Path(fetch_snapshot(hub_id, revision=revision, allow_patterns=patterns))

    try:
        folder = fetch("*.safetensors")
        if not any(folder.glob("*.safetensors")):
            folder = fetch("*.bin")
    except (HfHubHTTPError, HFValidationError, OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        option = "" if revision is None else f" --revision {revision}"
        raise InputError(
            f"{name}: no such directory here, and the hub did not give it ({reason}); where the "
            f"hub can be reached, run `hf download {hub_id}{option} --local-dir DIR`, and give DIR"
        ) from error
    return folder
