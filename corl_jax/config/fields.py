"""What the options of `schema` are made of: numbers with bounds, paths, defaults, sections."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from corl_jax.errors import InputError
from corl_jax.input_files import expand_path

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def _some(size: int) -> int:
    if size == 0:
        raise ValueError("expected -1, or 1 or more")
    return size


def _expand(value: Any) -> Any:
    """Expands a path or each of a list; pydantic adds key and value to the message."""
    if isinstance(value, list):
        return [_expand(path) for path in value]
    try:
        return expand_path(value)
    except InputError as error:
        raise ValueError(str(error).removeprefix(f"{value}: ")) from None


def _expand_file(value: str) -> str:
    file, colon, function = value.rpartition(":")
    return f"{_expand(file)}{colon}{function}"


def _expand_scorer(options: dict[str, Any]) -> dict[str, Any]:
    scorer = options.get("scorer")
    return options | {"scorer": _expand(scorer)} if isinstance(scorer, str) else options


def option(default: Any, description: str) -> Any:
    """A field with a default, which type checkers miss where `Field` takes it by position."""
    return Field(default, description=description)


Axis = Annotated[int, Field(ge=-1), AfterValidator(_some)]

# Every option that names a place has one of these types: `~` and `$VAR` are replaced.
ConfigPath = Annotated[str, AfterValidator(_expand)]
ConfigPaths = Annotated[str | list[str], AfterValidator(_expand)]
CodePath = Annotated[str, AfterValidator(_expand_file)]  # FILE:NAME
RewardOptions = Annotated[dict[str, Any], AfterValidator(_expand_scorer)]


class Section(BaseModel):
    """A frozen block of options that knows no others."""

    # Strict: `true` is no number and "5" is no 5, which pydantic would otherwise convert.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())
