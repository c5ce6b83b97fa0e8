"""The table of rewards: what each is called, needs and accepts; and how a batch is scored.

A reward is a function `(samples, context, *, options) -> [N] float32`, NaN where it does not
apply. To add one, write it and give it a line in REGISTRY: its keyword-only parameters are the
options that a config may set, checked against their annotations.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import time
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from corl_jax.errors import InputError
from corl_jax.nearest import suggest_name
from corl_jax.rewards import clip_scores, custom, cycle, functions, policy
from corl_jax.rewards.options import Option, option_problem
from corl_jax.rewards.samples import Context, Policy, RewardFunction, Samples

if TYPE_CHECKING:
    from corl_jax.config.schema import Compat, Reward

__all__ = [
    "COMPAT",
    "REGISTRY",
    "BoundReward",
    "Context",
    "Option",
    "Policy",
    "RewardFunction",
    "RewardRow",
    "Samples",
    "missing_columns",
    "options_of",
    "resolve",
    "resolve_custom",
    "resolve_one",
    "score",
    "score_timed",
]

TASKS = ("t2i", "mm2t")


@dataclasses.dataclass(frozen=True)
class RewardRow:
    """One reward of the table."""

    function: RewardFunction
    task: str  # t2i: scores images; mm2t: scores texts
    networks: tuple[str, ...] = ()  # always asked; `policy` stands for what `scorer` says
    # option -> value -> network that it asks for
    chosen: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)
    columns: tuple[str, ...] = ()  # the data must have them all
    either: tuple[str, ...] = ()  # the data must have one of them
    optional: tuple[str, ...] = ()  # used where the data has them
    every_column: bool = False  # a user's reward that takes whatever the rows have
    any_size: bool = False  # takes images one by one, of whatever sizes
    # column -> option that stands in for it; a run's data must have it or set the option
    stand_ins: Mapping[str, str] = dataclasses.field(default_factory=dict)
    # (options set, defaults of all) -> what is wrong with them together
    check: Callable[[Mapping[str, Any], Mapping[str, Any]], list[str]] = lambda options, _: []


REGISTRY: dict[str, RewardRow] = {
    "format": RewardRow(functions.well_formed, "mm2t"),
    "format_tag": RewardRow(functions.tags, "mm2t"),
    "qa_accuracy": RewardRow(
        functions.qa_accuracy,
        "mm2t",
        columns=("qa_solution",),
        optional=("qa_type", "qa_problem"),
        stand_ins={"qa_type": "default_type"},
    ),
    "oc_accuracy": RewardRow(
        functions.oc_accuracy,
        "mm2t",
        either=("cls_solution", "qa_solution"),
    ),
    "t2i_ti_sim": RewardRow(policy.ti_sim, "t2i", ("policy",), columns=("prompt",)),
    "t2i_bid_cycle_reward": RewardRow(
        cycle.bid_cycle,
        "t2i",
        chosen={
            "caption": {"policy": "policy", "blip": "blip"},
            "text_term": {"bertscore": "bert", "sentence": "sentence"},
            "image_term": {"lpips": "lpips"},
        },
        columns=("prompt", "real_image"),
        check=cycle.option_problems,
    ),
    "t2i_cycle_reward": RewardRow(
        cycle.cycle,
        "t2i",
        chosen={
            "caption": {"policy": "policy", "blip": "blip"},
            "text_term": {"bertscore": "bert", "sentence": "sentence"},
        },
        columns=("prompt",),
        check=cycle.option_problems,
    ),
    "t2i_clip_reward": RewardRow(clip_scores.clip_reward, "t2i", ("clip",), columns=("prompt",)),
    "pickscore": RewardRow(clip_scores.pickscore, "t2i", ("pickscore",), columns=("prompt",)),
    "hpsv2": RewardRow(clip_scores.hpsv2, "t2i", ("hpsv2",), columns=("prompt",)),
    "aesthetic": RewardRow(clip_scores.aesthetic, "t2i", ("clip_l14", "aesthetic")),
    "t2i_pixel_mse": RewardRow(functions.pixel_mse, "t2i", columns=("real_image",)),
    "t2i_qa": RewardRow(
        policy.qa,
        "t2i",
        ("policy",),
        columns=("qa_problem", "qa_solution", "qa_type"),
    ),
    "t2i_oc": RewardRow(
        policy.oc,
        "t2i",
        ("policy",),
        either=("cls_solution", "qa_solution"),
        optional=("cls_problem", "qa_problem", "prompt"),
    ),
    "t2i_od": RewardRow(policy.od, "t2i", ("policy",), columns=("od_problem", "od_solution")),
    "shapes_checker": RewardRow(functions.shapes, "t2i", columns=("spec",)),
}

COMPAT: dict[str, tuple[tuple[str, str, Any], ...]] = {
    "mc_as_open_ended": (("qa_accuracy", "mc", False),),
    "answer_single_line": (
        ("qa_accuracy", "multiline_answer", False),
        ("oc_accuracy", "multiline_answer", False),
    ),
    "answer_in_thoughts": (
        ("qa_accuracy", "answer_in_thoughts", True),
        ("oc_accuracy", "answer_in_thoughts", True),
    ),
    "compare_by_letters": (
        ("qa_accuracy", "numbers_by_value", False),
        ("oc_accuracy", "substrings", True),
        ("t2i_oc", "substrings", True),
    ),
    "format_without_strip": (("format", "strip", False),),
    "format_repeated_blocks": (("format", "repeated_blocks", True),),
    "ti_sim_fixed_spans": (("t2i_ti_sim", "fixed_spans", True),),
}
"""Switch of the config's `compat` block -> (reward, option, value) that it sets."""


@dataclasses.dataclass(frozen=True)
class BoundReward:
    """A reward as one run uses it: its options are bound."""

    name: str
    weight: float
    function: RewardFunction
    entry: RewardRow
    networks: tuple[str, ...] = ()  # reward networks by name, see `networks.NETWORKS`
    scorers: tuple[str, ...] = ()  # `policy`, `initial` or the path of a checkpoint


def resolve(rewards: Sequence[Reward], compat: Compat) -> dict[str, list[BoundReward]]:
    """The rewards of each task, in the config's order, with options and compat switches bound.

    Raises:
        InputError: unknown or repeated names, unknown or unfitting options, contradictions.
    """
    resolved: dict[str, list[BoundReward]] = {task: [] for task in TASKS}
    problems, seen = [], set()
    for reward in rewards:
        if reward.label in seen:
            problems.append(f"rewards: {reward.label} is listed more than once; merge the entries")
            continue
        seen.add(reward.label)
        try:
            if reward.use is not None:
                one = resolve_custom(reward)
            else:
                options = dict(reward.options)
                problems += _apply_compat(reward.label, options, compat)
                one = resolve_one(reward.label, options, reward.weight, "rewards")
            resolved[one.entry.task].append(one)
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    return resolved


def resolve_custom(reward: Reward, where: str = "rewards") -> BoundReward:
    """A reward by `use`, from the user's own file or module.

    Raises:
        InputError: listing what is wrong with the file, the function or the options.
    """
    function = custom.load(
        reward.use or "",
        reward.options,
        timeout_s=reward.timeout_s,
        max_failures=reward.max_failures,
        where=where,
    )
    if function.name in REGISTRY:
        raise InputError(
            f"{where}: {reward.use}: {function.name} is the name of a built-in reward; rename it"
        )
    entry = RewardRow(
        function,
        function.task,
        columns=function.columns,
        optional=function.optional,
        every_column=function.parameters.every_column,
        any_size=True,
    )
    return BoundReward(function.name, reward.weight, function, entry)


def resolve_one(
    name: str, options: Mapping[str, Any], weight: float = 1.0, where: str = "reward"
) -> BoundReward:
    """One reward with its options bound; `where` starts the error messages.

    Raises:
        InputError: listing what is wrong with the name or the options.
    """
    if name not in REGISTRY:
        raise InputError(f"{where}: unknown reward {name!r}; {suggest_name(name, REGISTRY)}")
    entry, accepted = REGISTRY[name], options_of(name)
    problems = []
    for key, value in options.items():
        problem = option_problem(accepted, key, value)
        if problem:
            problems.append(f"{where}: {name}: option {key}: {problem}")
    defaults = {key: option.default for key, option in accepted.items()}
    if "scorer" in accepted and not str(options.get("scorer", "policy")).strip():
        problems.append(
            f"{where}: {name}: option scorer: found {options['scorer']!r}; expected policy, "
            "initial, or the path or hub id of a checkpoint"
        )
    if not problems:
        problems += [f"{where}: {name}: {problem}" for problem in entry.check(options, defaults)]
    if problems:
        raise InputError(problems)
    asked = _asked(entry, {**defaults, **options})
    scorers = (str(options.get("scorer", "policy")),) if "policy" in asked else ()
    networks = tuple(network for network in asked if network != "policy")
    function = functools.partial(entry.function, **options)
    return BoundReward(name, weight, function, entry, networks, scorers)


def _asked(entry: RewardRow, options: Mapping[str, Any]) -> tuple[str, ...]:
    """The networks that a reward with these options runs."""
    by_option = (values.get(options[option]) for option, values in entry.chosen.items())
    return (*entry.networks, *(network for network in by_option if network))


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


def missing_columns(resolved: Sequence[BoundReward], available: Collection[str]) -> list[str]:
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
    resolved: Sequence[BoundReward], samples: Samples, context: Context
) -> dict[str, np.ndarray]:
    """Each reward of the samples by name, [N] float32; NaN where it does not apply or overflows.

    Raises:
        InputError: the samples lack a column.
        ValueError: a reward function gave something else than N numbers.
    """
    return score_timed(resolved, samples, context)[0]


def score_timed(
    resolved: Sequence[BoundReward], samples: Samples, context: Context
) -> tuple[dict[str, np.ndarray], dict[str, dict[str, float]]]:
    """As `score`, and what each reward cost: name -> {seconds, failures, failed}.

    `failures` are the calls that failed since the process started, `failed` the share of these
    samples that go without, which only a user's own reward has: a registered one that fails ends
    the run.
    """
    problems = missing_columns(resolved, samples.columns)
    if problems:
        raise InputError(problems)
    scores, costs = {}, {}
    for reward in resolved:
        began = time.perf_counter()
        values = np.asarray(reward.function(samples, context), np.float32)
        costs[reward.name] = {
            "seconds": time.perf_counter() - began,
            "failures": float(getattr(reward.function, "failures", 0)),
        }
        if isinstance(reward.function, custom.CustomReward):
            share = reward.function.failed_samples / max(len(samples), 1)
            costs[reward.name]["failed"] = share
        if values.shape != (len(samples),):
            raise ValueError(
                f"reward {reward.name}: gave shape {values.shape} for {len(samples)} samples"
            )
        scores[reward.name] = np.where(np.isfinite(values), values, np.float32(np.nan))
    return scores, costs
