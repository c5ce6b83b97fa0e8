"""The kinds of data sets: how each is recognised, asked and rated."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence

from corl_jax.errors import InputError
from corl_jax.evaluation.matching.yes_no import NO, YES
from corl_jax.evaluation.tsv import rate_choices, rate_judged, rate_yes_no
from corl_jax.evaluation.tsv.rating import Rater
from corl_jax.evaluation.tsv.table import IMAGE_PATH, Table, Values
from corl_jax.nearest import suggest_name

CHOICE, YES_NO, OPEN = "choice", "yes_no", "open"
"""Kinds of questions; also the kinds of data sets of other names."""
EXACT_MATCHING = "exact_matching"
KNOWN_OPEN = "vqa|gqa|vizwiz|ocrbench|llavabench|mmlongbench|olympiadbench|dynamath|openended"
"""Names of open data sets; those of other names are asked for a direct answer."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """A row of KINDS."""

    pattern: str  # regex of the data set's name, in any case; "": recognised by columns alone
    question: str  # CHOICE, YES_NO or OPEN
    rate: Rater
    columns: tuple[str, ...] = ()  # that rating needs
    judge: str = EXACT_MATCHING  # of the official command
    drops_request: bool = False  # Janus's prompt leaves out " Please answer yes or no."
    thinks_aloud: bool = False  # has a system prompt, and no request behind the question
    # rows -> what keeps them from being rated
    find_problems: Callable[[Sequence[Values]], list[str]] = lambda rows: []


KINDS: dict[str, Kind] = {
    "mmmu": Kind("mmmu", CHOICE, rate_choices.rate_mmmu, ("A", "B", "answer")),
    "mmbench": Kind(
        "mmbench|ccbench|circular|mmcr", CHOICE, rate_choices.rate_circular, ("A", "B", "answer")
    ),
    "pope": Kind("pope", YES_NO, rate_yes_no.rate_pope, ("answer",), drops_request=True),
    "mme": Kind(
        r"(?<![a-z])mme(?![a-z]|[-_]?(realworld|cot|reasoning|sci|unify|industry))", YES_NO,
        rate_yes_no.rate_mme, ("answer", "category", IMAGE_PATH),
        find_problems=rate_yes_no.find_mme_problems,
    ),
    "hallusionbench": Kind(
        "hallusion", YES_NO, rate_yes_no.rate_hallusion, ("answer",),
        find_problems=rate_yes_no.find_hallusion_problems,
    ),
    "wemath": Kind(
        "wemath", CHOICE, rate_judged.rate_wemath, ("answer", "key", "ID"),
    ),
    "mathvista": Kind(
        "mathvista", OPEN, rate_judged.rate_mathvista,
        ("answer", "question_type", "answer_type"), "gpt-4o-mini",
    ),
    "mathvision": Kind(
        "mathvision", OPEN, rate_judged.rate_mathvision, ("answer", "choices"), "gpt-4o-mini"
    ),
    "mathverse": Kind("mathverse", OPEN, rate_judged.rate_nothing, (), "gpt-4o-mini"),
    "logicvista": Kind("logicvista", OPEN, rate_judged.rate_nothing, (), "gpt-4o-mini"),
    "mmvet": Kind(
        "mm-?vet", OPEN, rate_judged.rate_nothing, (), "gpt-4-turbo", thinks_aloud=True
    ),
    CHOICE: Kind(
        "mmstar|seedbench|scienceqa|ai2d|realworldqa|blink|aesbench|q-bench|a-bench|a-okvqa",
        CHOICE, rate_choices.rate_choices, ("A", "B", "answer"),
    ),
    YES_NO: Kind("", YES_NO, rate_yes_no.rate_yes_no, ("answer",)),
    OPEN: Kind(KNOWN_OPEN, OPEN, rate_judged.rate_nothing, (), ""),
}  # fmt: skip
"""By the name that `--kind` gives; the first whose pattern is in the data set's name counts."""


def recognise_kind(table: Table, name: str | None) -> str:
    """Returns the kind of a data set: as given, by its name, or by its columns.

    Raises: InputError for an unknown kind, or one whose columns the table lacks.
    """
    if name is not None and name not in KINDS:
        raise InputError(f"--kind: found {name}; {suggest_name(name, KINDS, 'expected one of')}")
    kind = name or _find_by_name(table.name) or _find_by_columns(table)
    missing = [column for column in KINDS[kind].columns if column not in table.columns]
    # Without any answer a data set can be answered, not rated.
    missing = [column for column in missing if column != "answer"]
    if missing:
        raise InputError(
            f"{table.path}: has no column {', '.join(missing)}, which {kind} has; "
            f"found {', '.join(table.columns[:20])}; give --kind if it is another data set"
        )
    return kind


def can_be_rated(table: Table, kind: str) -> bool:
    """Returns whether the table states an answer, where rating reads it."""
    needs_answer = "answer" in KINDS[kind].columns
    return not needs_answer or any(row.get("answer") is not None for row in table.rows)


def _find_by_name(name: str) -> str | None:
    matches = (
        kind
        for kind, row in KINDS.items()
        if row.pattern and re.search(row.pattern, name, re.IGNORECASE)
    )
    return next(matches, None)


def _find_by_columns(table: Table) -> str:
    if {"A", "B"} <= set(table.columns):
        return CHOICE
    answers = {row.get("answer") for row in table.rows}
    return YES_NO if answers and answers <= {YES, NO} else OPEN
