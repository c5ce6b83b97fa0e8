"""Options of a reward: its keyword-only parameters, checked against their annotations."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

from corl_jax.nearest import suggest_name

REQUIRED = inspect.Parameter.empty


@dataclasses.dataclass(frozen=True)
class Option:
    """A keyword that a reward accepts."""

    annotation: Any
    default: Any  # REQUIRED where there is none


def option_problem(accepted: Mapping[str, Option], key: str, value: Any) -> str | None:
    """What is wrong with an option that a config sets, None if nothing is."""
    import pydantic

    if key not in accepted:
        if not accepted:
            return "unknown; this reward has no options"
        return f"unknown; {suggest_name(str(key), accepted)}"
    option = accepted[key]
    try:
        pydantic.TypeAdapter(option.annotation).validate_python(value, strict=True)
    except pydantic.ValidationError as error:
        reasons = "; ".join(item["msg"] for item in error.errors())
        default = "no default" if option.default is REQUIRED else f"default {option.default!r}"
        return f"found {value!r}; {reasons} ({default})"
    except pydantic.errors.PydanticUserError:
        return (
            f"its annotation {option.annotation!r} is no type that a config can give; annotate it "
            "as bool, int, float, str, a list or dict of them, or Literal"
        )
    return None
