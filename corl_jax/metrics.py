"""A metric: a number that carries how several of it become one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax

Over = Literal["last", "first", "mean", "sum", "max"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Metric:
    """A number, and how the numbers of several updates or processes become one.

    `last`, `first`: of the updates of one iteration, this one's number counts. All processes
    have the same number.
    `mean`, `sum`, `max`: each process has measured its own number; they are reduced so.
    """

    value: Any  # float, or a scalar of the device
    over: Over = dataclasses.field(default="last", metadata={"static": True})

    def __float__(self) -> float:
        return float(self.value)


def to_metrics(values: Mapping[str, Any], over: Over = "last") -> dict[str, Metric]:
    """Returns the named numbers as metrics that are all reduced in the same way."""
    return {name: Metric(value, over) for name, value in values.items()}
