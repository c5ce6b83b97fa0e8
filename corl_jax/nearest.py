"""Finds the nearest known name, divisor or multiple, for suggestions in error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

SIMILAR = 0.6  # of 1; below it the nearest name is mostly one that has nothing to do with it


def find_near_name(name: str, known: Iterable[str], cutoff: float = SIMILAR) -> str | None:
    """Returns the known name most similar to `name`, or one with these initials; None without.

    `cutoff` is the smallest similarity, from 0 to 1.
    """
    names = list(known)
    # lr -> learning_rate
    near = difflib.get_close_matches(name, names, n=1, cutoff=cutoff) or [
        other
        for other in names
        if len(name) > 1 and name == "".join(word[:1] for word in other.split("_"))
    ]
    return near[0] if near else None


def suggest_name(name: str, known: Iterable[str], label: str = "known") -> str:
    """Returns "did you mean near? (known: near, other)" for a name that is not among the known.

    `label` is the word before the list. Without a near name the text is "known: near, other".
    """
    names = list(known)
    known_names, near = f"{label}: {', '.join(names)}", find_near_name(name, names)
    return f"did you mean {near}? ({known_names})" if near else known_names


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
