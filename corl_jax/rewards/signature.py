"""What a user's reward function asks for, read off its parameters.

Nothing here imports JAX or numpy: it runs in the reward's own process, see `worker`.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from corl_jax.errors import InputError
from corl_jax.rewards.options import REQUIRED, Option, option_problem

TASK_OF = {"images": "t2i", "texts": "mm2t"}
"""Parameter that a reward must have one of -> the task that it belongs to."""


@dataclasses.dataclass(frozen=True)
class Parameters:
    """What a user's function asks for."""

    task: str
    columns: tuple[str, ...]
    optional: tuple[str, ...]  # columns with a default
    every_column: bool  # it has `**columns`
    options: tuple[str, ...]


def read_parameters(function: Callable[..., Any], options: Mapping[str, Any]) -> Parameters:
    """Returns what the signature asks for, and checks the options that a config sets.

    Raises: InputError listing parameters that nothing fills, or options that do not fit.
    """
    try:
        listed = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise InputError(f"its parameters cannot be read ({error}); wrap it in a def") from None
    problems, inputs = [], []
    columns: dict[str, bool] = {}  # name -> whether it has a default
    for one in listed:
        if one.kind is one.POSITIONAL_ONLY:
            problems.append(f"parameter {one.name}: positional-only; move it behind the /")
        elif one.kind is one.VAR_POSITIONAL:
            problems.append(f"parameter *{one.name}: nothing fills it; write * or drop it")
        elif one.kind is one.KEYWORD_ONLY and one.name in TASK_OF:
            problems.append(f"parameter {one.name}: an option by its place; move it before the *")
        elif one.kind is one.POSITIONAL_OR_KEYWORD and one.name in TASK_OF:
            inputs.append(one.name)
        elif one.kind is one.POSITIONAL_OR_KEYWORD:
            columns[one.name] = one.default is not one.empty
    if len(inputs) != 1 and not problems:
        names = ", ".join(one.name for one in listed) or "none"
        problems.append(
            f"found the parameters {names}; expected images (a reward of drawings) or texts (a "
            "reward of answers) among them, and not both"
        )
    keywords = {one.name: one for one in listed if one.kind is one.KEYWORD_ONLY}
    annotations = _annotations(function, keywords, problems)
    if problems:
        raise InputError(problems)
    accepted = {key: Option(annotations[key], keywords[key].default) for key in keywords}
    if problems := _option_problems(accepted, options):
        raise InputError(problems)
    return Parameters(
        task=TASK_OF[inputs[0]],
        columns=tuple(name for name, optional in columns.items() if not optional),
        optional=tuple(name for name, optional in columns.items() if optional),
        every_column=any(one.kind is one.VAR_KEYWORD for one in listed),
        options=tuple(keywords),
    )


def _option_problems(accepted: Mapping[str, Option], options: Mapping[str, Any]) -> list[str]:
    problems = [
        f"option {key}: {problem}"
        for key, value in options.items()
        if (problem := option_problem(accepted, key, value))
    ]
    return problems + [
        f"option {key}: missing, and the function has no default for it; set options: {{{key}: ..}}"
        for key, option in accepted.items()
        if option.default is REQUIRED and key not in options
    ]


def _annotations(
    function: Callable[..., Any],
    keywords: Mapping[str, inspect.Parameter],
    problems: list[str],
) -> dict[str, Any]:
    """The types of the options alone: those of other parameters may name what is not imported."""
    callables: tuple[Any, ...] = (inspect.unwrap(function), type(function).__call__)
    names = next((one.__globals__ for one in callables if hasattr(one, "__globals__")), {})
    found = {}
    for key, parameter in keywords.items():
        given = Any if parameter.annotation is parameter.empty else parameter.annotation
        holder = types.SimpleNamespace(__annotations__={key: given})
        try:
            found |= typing.get_type_hints(holder, globalns=names, include_extras=True)
        except Exception as error:  # an annotation is any expression
            problems.append(
                f"option {key}: its annotation {given!r} cannot be read ({error}); use a type "
                "that the file imports"
            )
    return found
