"""The table of evaluation suites; each suite has a file in this package."""

from __future__ import annotations

from corl_jax.data.drawn_world.held_out import HeldOutShapes
from corl_jax.evaluation import own_answers, rewards, shapes
from corl_jax.evaluation.geneval import in_training as geneval
from corl_jax.evaluation.suite import EvaluationInputs, Report, Suite
from corl_jax.evaluation.tsv import in_training as tsv

__all__ = ["SUITES", "EvaluationInputs", "Report", "Suite"]

SUITES: dict[str, Suite] = {
    "shapes": Suite(
        shapes.evaluate_shapes,
        columns=(*shapes.COLUMNS, "real_image"),
        tasks=shapes.TASKS,
        find_row_problems=shapes.find_row_problems,
        make_rows=HeldOutShapes,
    ),
    "own_answers": Suite(
        own_answers.evaluate_own_answers,
        columns=own_answers.COLUMNS,
        tasks=own_answers.TASKS,
        find_row_problems=own_answers.find_row_problems,
    ),
    "rewards": Suite(rewards.evaluate_rewards, uses_rewards=True),
    "tsv": Suite(
        tsv.evaluate_tsv,
        columns=tsv.COLUMNS,
        tasks=tsv.TASKS,
        find_row_problems=tsv.find_row_problems,
        open_rows=tsv.open_rows,
    ),
    "geneval": Suite(
        geneval.evaluate_geneval,
        columns=(geneval.DEMAND,),
        tasks=geneval.TASKS,
        rewards=geneval.REWARDS,
        open_rows=geneval.open_rows,
    ),
}
"""Value of the option `eval.suite` -> the suite; `none` stands for no evaluation."""
