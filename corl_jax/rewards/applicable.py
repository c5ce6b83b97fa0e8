"""Finds rewards that can score none of the first rows, before a run starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from corl_jax.rewards import answers
from corl_jax.rewards.registry import REGISTRY, BoundReward


def find_inapplicable_rewards(
    rewards: Sequence[BoundReward], rows: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Returns a line for each built-in reward that can score none of the rows, with the reason.

    A row cannot be scored if a column that the reward needs is null or blank.
    """
    lines = []
    for reward in rewards:
        # A user's reward may accept null columns; only its code knows.
        if not rows or reward.name not in REGISTRY:
            continue
        lines += _find_untyped_questions(reward, rows)
        missing = [_find_blank_columns(reward, row) for row in rows]  # per row: names of columns
        if not all(missing):  # at least one row has all columns
            continue
        names = dict.fromkeys(name for columns in missing for name in columns)
        lines.append(
            f"rewards: {reward.name} can score none of the first {len(rows)} rows, because "
            f"{' or '.join(names)} is null or blank in each; check data.columns and the data, "
            "or remove the reward"
        )
    return lines


def _find_blank_columns(reward: BoundReward, values: Mapping[str, Any]) -> list[str]:
    """Returns the null or blank columns for which the reward does not apply to a row."""
    row = reward.row
    blank = [name for name in row.columns if is_blank(name, values.get(name))]
    # A column that must exist, but whose null has a meaning: null `qa_type` counts as OE.
    blank = [name for name in blank if name != "qa_type"]
    if row.either and all(is_blank(name, values.get(name)) for name in row.either):
        blank += row.either
    return blank


def _find_untyped_questions(reward: BoundReward, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns a line if all questions count as open-ended because their type is null."""
    return [
        f"rewards: {reward.name}: {column} is null in each of the first {len(rows)} rows, which "
        f"count as open-ended; set options: {{{option}: MC}} if they are multiple choice"
        for column, option in reward.row.stand_ins.items()
        if reward.options.get(option) is None
        and all(is_blank(column, row.get(column)) for row in rows)
    ]


def is_blank(name: str, value: Any) -> bool:
    """Returns whether no reward can use a value of the column `name`.

    Such values are null, white space, a solution with an empty answer, and unreadable boxes.
    """
    if value is None:
        return True
    if not isinstance(value, str):  # images, and boxes given as lists
        return False
    if name == "od_solution":
        return answers.parse_detections(answers.read_solution(value)) is None
    return not (answers.read_solution(value) if name.endswith("_solution") else value.strip())
