"""Finds rewards that can score none of the first rows, before a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from corl_jax.rewards import answers
from corl_jax.rewards.registry import REGISTRY, BoundReward


def find_inapplicable_rewards(
    rewards: Sequence[BoundReward], rows: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Returns a line for each built-in reward that can score none of the rows, with the reason.

    A row cannot be scored where a column that the reward needs is null or blank. What a user's
    own reward makes of a row only the reward knows.
    """
    lines = []
    for reward in rewards:
        if not rows or reward.name not in REGISTRY:
            continue
        lines += _open_by_default(reward, rows)
        missing = [_blank_columns(reward, row) for row in rows]
        if not all(missing):
            continue
        names = dict.fromkeys(name for columns in missing for name in columns)
        lines.append(
            f"rewards: {reward.name} can score none of the first {len(rows)} rows, because "
            f"{' or '.join(names)} is null or blank in each; check data.columns and the data, "
            "or remove the reward"
        )
    return lines


def _blank_columns(reward: BoundReward, values: Mapping[str, Any]) -> list[str]:
    """Returns the columns because of which the reward does not apply to a row."""
    row = reward.row
    blank = [name for name in row.columns if is_blank(name, values.get(name))]
    # Some rewards need a type beside the question; null stands for OE there.
    blank = [name for name in blank if name != "qa_type"]
    if row.either and all(is_blank(name, values.get(name)) for name in row.either):
        blank += row.either
    return blank


def _open_by_default(reward: BoundReward, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns a line if all questions count as open-ended because their type is null."""
    return [
        f"rewards: {reward.name}: {column} is null in each of the first {len(rows)} rows, which "
        f"count as open-ended; set options: {{{option}: MC}} if they are multiple choice"
        for column, option in reward.row.stand_ins.items()
        if reward.options.get(option) is None
        and all(is_blank(column, row.get(column)) for row in rows)
    ]


def is_blank(name: str, value: Any) -> bool:
    """True for a value of the column `name` that no reward can use.

    These are null, white space, a solution with an empty answer, and boxes that cannot be read.
    """
    if value is None:
        return True
    if not isinstance(value, str):
        return False
    if name == "od_solution":
        return answers.parse_detections(answers.read_solution(value)) is None
    return not (answers.read_solution(value) if name.endswith("_solution") else value.strip())
