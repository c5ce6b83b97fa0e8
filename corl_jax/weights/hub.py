"""A model directory from a local path or a Hugging Face hub id."""

from __future__ import annotations

import re
from pathlib import Path

from corl_jax.errors import InputError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SMALL = ["*.json", "*.jinja", "*.txt"]


def resolve_model_dir(path_or_hub_id: str | Path) -> Path:
    """The directory itself, or the downloaded (or cached) snapshot of a hub id.

    Raises: InputError when there is neither, saying how to fetch the model elsewhere.
    """
    path = Path(path_or_hub_id).expanduser()
    if path.is_file():
        raise InputError(f"{path}: is a file, expected a model directory or a hub id")
    return resolve_path(path_or_hub_id)


def resolve_path(path_or_hub_id: str | Path) -> Path:
    """As `resolve_model_dir`, or a single file of weights."""
    if not str(path_or_hub_id).strip():  # which would mean the working directory
        raise InputError(f"{str(path_or_hub_id)!r}: is empty, expected a path or a hub id")
    path = Path(path_or_hub_id).expanduser()
    if path.exists():
        return path
    if not _HUB_ID.fullmatch(str(path_or_hub_id)) or str(path_or_hub_id).startswith("."):
        raise InputError(f"{path}: no such directory, and not a hub id of the form owner/name")
    return _download(str(path_or_hub_id))


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=[*_SMALL, "*.safetensors"]))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(hub_id, allow_patterns=[*_SMALL, "*.bin"]))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{hub_id}: no such directory here, and the hub did not give it ({reason}); where the "
            f"hub can be reached, run `hf download {hub_id} --local-dir DIR`, and give DIR"
        ) from error
    return folder
