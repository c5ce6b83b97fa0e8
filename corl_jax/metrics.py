"""A metric: a number, and the rule that reduces several of these numbers to one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax

Over = Literal["last", "first", "mean", "sum", "max"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Metric:
    """A number, and the rule that reduces the numbers of several updates or processes to one.

    `last`, `first`: the number of the last or first update of an iteration counts.
    `mean`, `sum`, `max`: the numbers of all processes are reduced by this function.
    """

    value: Any  # float, or a scalar of the device, which is not read before it is logged
    # `last` and `first` reduce over updates only: all processes must have the same number.
    # Static: the rule is part of the tree's structure, so that jit can return metrics.
    over: Over = dataclasses.field(default="last", metadata={"static": True})

    def __float__(self) -> float:
        return float(self.value)


def to_metrics(values: Mapping[str, Any], over: Over = "last") -> dict[str, Metric]:
    """Returns the named numbers as metrics that are all reduced in the same way."""
    return {name: Metric(value, over) for name, value in values.items()}
