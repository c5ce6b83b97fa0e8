"""Makes held-out rows of the drawn world in memory."""

from __future__ import annotations

from typing import Any

from corl_jax.data.drawn_world import generator

HELD_OUT_SEEDS = 2**40
"""Number added to the seed of `HeldOutShapes`: a training set of the same seed has other rows."""


class HeldOutShapes:
    """A data source of rows that are in no training set, whatever the seeds.

    The rows are of the split `test`. Its specs are absent from `train`, except where a category
    has too few specs. Images and questions have other seeds.
    """

    def __init__(self, rows: int, seed: int, world: str = "full"):
        self.names = {name: name for name in generator.FEATURES}
        self._rows = [
            generator.make_row(HELD_OUT_SEEDS + seed, i, split="test", world=world)
            for i in range(rows)
        ]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return dict(self._rows[row])  # a copy: the loader puts decoded images into it

    def column(self, name: str) -> list:
        return [row[name] for row in self._rows]

    def where(self, row: int) -> str:
        return f"drawn row {row}"

    def fingerprint(self) -> None:
        """Returns None: no run resumes in the middle of these rows."""
