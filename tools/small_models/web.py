"""Makes rows of the drawn world with the faults of web data: wrong captions, terse answers.

    python -m tools.small_models.web --out DIR [--rows 6000] [--seed 1] [--world small]
        [--mismatched 0.5] [--terse 0.7]

A model that was trained on them can do more than it shows: it follows the prompt about as often as
captions matched, and mostly answers without thinking. Reinforcement learning then has habits to
change, not skills to teach, which takes minutes.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from corl_jax.atomic_files import create_folder
from corl_jax.data.drawn_world import generator
from corl_jax.data.drawn_world.scene import WORLDS
from corl_jax.errors import exit_on_input_error
from corl_jax.input_files import parse_path

THOUGHTS = re.compile(r"<think>.*?</think>")


def make_rows(
    rows: int, seed: int, world: str, mismatched: float, terse: float
) -> Iterator[dict[str, Any]]:
    """Yields rows of `generator.make_row`, split `train`, with two kinds of fault.

    A fraction `mismatched` has the prompt of another row, a fraction `terse` has supervised answers
    without thoughts, `<think></think><answer>..</answer>`.
    """
    # Not the generators of the rows: with other fractions of faults the images stay the same.
    rng = np.random.default_rng([seed, rows])
    for index in range(rows):
        row = generator.make_row(seed, index, split="train", world=world)
        if rng.random() < mismatched:
            other = int(rng.integers(rows))
            source = generator.make_row(seed, other, split="train", world=world, encode=False)
            row["prompt"] = source["prompt"]
        if rng.random() < terse:
            row["sft_answer"] = THOUGHTS.sub("<think></think>", row["sft_answer"])
        yield row


def write(out: Path, rows: int, seed: int, world: str, mismatched: float, terse: float) -> Path:
    """Writes the rows as one parquet file in a new directory, completely or not at all.

    Raises: InputError if the directory holds files.
    """
    name = "train-00000-of-00001.parquet"
    table = pa.Table.from_pylist(
        list(make_rows(rows, seed, world, mismatched, terse)), schema=generator.make_schema()
    )
    with create_folder(out) as folder:
        pq.write_table(table, folder / name, row_group_size=generator.ROW_GROUP)
    return out / name


@exit_on_input_error
def main(argv: list[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.small_models.web",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=parse_path, required=True, help="new or empty directory")
    add("--rows", type=int, default=6000)
    add("--seed", type=int, default=1)
    add("--world", choices=tuple(WORLDS), default="small")
    add("--mismatched", type=float, default=0.5, help="fraction of prompts of other images")
    add("--terse", type=float, default=0.7, help="fraction of answers without thoughts")
    args = parser.parse_args(argv)
    print(write(args.out, args.rows, args.seed, args.world, args.mismatched, args.terse))


if __name__ == "__main__":
    main()
