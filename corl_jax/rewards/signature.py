"""Reads the inputs, columns and options of a reward function from its parameters.

Nothing here imports JAX or numpy, because it also runs in the process of a user's reward (see
`worker`).
"""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from corl_jax.errors import InputError, Problems
from corl_jax.nearest import suggest_name
from corl_jax.tasks import TASKS

TASK_OF = {"texts" if task.makes_text else "images": name for name, task in reversed(TASKS.items())}
"""Name of the parameter for the completions -> the first task that makes such completions.

A user's reward must have one of the two parameters."""


REQUIRED = inspect.Parameter.empty


@dataclasses.dataclass(frozen=True)
class Option:
    """A keyword-only parameter of a reward, which a config may set."""

    annotation: Any
    default: Any  # REQUIRED without a default


@dataclasses.dataclass(frozen=True)
class Parameters:
    """The parameters of a user's function, by their meaning."""

    completions: str  # key of TASK_OF
    columns: tuple[str, ...]
    optional: tuple[str, ...]  # columns with a default
    every_column: bool  # it has `**columns`
    options: tuple[str, ...]

    @property
    def task(self) -> str:
        """The task whose completions the function scores."""
        return TASK_OF[self.completions]


def read_parameters(function: Callable[..., Any], options: Mapping[str, Any]) -> Parameters:
    """Returns the function's parameters by meaning, and checks the options that a config sets.

    Raises: InputError listing parameters that get no value, and options that do not fit.
    """
    # Values are passed by keyword, so a parameter without a usable keyword gets none.
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise InputError(f"its parameters cannot be read ({error}); wrap it in a def") from None
    problems, inputs = Problems(), []
    columns: dict[str, bool] = {}  # name -> whether it has a default
    for p in parameters:
        if p.kind is p.POSITIONAL_ONLY:
            problems.add(f"parameter {p.name}: positional-only; move it behind the /")
        elif p.kind is p.VAR_POSITIONAL:
            problems.add(f"parameter *{p.name}: nothing fills it; write * or drop it")
        elif p.kind is p.KEYWORD_ONLY and p.name in TASK_OF:
            problems.add(f"parameter {p.name}: an option by its place; move it before the *")
        elif p.kind is p.POSITIONAL_OR_KEYWORD and p.name in TASK_OF:
            inputs.append(p.name)
        elif p.kind is p.POSITIONAL_OR_KEYWORD:
            columns[p.name] = p.default is not p.empty
    if len(inputs) != 1 and not problems:
        names = ", ".join(p.name for p in parameters) or "none"
        problems.add(
            f"found the parameters {names}; expected images (a reward of images) or texts (a "
            "reward of answers) among them, and not both"
        )
    keywords = {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}
    annotations = _read_annotations(function, keywords, problems)
    problems.raise_any()
    accepted = {key: Option(annotations[key], keywords[key].default) for key in keywords}
    check_options(accepted, options)
    return Parameters(
        completions=inputs[0],
        columns=tuple(name for name, optional in columns.items() if not optional),
        optional=tuple(name for name, optional in columns.items() if optional),
        every_column=any(p.kind is p.VAR_KEYWORD for p in parameters),
        options=tuple(keywords),
    )


def check_options(accepted: Mapping[str, Option], options: Mapping[str, Any]) -> None:
    """Raises: InputError listing options that do not fit, and required ones that are missing."""
    problems = Problems()
    for key, value in options.items():
        if problem := find_option_problem(accepted, key, value):
            problems.add(f"option {key}: {problem}")
    for key, option in accepted.items():
        if option.default is REQUIRED and key not in options:
            problems.add(
                f"option {key}: missing, and the function has no default for it; set options: "
                f"{{{key}: ..}}"
            )
    problems.raise_any()


def _read_annotations(
    function: Callable[..., Any],
    keywords: Mapping[str, inspect.Parameter],
    problems: Problems,
) -> dict[str, Any]:
    """Returns the types of the options; adds to `problems` those that cannot be read."""
    # Strings in annotations (`from __future__ import annotations`) need the globals of the file. A
    # decorated function has them behind `__wrapped__`, an object with `__call__` at its class.
    callables: tuple[Any, ...] = (inspect.unwrap(function), type(function).__call__)
    names = next((x.__globals__ for x in callables if hasattr(x, "__globals__")), {})
    hints = {}
    # One by one, and the options only: the annotation of another parameter may name a type that
    # the file does not import.
    for key, parameter in keywords.items():
        annotation = Any if parameter.annotation is parameter.empty else parameter.annotation
        # get_type_hints evaluates all annotations of its argument, so it gets a holder of only one.
        holder = types.SimpleNamespace(__annotations__={key: annotation})
        try:
            hints |= typing.get_type_hints(holder, globalns=names, include_extras=True)
        except Exception as error:  # evaluating an annotation can raise anything
            problems.add(
                f"option {key}: its annotation {annotation!r} cannot be read ({error}); use a type "
                "that the file imports"
            )
    return hints


def find_option_problem(accepted: Mapping[str, Option], key: str, value: Any) -> str | None:
    """Returns what is wrong with an option that a config sets, None if nothing is."""
    import pydantic  # slow to import, and not needed for a function without options

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
