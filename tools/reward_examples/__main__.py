"""Scores the examples of docs/reference/rewards.md and writes their section and figure.

    python -m tools.reward_examples            # about half a minute on a CPU
    python -m tools.reward_examples --check    # writes nothing; 1 if a score or a word differs

The cases lie in docs/examples/rewards; what is missing there is made first, by the shipped mini
Janus. A number may differ by 0.005, so that another device or version of jax passes.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np

from corl_jax.atomic_files import replace_file
from corl_jax.errors import exit_on_input_error
from tools.reward_examples import cases, figure, page
from tools.reward_examples.scoring import Scores, score_all


@exit_on_input_error
def main(argv: list[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.reward_examples",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="compare instead of write")
    args = parser.parse_args(argv)
    page.find_section(page.PAGE.read_text(encoding="utf-8"))  # before anything is computed
    if args.check:
        problems = compare(score_all())
        print("\n".join(problems) or "the section and the figure are as scored")
        sys.exit(1 if problems else 0)
    cases.write_missing()
    write(score_all())


def write(scores: Scores) -> None:
    """Rewrites the section and the figure."""
    figure.save(page.FIGURE, scores)
    # Read as late as possible: scoring takes long, and someone may edit the page meanwhile.
    text = page.replace_section(page.PAGE.read_text(encoding="utf-8"), page.write_section(scores))
    with replace_file(page.PAGE) as file:
        file.write(text.encode())


def compare(scores: Scores) -> list[str]:
    """Returns the differences of the page and the figure from the scores."""
    old = page.find_section(page.PAGE.read_text(encoding="utf-8"))
    problems = page.list_differences(old, page.write_section(scores))
    shown = figure.read_scores(page.FIGURE)
    if shown.shape != scores.t2i.shape or np.abs(shown - scores.t2i).max() > page.TOLERANCE:
        problems.append(f"{page.FIGURE}: shows other scores; run `python -m tools.reward_examples`")
    return problems


if __name__ == "__main__":
    main()
