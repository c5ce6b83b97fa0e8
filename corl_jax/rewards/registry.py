"""The table of rewards with their names, inputs and options, and how a batch is scored.

A reward is a function `(samples, context, *, options) -> [N] float32`, NaN where it does not
apply. All rewards of a batch are started before the first one is waited for. To add a reward, write
the function and give it a row in REGISTRY. Its keyword-only parameters are the options that a
config may set, checked against their annotations.
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

from corl_jax.data.instructions import CAPTION
from corl_jax.errors import InputError, Problems
from corl_jax.nearest import suggest_name
from corl_jax.rewards import clip_scores, cycle, geneval, http, own, policy
from corl_jax.rewards.image_rewards import score_pixel_mse, score_shapes
from corl_jax.rewards.samples import Context, Policy, RewardFunction, Samples
from corl_jax.rewards.self_answers import score_self_answer
from corl_jax.rewards.signature import Option, find_option_problem
from corl_jax.rewards.starting import start_rewards
from corl_jax.rewards.text_rewards import (
    find_buffer_problems,
    score_format,
    score_format_tags,
    score_oc_accuracy,
    score_qa_accuracy,
    score_soft_overlong,
)
from corl_jax.tasks import IMAGES, TASKS, TEXTS

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
    "bind_reward",
    "bind_rewards",
    "bind_user_reward",
    "find_missing_columns",
    "group_by_task",
    "list_options",
    "score",
    "score_and_measure",
]


@dataclasses.dataclass(frozen=True)
class RewardRow:
    """A row of REGISTRY: a reward's function and what it needs."""

    function: RewardFunction
    scores: str  # IMAGES or TEXTS: it applies to the tasks with such results
    networks: tuple[str, ...] = ()  # that it always uses; `policy` stands for the scorer
    # option -> value -> network that it uses then
    chosen: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)
    tokenizers: tuple[str, ...] = ()  # networks whose tokenizer it reads, though not all users do
    columns: tuple[str, ...] = ()  # the data must have them all
    either: tuple[str, ...] = ()  # the data must have one of them
    optional: tuple[str, ...] = ()  # used if the data has them
    every_column: bool = False  # takes all columns of the data
    any_size: bool = False  # takes images of different sizes
    reads_hidden_states: bool = False  # of the scorer; other rewards ask it questions
    reads_lengths: bool = False  # the number of tokens of each completion
    # column -> option that replaces it: the data needs the column, or the config the option
    stand_ins: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fixed_question: str | None = None  # what it asks the scorer; None: questions of the data
    # (options set, defaults of all) -> what is wrong with their combination
    find_option_problems: Callable[[Mapping, Mapping], list[str]] = lambda options, defaults: []
    # (all options, network -> its sizes) -> options that the networks cannot serve
    find_network_problems: Callable[[Mapping, Mapping], list[str]] = lambda options, sizes: []
    # all options -> the function, for a reward that has a state; raises InputError
    bind: Callable[[Mapping[str, Any]], RewardFunction] | None = None


make_server_row = functools.partial(
    RewardRow, every_column=True, any_size=True, find_option_problems=http.find_url_problems
)
"""Returns the row of a reward that servers compute."""

REGISTRY: dict[str, RewardRow] = {
    "format": RewardRow(score_format, TEXTS),
    "format_tag": RewardRow(score_format_tags, TEXTS),
    "qa_accuracy": RewardRow(
        score_qa_accuracy,
        TEXTS,
        columns=("qa_solution",),
        optional=("qa_type", "qa_problem"),
        stand_ins={"qa_type": "default_type"},
    ),
    "oc_accuracy": RewardRow(score_oc_accuracy, TEXTS, either=("cls_solution", "qa_solution")),
    "self_answer": RewardRow(score_self_answer, TEXTS, columns=("tag", "include")),
    "soft_overlong": RewardRow(
        score_soft_overlong,
        TEXTS,
        reads_lengths=True,
        find_option_problems=find_buffer_problems,
    ),
    "t2i_ti_sim": RewardRow(
        policy.score_ti_sim, IMAGES, ("policy",), columns=("prompt",), reads_hidden_states=True
    ),
    "t2i_bid_cycle_reward": RewardRow(
        cycle.score_bid_cycle,
        IMAGES,
        chosen={
            "caption": {"policy": "policy", "blip": "blip"},
            "text_term": {"bertscore": "bert", "sentence": "sentence"},
            "image_term": {"lpips": "lpips"},
        },
        columns=("prompt", "real_image"),
        fixed_question=CAPTION,
        find_option_problems=cycle.find_option_problems,
        find_network_problems=cycle.find_network_problems,
    ),
    "t2i_cycle_reward": RewardRow(
        cycle.score_cycle,
        IMAGES,
        chosen={
            "caption": {"policy": "policy", "blip": "blip"},
            "text_term": {"bertscore": "bert", "sentence": "sentence"},
        },
        columns=("prompt",),
        fixed_question=CAPTION,
        find_option_problems=cycle.find_option_problems,
        find_network_problems=cycle.find_network_problems,
    ),
    "t2i_clip_reward": RewardRow(clip_scores.score_clip, IMAGES, ("clip",), columns=("prompt",)),
    "pickscore": RewardRow(
        clip_scores.score_pickscore, IMAGES, ("pickscore",), columns=("prompt",)
    ),
    "hpsv2": RewardRow(clip_scores.score_hpsv2, IMAGES, ("hpsv2",), columns=("prompt",)),
    "aesthetic": RewardRow(
        clip_scores.score_aesthetic,
        IMAGES,
        ("clip_l14", "aesthetic"),
        find_network_problems=clip_scores.find_aesthetic_problems,
    ),
    "t2i_pixel_mse": RewardRow(score_pixel_mse, IMAGES, columns=("real_image",)),
    "answer_logprob": RewardRow(
        policy.score_answer_logprob, IMAGES, ("policy",), columns=("qa_problem", "qa_solution")
    ),
    "t2i_qa": RewardRow(
        policy.score_qa,
        IMAGES,
        ("policy",),
        columns=("qa_problem", "qa_solution", "qa_type"),
    ),
    "t2i_oc": RewardRow(
        policy.score_oc,
        IMAGES,
        ("policy",),
        either=("cls_solution", "qa_solution"),
        optional=("cls_problem", "qa_problem", "prompt"),
    ),
    "t2i_od": RewardRow(
        policy.score_od, IMAGES, ("policy",), columns=("od_problem", "od_solution")
    ),
    "shapes_checker": RewardRow(score_shapes, IMAGES, columns=("spec",)),
    "geneval": RewardRow(
        geneval.score_geneval,
        IMAGES,
        ("mask2former", "clip_l14"),
        columns=("geneval",),
        tokenizers=("clip_l14",),
        find_network_problems=geneval.find_detector_problems,
    ),
    "http": make_server_row(http.score_http, IMAGES, optional=("prompt",), bind=http.bind_images),
    "http_texts": make_server_row(
        http.score_http_texts, TEXTS, optional=("qa_problem",), bind=http.bind_texts
    ),
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
"""Switch of the config's `compat` block -> the (reward, option, value) that it sets."""


@dataclasses.dataclass(frozen=True)
class BoundReward:
    """A reward with the options that a config sets."""

    name: str
    weight: float
    function: RewardFunction
    row: RewardRow
    networks: tuple[str, ...] = ()  # keys of `networks.NETWORKS`
    scorers: tuple[str, ...] = ()  # `policy`, `initial` or the path of a checkpoint
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # with their defaults


def bind_rewards(rewards: Sequence[Reward], compat: Compat) -> list[BoundReward]:
    """Returns the rewards of a config in its order, with options and switches bound.

    Raises:
        InputError: unknown or repeated names, unknown or invalid options, contradictions.
    """
    bound: list[BoundReward] = []
    problems, labels = Problems(), set()
    for reward in rewards:
        # Metrics and scores are keyed by the name, so two entries would share one key.
        if reward.label in labels:
            problems.add(f"rewards: {reward.label} is listed more than once; merge the entries")
            continue
        labels.add(reward.label)
        with problems.collect():
            if reward.use is not None:
                function = bind_user_reward(reward)
            else:
                options = dict(reward.options)
                problems.add(_apply_compat(reward.label, options, compat))
                function = bind_reward(reward.label, options, reward.weight, "rewards")
            bound.append(function)
    problems.raise_any()
    return bound


def group_by_task(
    bound: Sequence[BoundReward], tasks: Sequence[str]
) -> dict[str, list[BoundReward]]:
    """Returns task -> the rewards that score its results."""
    return {
        task: [reward for reward in bound if reward.row.scores in TASKS[task].results]
        for task in tasks
    }


def bind_user_reward(reward: Reward, where: str = "rewards") -> BoundReward:
    """Returns the reward that `use` names in a user's file or module.

    Raises:
        InputError: listing what is wrong with the file, the function or the options.
    """
    function = own.load_user_reward(
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
    row = RewardRow(
        function,
        function.scores,
        columns=function.columns,
        optional=function.optional,
        every_column=function.parameters.every_column,
        any_size=True,
    )
    return BoundReward(function.name, reward.weight, function, row, options=reward.options)


def bind_reward(
    name: str, options: Mapping[str, Any], weight: float = 1.0, where: str = "reward"
) -> BoundReward:
    """Returns the reward of REGISTRY with its options bound; error messages begin with `where`.

    Raises:
        InputError: listing what is wrong with the name or the options.
    """
    if name not in REGISTRY:
        raise InputError(f"{where}: unknown reward {name!r}; {suggest_name(name, REGISTRY)}")
    row, accepted, problems = REGISTRY[name], list_options(name), Problems()
    for key, value in options.items():
        if problem := find_option_problem(accepted, key, value):
            problems.add(f"{where}: {name}: option {key}: {problem}")
    defaults = {key: option.default for key, option in accepted.items()}
    if "scorer" in accepted and not str(options.get("scorer", "policy")).strip():
        problems.add(
            f"{where}: {name}: option scorer: found {options['scorer']!r}; expected policy, "
            "initial, or the path or hub id of a checkpoint"
        )
    # The check of combinations assumes that each value has its type.
    if not problems:
        problems.add(row.find_option_problems(options, defaults), f"{where}: {name}: ")
    problems.raise_any()
    every = {**defaults, **options}
    # caption=blip, text_term=jaccard: chosen is ("blip", None): jaccard needs no network.
    chosen = (values.get(every[option]) for option, values in row.chosen.items())
    used = (*row.networks, *(network for network in chosen if network))
    scorers = (str(options.get("scorer", "policy")),) if "policy" in used else ()
    networks = tuple(network for network in used if network != "policy")
    function: RewardFunction = functools.partial(row.function, **options)
    if row.bind is not None:
        with problems.collect(f"{where}: {name}: "):
            function = row.bind(every)
        problems.raise_any()
    return BoundReward(name, weight, function, row, networks, scorers, every)


@functools.cache
def list_options(name: str) -> dict[str, Option]:
    """Returns the options that a reward of REGISTRY accepts."""
    function = REGISTRY[name].function
    hints = typing.get_type_hints(function, include_extras=True)
    return {
        key: Option(hints[key], parameter.default)
        for key, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


def _apply_compat(name: str, options: dict[str, Any], compat: Compat) -> list[str]:
    """Sets the options of the reward `name` that compat switches set; returns contradictions."""
    problems = []
    for switch, effects in COMPAT.items():
        for reward, option, value in effects:
            if reward != name or not getattr(compat, switch):
                continue
            # setdefault: an option that the config sets to the same value is no contradiction.
            if options.setdefault(option, value) != value:
                problems.append(
                    f"rewards: {name}: option {option}: found {options[option]!r}, which "
                    f"contradicts compat.{switch}; drop one of the two"
                )
    return problems


def find_missing_columns(resolved: Sequence[BoundReward], available: Collection[str]) -> list[str]:
    """Returns a problem for each column that a reward needs and the data does not have."""
    problems = []
    present = f"found {', '.join(sorted(available)) or 'none'}"
    for reward in resolved:
        row = reward.row
        for column in row.columns:
            if column not in available:
                problems.append(
                    f"data: column {column} is missing; {reward.name} needs it; {present}"
                )
        for column, option in row.stand_ins.items():
            if column not in available and reward.options.get(option) is None:
                problems.append(
                    f"data: column {column} is missing; {reward.name} needs it or its option "
                    f"{option}; {present}; set data.columns.{column} or options: {{{option}: ..}}"
                )
        if row.either and not set(row.either) & set(available):
            names = " or ".join(row.either)
            problems.append(f"data: no column {names}; {reward.name} needs one; {present}")
    return problems


def score(
    resolved: Sequence[BoundReward], samples: Samples, context: Context
) -> dict[str, np.ndarray]:
    """Returns name -> rewards [N] float32; NaN where a reward does not apply or overflows.

    Raises:
        InputError: the samples lack a column.
        ValueError: a reward function did not return N numbers.
    """
    return score_and_measure(resolved, samples, context)[0]


def score_and_measure(
    resolved: Sequence[BoundReward], samples: Samples, context: Context
) -> tuple[dict[str, np.ndarray], dict[str, dict[str, float]]]:
    """Returns the rewards as `score` does, and name -> {seconds, failures, failed}.

    `failures`: failed calls since the process started. `failed`: fraction of these samples without
    a reward because the call failed; only rewards that may fail have it: a user's, and `http`.
    """
    problems = find_missing_columns(resolved, samples.columns)
    if problems:
        raise InputError(problems)
    started = start_rewards(resolved, samples, context)
    scores, costs = {}, {}
    for reward in resolved:
        began = time.perf_counter()
        values, seconds = started[reward.name]
        values = np.asarray(values, np.float32)
        costs[reward.name] = {
            "seconds": seconds + time.perf_counter() - began,
            "failures": float(getattr(reward.function, "failures", 0)),
        }
        # An error in another built-in reward ends the run, so it has no such fraction.
        if isinstance(reward.function, own.UserReward | http.HttpReward):
            failed = reward.function.failed_samples / max(len(samples), 1)
            costs[reward.name]["failed"] = failed
        if values.shape != (len(samples),):
            raise ValueError(
                f"reward {reward.name}: gave shape {values.shape} for {len(samples)} samples"
            )
        # An overflow must not reach the group's mean, where it would make every advantage NaN.
        scores[reward.name] = np.where(np.isfinite(values), values, np.float32(np.nan))
    return scores, costs
