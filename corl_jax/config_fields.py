"""What the options of `config` are made of: numbers with bounds, defaults with a text, sections."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def _some(size: int) -> int:
    if size == 0:
        raise ValueError("expected -1, or 1 or more")
    return size


def option(default: Any, description: str) -> Any:
    """A field with a default, which type checkers miss where `Field` takes it by position."""
    return Field(default, description=description)


Axis = Annotated[int, Field(ge=-1), AfterValidator(_some)]


class Section(BaseModel):
    """A frozen block of options that knows no others."""

    # Strict: `true` is no number and "5" is no 5, which pydantic would otherwise convert.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())
