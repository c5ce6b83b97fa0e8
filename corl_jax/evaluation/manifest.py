"""`manifest.json` of an evaluation: what its images were drawn with, and a record of each file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from corl_jax.atomic_files import check_output_folder
from corl_jax.errors import InputError, Problems
from corl_jax.evaluation.image_store import DRAWING, find_foreign_images
from corl_jax.evaluation.writers.writer import ImageFile

MANIFEST, NEXT, REPORT = "manifest.json", "NEXT.txt", "report.json"
FORMAT = 1
LOCK = ".lock"
OPTIONS = {
    "suite": "--suite", "seed": "--seed", "cfg_scale": "--cfg-scale",
    "image_steps": "--image-steps",
    "temperature": "--temperature", "images_per_prompt": "--images-per-prompt",
    "roles": "--roles", "dtype": "--dtype",
    "model_sha256": "--model", "prompts_sha256": "--prompts",
}  # fmt: skip
"""Setting that decides the images -> the option that sets it."""


def read_manifest(out: Path, form: int | str = FORMAT) -> dict[str, Any]:
    """Returns the manifest of a folder; an empty one for a folder that is new or empty.

    `form` is the format that the suite writes.

    Raises: InputError for a place that is no folder of such an evaluation.
    """
    path = out / MANIFEST
    if not path.is_file():
        entries = {entry.name for entry in out.iterdir()} if out.is_dir() else set()
        # A run that was killed at its very start leaves its lock alone.
        if not entries or entries - {LOCK, DRAWING}:
            check_output_folder(out, "--out")
        return {}
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"--out {path}: cannot be read ({error}); name another folder, or remove this one"
        ) from error
    is_known = isinstance(manifest, dict) and isinstance(manifest.get("settings"), dict)
    if not is_known or manifest.get("format") != form:
        raise InputError(
            f"--out {path}: is of another suite, or of another version of corl-jax evaluate; name "
            "another folder"
        )
    return manifest


def find_conflicts(
    out: Path, manifest: Mapping[str, Any], settings: Mapping[str, Any], names: Sequence[str],
    options: Mapping[str, str] = OPTIONS, what: str = "images of",
) -> list[str]:  # fmt: skip
    """Returns a problem for each of the settings `names` that differs from the folder's.

    `options` has the option of each setting; `what` is what the folder holds, with its preposition.
    """
    old = manifest.get("settings", {})
    return [
        f"--out {out}: holds {what} {options[name]} {_describe(name, old)}; this command has "
        f"{_describe(name, settings)}; give the same, or name another folder"
        for name in names
        if manifest and old.get(name) != settings.get(name)
    ]


def _describe(name: str, settings: Mapping[str, Any]) -> str:
    """Returns a setting with the place of what was hashed."""
    value = settings.get(name)
    if not name.endswith("_sha256"):
        return f"{value}"
    return f"{settings.get(name.removesuffix('_sha256'))} (sha256 {str(value)[:16]})"


def find_folder_problems(
    out: Path, manifest: Mapping[str, Any], files: Sequence[ImageFile], rows: int
) -> list[str]:
    """Lists images in a folder that the harness would read beside those of this command."""
    problems = Problems()
    if manifest.get("rows", 0) > rows:
        problems.add(
            f"--out {out}: holds images of {manifest['rows']} prompts, --rows asks for {rows}; the "
            "harness would read all of them; name another folder"
        )
    foreign = find_foreign_images(out, files) if manifest else []
    if foreign:
        problems.add(
            f"--out {out}: holds {len(foreign)} pictures that are not of this run, such as "
            f"{foreign[0]}, and the harness may read them; remove them, or name another folder"
        )
    return list(problems)
