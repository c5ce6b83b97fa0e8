"""Measures rewards that run on the host, one after the other, without a network.

    python -m tools.bench.host
    python -m tools.bench.host --repeats 20

`text` scores 512 completions, half of them of multiple-choice questions: format and accuracy.
`shapes` finds objects in a batch of 512 images of the drawn world. Each time is the shortest of
--repeats rounds, in processor seconds, so that other work on the machine counts little.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np

from corl_jax.data.drawn_world import checker, generator
from corl_jax.errors import InputError, exit_on_input_error
from corl_jax.rewards import text

COMPLETIONS = 512
IMAGES = 512
PROBLEM = "What is shown?\nOptions:\nA. a lake\nB. burning\nC. a person\nD. two cars"
THOUGHT = "The picture shows a person near a stove, so we look at the flames. " * 8
ANSWERS = ("B. burning", "The answer is B", "burning", "a person", "red cars on a road")


def score_texts() -> None:
    """Scores COMPLETIONS texts by format and accuracy."""
    for i in range(COMPLETIONS):
        answer = ANSWERS[i % len(ANSWERS)] + " " * (i % 7)
        completion = f"<think>{THOUGHT}</think><answer>{answer}</answer>"
        text.format_reward(completion)
        text.qa_accuracy(
            completion, "<answer>B</answer>", ("MC", "OE")[i % 2], problem=PROBLEM
        )  # fmt: skip


def measure_shortest(function: Callable[[], object], repeats: int) -> float:
    """Returns the processor seconds of the fastest of `repeats` calls."""
    seconds = []
    for _ in range(repeats):
        # Processor time: waiting for another process does not count.
        start = time.process_time()
        function()
        seconds.append(time.process_time() - start)
    return min(seconds)


@exit_on_input_error
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.host",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args(argv).repeats
    if repeats < 1:
        raise InputError([f"--repeats: found {repeats}, expected an integer of at least 1"])
    rows = (generator.make_row(11, i, encode=False) for i in range(IMAGES))
    images = np.stack([row["real_image"] for row in rows])
    seconds = measure_shortest(score_texts, repeats)
    print(f"text    {COMPLETIONS} completions  {1e3 * seconds:8.1f} ms")
    seconds = measure_shortest(lambda: checker.detect_all(images), repeats)
    print(f"shapes  {IMAGES} images       {1e3 * seconds:8.1f} ms")


if __name__ == "__main__":
    main()
