"""The table of evaluation suites; each suite has a file in this package."""

from __future__ import annotations

from corl_jax.data.drawn_world.held_out import HeldOutShapes
from corl_jax.evaluation import rewards, self_qa, shapes
from corl_jax.evaluation.suite import EvaluationInputs, Report, Suite

__all__ = ["SUITES", "EvaluationInputs", "Report", "Suite"]

SUITES: dict[str, Suite] = {
    "shapes": Suite(
        shapes.evaluate_shapes,
        columns=(*shapes.COLUMNS, "real_image"),
        tasks=shapes.TASKS,
        find_row_problems=shapes.find_row_problems,
        make_rows=HeldOutShapes,
    ),
    "self_qa": Suite(
        self_qa.evaluate_self_qa,
        columns=self_qa.COLUMNS,
        tasks=self_qa.TASKS,
        find_row_problems=self_qa.find_row_problems,
    ),
    "rewards": Suite(rewards.evaluate_rewards, uses_rewards=True),
}
"""Value of the option `eval.suite` -> the suite; `none` stands for no evaluation."""
