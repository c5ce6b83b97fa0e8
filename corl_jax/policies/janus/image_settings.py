"""Reads Janus's image settings from a model directory, and applies them to images.

Source: Janus `VLMImageProcessor`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from corl_jax.data.images import convert_to_rgb
from corl_jax.errors import Problems
from corl_jax.models.siglip import SiglipConfig
from corl_jax.policies.janus.checkpoint.settings import parse_vision
from corl_jax.weights.foreign_config import Fields

DEFAULT_MIN_SIZE = 14

# The steps of preprocess_image. A file that states others is refused, not silently ignored.
FIXED_PREPROCESSING = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_pad": True,
    "resample": int(Image.Resampling.BICUBIC),
    "rescale_factor": 1 / 255,
}


@dataclasses.dataclass(frozen=True)
class ImageSettings:
    """How an image becomes pixel values of the vision tower."""

    size: int  # side of the square, pixels
    num_tokens: int  # image tokens of an image in an understanding prompt
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    min_size: int = DEFAULT_MIN_SIZE  # shortest resized side, pixels


def preprocess_image(image: Image.Image, settings: ImageSettings) -> np.ndarray:
    """Returns an image as normalised float32 [S, S, 3]; see `make_square`."""
    return normalise_levels(make_square(image, settings), settings)


def normalise_levels(levels: np.ndarray, settings: ImageSettings) -> np.ndarray:
    """Returns levels 0..255 [..., 3] normalised, float32."""
    pixels = levels.astype(np.float32)
    pixels /= np.float32(255)
    pixels -= np.asarray(settings.mean, np.float32)
    pixels /= np.asarray(settings.std, np.float32)
    return pixels


def make_square(image: Image.Image, settings: ImageSettings) -> np.ndarray:
    """Returns an image as uint8 [S, S, 3]: longest side S, centred on grey.

    Source: Janus `VLMImageProcessor`.
    """
    image = convert_to_rgb(image)
    longest = max(image.size)
    # int() as in the original; transformers rounds, so a side there may be one pixel longer.
    width, height = (
        max(int(side / longest * settings.size), settings.min_size) for side in image.size
    )
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    if width != height:
        side = max(width, height)
        # The mean of the normalisation as a colour, 127 grey for Janus: padding becomes about 0.
        square = Image.new("RGB", (side, side), tuple(int(m * 255) for m in settings.mean))
        square.paste(image, ((side - width) // 2, (side - height) // 2))
        image = square
    return np.asarray(image)


def make_level_table(settings: ImageSettings) -> np.ndarray:
    """Returns the normalised value of each of the 256 levels of each channel, [256, 3] float32."""
    levels = np.arange(256, dtype=np.float32)[:, None] / np.float32(255)
    mean, std = (np.asarray(x, np.float32) for x in (settings.mean, settings.std))
    return (levels - mean) / std


ParseVision = Callable[[dict[str, Any], Path], SiglipConfig | None]
"""(content of a config.json, its file) -> the sizes of its vision tower; None if it has none."""


def read_image_settings(
    configs: Mapping[str, Mapping[str, Any]], folder: Path, parse: ParseVision = parse_vision
) -> ImageSettings:
    """Reads the image settings from the JSON files of a model directory of any layout.

    `configs` holds config.json, processor_config.json and preprocessor_config.json by stem, and
    an empty dict for an absent file. Values come from the processor files. config.json supplies
    missing values, and must agree with the processor files.
    """
    problems = Problems()
    processor = Fields(str(folder / "processor_config.json"), configs["processor_config"], problems)
    pre = {**processor.section("image_processor").data, **configs["preprocessor_config"]}
    problems.add(
        f"{folder}: image preprocessing {key} is {pre[key]!r}; only {value!r} is supported"
        for key, value in FIXED_PREPROCESSING.items()
        if pre.get(key) is not None and not _is_same_number(pre[key], value)
    )
    # No defaults for mean and std below: the class defaults are CLIP's, which Janus was not
    # trained with.
    size, tokens = _read_geometry(configs["config"], processor, pre, folder, parse)
    min_size = Fields(str(folder / "preprocessor_config.json"), pre, problems).size(
        "min_size", DEFAULT_MIN_SIZE
    )
    for key in ("image_mean", "image_std"):
        if len(_parse_floats(pre.get(key))) != 3:
            problems.add(
                f"{folder}: {key} is {pre.get(key)!r} in preprocessor_config.json; expected three "
                "numbers (Janus: 0.5, 0.5, 0.5)"
            )
    problems.raise_any()
    assert size is not None and tokens is not None  # otherwise there was a problem
    (r, g, b), (r_std, g_std, b_std) = (
        _parse_floats(pre[key]) for key in ("image_mean", "image_std")
    )
    return ImageSettings(size, tokens, (r, g, b), (r_std, g_std, b_std), min_size)


def _read_geometry(
    config: Mapping[str, Any],
    processor: Fields,
    pre: Mapping[str, Any],
    folder: Path,
    parse: ParseVision,
) -> tuple[int | None, int | None]:
    """Returns (image size, image tokens); adds a problem if the files do not agree."""
    problems, vision_size, vision_tokens = processor.problems, None, None
    with problems.collect():
        vision_size, vision_tokens = read_vision_geometry(config, folder / "config.json", parse)
    size, tokens = vision_size, vision_tokens
    stated = pre.get("image_size") or pre.get("size")
    if stated:
        size = _parse_square(stated)
        if size is None:
            problems.add(
                f"{folder}: image size is {stated!r} in the processor files; expected the side of "
                "a square, or equal height and width"
            )
    if processor.has("num_image_tokens"):
        tokens = processor.size("num_image_tokens", tokens or 1)
    for name, value, other in (
        ("image size", size, vision_size), ("image tokens", tokens, vision_tokens),
    ):  # fmt: skip
        if value is None:
            problems.add(
                f"{folder}: no {name}; expected image_size in preprocessor_config.json and "
                "num_image_tokens in processor_config.json, or a vision config in config.json"
            )
        elif None not in (value, other) and value != other:
            problems.add(
                f"{folder}: {name} is {value} in the processor files and {other} by config.json"
            )
    return size, tokens


def read_vision_geometry(
    config: Mapping[str, Any], file: Path = Path("config.json"), parse: ParseVision = parse_vision
) -> tuple[int | None, int | None]:
    """Returns (image size, image tokens) of a config.json; None for a size it does not state.

    Raises:
        InputError: listing the fields of the vision tower that are malformed.
    """
    siglip = parse(dict(config), file)
    return (siglip.image_size, siglip.num_tokens) if siglip else (None, None)


def _parse_square(size: Any) -> int | None:
    """Returns the side of 384, [384, 384] or {"height": 384, "width": 384}; else None."""
    sides = list(size.values()) if isinstance(size, Mapping) else size
    sides = sides if isinstance(sides, list) else [sides]
    # type(), because True is an int and equals 1.
    same = sides and all(type(side) is int and side == sides[0] > 0 for side in sides)
    return sides[0] if same else None


def _parse_floats(value: Any) -> tuple[float, ...]:
    """Returns a list of numbers, or one number three times; empty for anything else."""
    items = value if isinstance(value, list) else [value] * 3
    return tuple(map(float, items)) if all(isinstance(i, int | float) for i in items) else ()


def _is_same_number(value: Any, expected: float) -> bool:
    return isinstance(value, int | float) and bool(np.isclose(float(value), expected))
