"""The table of evaluation suites; each suite has a file in this package."""

from __future__ import annotations

from corl_jax.data.drawn_world.held_out import HeldOutShapes
from corl_jax.evaluation import rewards, shapes
from corl_jax.evaluation.suite import EvaluationInputs, Report, Suite
from corl_jax.evaluation.tsv import in_training

__all__ = ["SUITES", "EvaluationInputs", "Report", "Suite"]

SUITES: dict[str, Suite] = {
    "shapes": Suite(
        shapes.evaluate_shapes,
        columns=(*shapes.COLUMNS, "real_image"),
        tasks=shapes.TASKS,
        find_row_problems=shapes.find_row_problems,
        make_rows=HeldOutShapes,
    ),
    "rewards": Suite(rewards.evaluate_rewards, uses_rewards=True),
    "tsv": Suite(
        in_training.evaluate_tsv,
        columns=in_training.COLUMNS,
        tasks=in_training.TASKS,
        find_row_problems=in_training.find_row_problems,
        open_rows=in_training.open_rows,
    ),
}
"""Value of the option `eval.suite` -> the suite; `none` stands for no evaluation."""
