"""The table of harnesses that images are drawn for; each is a module of this package."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from corl_jax.errors import InputError, Problems
from corl_jax.evaluation.writers import (
    dpg,
    geneval,
    geneval2,
    plain,
    self_questions,
    t2i_compbench,
    wise,
)
from corl_jax.evaluation.writers.writer import PromptList, Writer

WRITERS: dict[str, Writer] = {
    "geneval": geneval.WRITER,
    "geneval2": geneval2.WRITER,
    "dpg": dpg.WRITER,
    "wise": wise.WRITER,
    "t2i_compbench": t2i_compbench.WRITER,
    "preference": plain.WRITER,
    "own_answers": self_questions.WRITER,
}
"""Suite -> what its harness reads."""


def read_prompt_list(suite: str, paths: Sequence[Path]) -> PromptList:
    """Reads the prompts of a suite.

    Raises: InputError listing all problems, or the suite whose prompts these seem to be.
    """
    missing = [path for path in paths if not path.exists()]
    if missing:
        expected = WRITERS[suite].expected
        raise InputError(f"{path}: is not there; expected {expected}" for path in missing)
    problems = Problems()
    prompts = problems.attempt(WRITERS[suite].read, paths, problems)
    if problems:
        other = guess_suite(paths, without=suite)
        if other is None:
            raise InputError(problems)
        raise InputError(
            f"{', '.join(map(str, paths))}: looks like the prompts of {WRITERS[other].title}; "
            f"give --suite {other}, or {WRITERS[suite].expected}"
        )
    assert prompts is not None
    if not prompts.prompts:
        raise InputError(f"{paths[0]}: found no prompts; expected {WRITERS[suite].expected}")
    return prompts


def guess_suite(paths: Sequence[Path], without: str) -> str | None:
    """Returns the other suite that can read the prompts without a problem; None if none can."""
    for name, writer in WRITERS.items():
        # Two suites with the same files read the same prompts; the stricter one says what is wrong.
        is_same = writer.list_files is WRITERS[without].list_files
        if is_same or not writer.is_specific:
            continue
        problems = Problems()
        prompts = problems.attempt(writer.read, paths, problems)
        if prompts is not None and prompts.prompts and not problems:
            return name
    return None
