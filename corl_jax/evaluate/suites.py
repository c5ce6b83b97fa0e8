"""The table of the suites of `corl-jax evaluate`; each is a module of this package."""

from __future__ import annotations

import dataclasses

DEFAULT_SUITE = "shapes"


@dataclasses.dataclass(frozen=True)
class CommandSuite:
    """A row of COMMAND_SUITES.

    The module has `add_arguments(parser)`, which adds its options, and `run(args)`, which checks
    them before any device is used, and runs the suite. Its docstring is its help.
    """

    module: str  # imported only if the suite is asked for
    help: str


COMMAND_SUITES: dict[str, CommandSuite] = {
    "shapes": CommandSuite(
        "corl_jax.evaluate.shapes", "images and answers in the drawn world, checked exactly"
    ),
    "tsv": CommandSuite(
        "corl_jax.evaluate.tsv", "answers to a data set in VLMEvalKit's format, rated by its rules"
    ),
    "geneval": CommandSuite("corl_jax.evaluate.harness", "images for GenEval"),
    "geneval2": CommandSuite("corl_jax.evaluate.harness", "images for GenEval 2"),
    "dpg": CommandSuite("corl_jax.evaluate.harness", "images for DPG-Bench"),
    "wise": CommandSuite("corl_jax.evaluate.harness", "images for WISE, verified or legacy"),
    "t2i_compbench": CommandSuite("corl_jax.evaluate.harness", "images for T2I-CompBench"),
    "preference": CommandSuite(
        "corl_jax.evaluate.preference", "images of any prompts, scored by preference networks"
    ),
    "own_answers": CommandSuite(
        "corl_jax.evaluate.own_answers", "what a model answers about its own images; imbalance"
    ),
    "geneval-detect": CommandSuite(
        "corl_jax.evaluate.geneval_detect", "GenEval in process: detector, colours and rules"
    ),
    "geneval-score": CommandSuite(
        "corl_jax.evaluate.geneval_score", "GenEval's rules on detections, or its results"
    ),
    "geneval2-score": CommandSuite(
        "corl_jax.evaluate.geneval2_score", "Soft-TIFA, TIFA or VQAScore of GenEval 2"
    ),
    "dpg-score": CommandSuite("corl_jax.evaluate.dpg_score", "DPG-Bench from a judge's answers"),
    "wise-score": CommandSuite("corl_jax.evaluate.wise_score", "WISE from a judge's texts"),
    "compbench-score": CommandSuite(
        "corl_jax.evaluate.compbench_score", "T2I-CompBench from its scorers' files"
    ),
}
