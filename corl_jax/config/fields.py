"""Defines the types of options in `schema`: bounded numbers, paths, defaults, blocks."""

from __future__ import annotations

import math
from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from corl_jax.errors import InputError
from corl_jax.input_files import expand_path
from corl_jax.tasks import choose_tasks

MAX_IMAGE_STEPS = 10_000
"""Most steps of an image that is drawn in steps: their tables are made before the first one."""
Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
ImageSteps = Annotated[int, Field(gt=0, le=MAX_IMAGE_STEPS)]
Fraction = Annotated[float, Field(ge=0, le=1)]
LEAST, LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
"""Bounds of the positive numbers that float32, in which options are computed with, holds."""


def _check_float32(number: float) -> float:
    if number != 0 and not LEAST <= number <= LARGEST:
        raise ValueError(f"expected a number that float32 holds, of {LEAST:.2g} to {LARGEST:.2g}")
    return number


_Float32 = AfterValidator(_check_float32)
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False), _Float32]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False), _Float32]


def _refuse_zero(size: int) -> int:
    if size == 0:
        raise ValueError("expected -1, or 1 or more")
    return size


def _expand(value: Any) -> Any:
    """Expands a path, or each path of a list."""
    if isinstance(value, list):
        return [_expand(path) for path in value]
    try:
        return expand_path(value)
    except InputError as error:
        # pydantic adds key and value to the message.
        raise ValueError(str(error).removeprefix(f"{value}: ")) from None


def _expand_file(value: str) -> str:
    # From the right: a path may have a colon, a function's name has none.
    file, colon, function = value.rpartition(":")
    return f"{_expand(file)}{colon}{function}"


def _expand_scorer(options: dict[str, Any]) -> dict[str, Any]:
    scorer = options.get("scorer")
    return options | {"scorer": _expand(scorer)} if isinstance(scorer, str) else options


def option(default: Any, description: str) -> Any:
    """Returns a field with a default and the text that explains it."""
    # Type checkers see the default of a field only if it is given by position.
    return Field(default, description=description)


Axis = Annotated[int, Field(ge=-1), AfterValidator(_refuse_zero)]

# Every option that names a place has one of these types: `~` and `$VAR` are replaced.
ConfigPath = Annotated[str, AfterValidator(_expand)]
ConfigPaths = Annotated[str | list[str], AfterValidator(_expand)]
CodePath = Annotated[str, AfterValidator(_expand_file)]  # FILE:NAME
RewardOptions = Annotated[dict[str, Any], AfterValidator(_expand_scorer)]


def _check_tasks(name: str) -> str:
    choose_tasks(name)
    return name


TaskChoice = Annotated[str, AfterValidator(_check_tasks)]


def _check_rates(rates: dict[str, float]) -> dict[str, float]:
    if not all(0 < rate < math.inf for rate in rates.values()):
        raise ValueError(
            "expected finite rates above 0; to freeze a group, leave its parameters out of "
            "train.trainable"
        )
    return rates


LearningRates = Annotated[dict[str, float], AfterValidator(_check_rates)]


class Section(BaseModel):
    """Base class of config blocks: frozen, strictly typed, unknown keys are errors."""

    # Strict: pydantic would otherwise read `true` as the number 1 and "5" as 5. No protected
    # namespaces, because pydantic warns about names of options that begin with "model_".
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())
