"""Finds the nearest known name, divisor or multiple, for suggestions in error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def suggest_name(name: str, known: Iterable[str], label: str = "known", cutoff: float = 0.0) -> str:
    """Returns "did you mean near? (known: near, other)" for a name that is not among the known.

    `label` is the word before the list. Without a name at least as similar as `cutoff`, from 0
    to 1, the text is "known: near, other".
    """
    names = list(known)
    known_names = f"{label}: {', '.join(names)}"
    near = difflib.get_close_matches(name, names, n=1, cutoff=cutoff)
    return f"did you mean {near[0]}? ({known_names})" if near else known_names


def nearest_divisors(number: int, value: int) -> str:
    """Returns the divisors of `number` just below and just above `value`, as "4 or 8"."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    below, above = [d for d in divisors if d < value], [d for d in divisors if d > value]
    return " or ".join(map(str, below[-1:] + above[:1]))


def nearest_multiples(number: int, value: int) -> str:
    """Returns the multiples of `number` just below and above `value`, as "8 or 16"; never 0."""
    # number 8, value 13 -> "8 or 16"; value 5 -> "8"
    below = value // number * number
    return f"{below} or {below + number}" if below else str(number)
