"""The table of rewards: what each is called, needs and accepts; and how a batch is scored.

A reward is a function `(samples, context, *, options) -> [N] float32`, NaN where it does not
apply. To add one, write it and give it a line in REGISTRY: its keyword-only parameters are the
options that a config may set, checked against their annotations.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import typing
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from corl_jax.errors import InputError
from corl_jax.rewards import functions, policy
from corl_jax.rewards.samples import Context, Policy, RewardFunction, Samples

if TYPE_CHECKING:
    from corl_jax.config import Compat, Reward

__all__ = [
    "COMPAT",
    "REGISTRY",
    "Context",
    "Entry",
    "Option",
    "Policy",
    "Resolved",
    "RewardFunction",
    "Samples",
    "missing_columns",
    "options_of",
    "resolve",
    "resolve_one",
    "score",
]

TASKS = ("t2i", "mm2t")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One reward of the table."""

    function: RewardFunction
    task: str  # t2i: scores images; mm2t: scores texts
    networks: tuple[str, ...] = ()  # what it asks besides pixels and strings
    columns: tuple[str, ...] = ()  # the data must have them all
    either: tuple[str, ...] = ()  # the data must have one of them
    optional: tuple[str, ...] = ()  # used where the data has them
    # column -> option that stands in for it; a run's data must have it or set the option
    stand_ins: Mapping[str, str] = dataclasses.field(default_factory=dict)
    # option -> values that other implementations have and this version does not
    absent: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)


REGISTRY: dict[str, Entry] = {
    "format": Entry(functions.well_formed, "mm2t"),
    "format_tag": Entry(functions.tags, "mm2t"),
    "qa_accuracy": Entry(
        functions.qa_accuracy,
        "mm2t",
        columns=("qa_solution",),
        optional=("qa_type", "qa_problem"),
        stand_ins={"qa_type": "default_type"},
    ),
    "oc_accuracy": Entry(
        functions.oc_accuracy,
        "mm2t",
        either=("cls_solution", "qa_solution"),
    ),
    "t2i_ti_sim": Entry(policy.ti_sim, "t2i", ("policy",), columns=("prompt",)),
    "t2i_bid_cycle_reward": Entry(
        policy.bid_cycle,
        "t2i",
        ("policy",),
        columns=("prompt", "real_image"),
        absent={
            "caption": ("blip",),
            "text_term": ("bertscore", "spice", "sentence-cos"),
            "image_term": ("lpips",),
        },
    ),
    "t2i_pixel_mse": Entry(functions.pixel_mse, "t2i", columns=("real_image",)),
    "t2i_qa": Entry(
        policy.qa,
        "t2i",
        ("policy",),
        columns=("qa_problem", "qa_solution", "qa_type"),
    ),
    "t2i_oc": Entry(
        policy.oc,
        "t2i",
        ("policy",),
        either=("cls_solution", "qa_solution"),
        optional=("cls_problem", "qa_problem", "prompt"),
    ),
    "t2i_od": Entry(policy.od, "t2i", ("policy",), columns=("od_problem", "od_solution")),
    "shapes_checker": Entry(functions.shapes, "t2i", columns=("spec",)),
}

COMPAT: dict[str, tuple[tuple[str, str, Any], ...]] = {
    "mc_as_open_ended": (("qa_accuracy", "mc", False),),
    "answer_single_line": (
        ("qa_accuracy", "multiline_answer", False),
        ("oc_accuracy", "multiline_answer", False),
    ),
    "format_without_strip": (("format", "strip", False),),
    "ti_sim_fixed_spans": (("t2i_ti_sim", "fixed_spans", True),),
}
"""Switch of the config's `compat` block -> (reward, option, value) that it sets."""


@dataclasses.dataclass(frozen=True)
class Option:
    """A keyword that a reward accepts."""

    annotation: Any
    default: Any


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A reward as one run uses it: its options are bound."""

    name: str
    weight: float
    function: RewardFunction
    entry: Entry


def resolve(rewards: Sequence[Reward], compat: Compat) -> dict[str, list[Resolved]]:
    """The rewards of each task, in the config's order, with options and compat switches bound.

    Raises:
        InputError: unknown or repeated names, unknown or unfitting options, contradictions.
    """
    resolved: dict[str, list[Resolved]] = {task: [] for task in TASKS}
    problems, seen = [], set()
    for reward in rewards:
        if reward.name in seen:
            problems.append(f"rewards: {reward.name} is listed more than once; merge the entries")
            continue
        seen.add(reward.name)
        try:
            options = dict(reward.options)
            problems += _apply_compat(reward.name, options, compat)
            one = resolve_one(reward.name, options, reward.weight, "rewards")
            resolved[one.entry.task].append(one)
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    return resolved


def resolve_one(
    name: str, options: Mapping[str, Any], weight: float = 1.0, where: str = "reward"
) -> Resolved:
    """One reward with its options bound; `where` starts the error messages.

    Raises:
        InputError: listing what is wrong with the name or the options.
    """
    if name not in REGISTRY:
        near = difflib.get_close_matches(name, REGISTRY, n=1, cutoff=0.0)[0]
        raise InputError(
            f"{where}: unknown reward {name!r}; did you mean {near}? (known: {', '.join(REGISTRY)})"
        )
    entry, accepted = REGISTRY[name], options_of(name)
    problems = []
    for key, value in options.items():
        problem = _option_problem(entry, accepted, key, value)
        if problem:
            problems.append(f"{where}: {name}: option {key}: {problem}")
    if problems:
        raise InputError(problems)
    return Resolved(name, weight, functools.partial(entry.function, **options), entry)


@functools.cache
def options_of(name: str) -> dict[str, Option]:
    """The options of a reward by name."""
    function = REGISTRY[name].function
    hints = typing.get_type_hints(function, include_extras=True)
    return {
        key: Option(hints[key], parameter.default)
        for key, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


def _option_problem(
    entry: Entry, accepted: Mapping[str, Option], key: str, value: Any
) -> str | None:
    import pydantic

    if key not in accepted:
        if not accepted:
            return "unknown; this reward has no options"
        near = difflib.get_close_matches(str(key), accepted, n=1, cutoff=0.0)[0]
        return f"unknown; did you mean {near}? (known: {', '.join(accepted)})"
    default = accepted[key].default
    if isinstance(value, str) and value in entry.absent.get(key, ()):
        return f"{value} needs a network that this version does not have; use {default!r}"
    try:
        pydantic.TypeAdapter(accepted[key].annotation).validate_python(value, strict=True)
    except pydantic.ValidationError as error:
        reasons = "; ".join(item["msg"] for item in error.errors())
        return f"found {value!r}; {reasons} (default {default!r})"
    return None


def _apply_compat(name: str, options: dict[str, Any], compat: Compat) -> list[str]:
    """Sets the options that the switches ask for; the problems are contradictions."""
    problems = []
    for switch, effects in COMPAT.items():
        for reward, option, value in effects:
            if reward != name or not getattr(compat, switch):
                continue
            if options.setdefault(option, value) != value:
                problems.append(
                    f"rewards: {name}: option {option}: found {options[option]!r}, which "
                    f"contradicts compat.{switch}; drop one of the two"
                )
    return problems


def missing_columns(resolved: Sequence[Resolved], available: Collection[str]) -> list[str]:
    """A problem for each column that a reward needs and the data does not have."""
    problems = []
    for reward in resolved:
        entry = reward.entry
        found = f"found {', '.join(sorted(available)) or 'none'}"
        for column in entry.columns:
            if column not in available:
                problems.append(
                    f"data: column {column} is missing; {reward.name} needs it; {found}"
                )
        set_options = getattr(reward.function, "keywords", {})
        for column, option in entry.stand_ins.items():
            if column not in available and set_options.get(option) is None:
                problems.append(
                    f"data: column {column} is missing; {reward.name} needs it or its option "
                    f"{option}; {found}; set data.columns.{column} or options: {{{option}: ..}}"
                )
        if entry.either and not set(entry.either) & set(available):
            names = " or ".join(entry.either)
            problems.append(f"data: no column {names}; {reward.name} needs one; {found}")
    return problems


def score(
    resolved: Sequence[Resolved], samples: Samples, context: Context
) -> dict[str, np.ndarray]:
    """Each reward of the samples by name, [N] float32; NaN where it does not apply or overflows.

    Raises:
        InputError: the samples lack a column.
        ValueError: a reward function gave something else than N numbers.
    """
    problems = missing_columns(resolved, samples.columns)
    if problems:
        raise InputError(problems)
    scores = {}
    for reward in resolved:
        values = np.asarray(reward.function(samples, context), np.float32)
        if values.shape != (len(samples),):
            raise ValueError(
                f"reward {reward.name}: gave shape {values.shape} for {len(samples)} samples"
            )
        scores[reward.name] = np.where(np.isfinite(values), values, np.float32(np.nan))
    return scores
