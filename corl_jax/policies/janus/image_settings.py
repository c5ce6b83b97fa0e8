"""How a Janus resizes and normalises the images of its prompts, read from its JSON files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from corl_jax.data.images import DEFAULT_MIN_SIZE, ImageSettings
from corl_jax.errors import InputError
from corl_jax.policies.janus.checkpoint.settings import parse_vision
from corl_jax.weights.foreign_config import Fields

FIXED_PREPROCESSING = {  # what preprocess_image does; a file that says otherwise is refused
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_pad": True,
    "resample": int(Image.Resampling.BICUBIC),
    "rescale_factor": 1 / 255,
}


def image_settings(configs: Mapping[str, Mapping[str, Any]], folder: Path) -> ImageSettings:
    """Image settings from the JSON files of a model directory, whatever its layout.

    `configs` holds config.json, processor_config.json and preprocessor_config.json by stem,
    empty dicts where absent. The processor files lead; config.json fills in and must agree.
    """
    problems: list[str] = []
    processor = Fields(str(folder / "processor_config.json"), configs["processor_config"], problems)
    pre = {**processor.section("image_processor").data, **configs["preprocessor_config"]}
    problems += [
        f"{folder}: image preprocessing {key} is {pre[key]!r}; only {value!r} is supported"
        for key, value in FIXED_PREPROCESSING.items()
        if pre.get(key) is not None and not _same_number(pre[key], value)
    ]
    size, tokens = _geometry(configs["config"], processor, pre, folder)
    min_size = Fields(str(folder / "preprocessor_config.json"), pre, problems).size(
        "min_size", DEFAULT_MIN_SIZE
    )
    for key in ("image_mean", "image_std"):
        if len(_floats(pre.get(key))) != 3:
            problems.append(
                f"{folder}: {key} is {pre.get(key)!r} in preprocessor_config.json; expected three "
                "numbers (Janus: 0.5, 0.5, 0.5)"
            )
    if problems:
        raise InputError(problems)
    assert size is not None and tokens is not None  # otherwise there was a problem
    (r, g, b), (r_std, g_std, b_std) = (_floats(pre[key]) for key in ("image_mean", "image_std"))
    return ImageSettings(size, tokens, (r, g, b), (r_std, g_std, b_std), min_size)


def _geometry(
    config: Mapping[str, Any], processor: Fields, pre: Mapping[str, Any], folder: Path
) -> tuple[int | None, int | None]:
    """(image size, image tokens), where the processor files and config.json agree."""
    problems, vision_size, vision_tokens = processor.problems, None, None
    try:
        vision_size, vision_tokens = vision_geometry(config, folder / "config.json")
    except InputError as error:
        problems += error.problems
    size, tokens = vision_size, vision_tokens
    stated = pre.get("image_size") or pre.get("size")
    if stated:
        size = _square(stated)
        if size is None:
            problems.append(
                f"{folder}: image size is {stated!r} in the processor files; expected the side of "
                "a square, or equal height and width"
            )
    if processor.has("num_image_tokens"):
        tokens = processor.size("num_image_tokens", tokens or 1)
    for name, value, other in (
        ("image size", size, vision_size), ("image tokens", tokens, vision_tokens),
    ):  # fmt: skip
        if value is None:
            problems.append(
                f"{folder}: no {name}; expected image_size in preprocessor_config.json and "
                "num_image_tokens in processor_config.json, or a vision config in config.json"
            )
        elif None not in (value, other) and value != other:
            problems.append(
                f"{folder}: {name} is {value} in the processor files and {other} by config.json"
            )
    return size, tokens


def vision_geometry(
    config: Mapping[str, Any], file: Path = Path("config.json")
) -> tuple[int | None, int | None]:
    """(image size, image tokens) by a config.json of any layout; None where it does not say.

    Raises:
        InputError: listing the fields of the vision tower that are malformed.
    """
    siglip = parse_vision(dict(config), file)
    return (siglip.image_size, siglip.num_tokens) if siglip else (None, None)


def _square(size: Any) -> int | None:
    """The side from 384, [384, 384] or {"height": 384, "width": 384}; None for anything else."""
    sides = list(size.values()) if isinstance(size, Mapping) else size
    sides = sides if isinstance(sides, list) else [sides]
    same = sides and all(type(side) is int and side == sides[0] > 0 for side in sides)
    return sides[0] if same else None


def _floats(value: Any) -> tuple[float, ...]:
    """One number, thrice, or a list of numbers; empty for anything else."""
    items = value if isinstance(value, list) else [value] * 3
    return tuple(map(float, items)) if all(isinstance(i, int | float) for i in items) else ()


def _same_number(found: Any, expected: float) -> bool:
    return isinstance(found, int | float) and bool(np.isclose(float(found), expected))
