"""Reads fields of a foreign config.json, and collects everything that is wrong with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from corl_jax.errors import Problems

MAX_SIZE = 10_000_000  # far above every real size; bounds loops over a size from a hostile file


def check_divisible(where: str, *pairs: tuple[str, int, str, int]) -> list[str]:
    """Lists each (size, its value, unit, its value) where the unit does not divide the size."""
    return [
        f"{where}.{name} is {value}, expected a multiple of {unit_name}, {unit}"
        for name, value, unit_name, unit in pairs
        if value % unit
    ]


def check_token_ids(where: str, vocab_name: str, vocab_size: int, **tokens: int) -> list[str]:
    """Lists the token ids that are not in the vocabulary."""
    return [
        f"{where}.{name} is {token}, expected less than {vocab_name}, {vocab_size}"
        for name, token in tokens.items()
        if token >= vocab_size
    ]


def check_count(where: str, name: str, values: Sequence[Any], count: int) -> list[str]:
    """Returns a problem if a list has not `count` values."""
    if len(values) == count:
        return []
    return [f"{where}.{name} has {len(values)} numbers ({list(values)}), expected {count}"]


class Fields:
    """Reads one object of a config file; all objects of the file add to the same problems."""

    def __init__(self, where: str, data: Mapping[str, Any], problems: Problems):
        self.where, self.data, self.problems = where, data, problems

    def section(self, name: str) -> Fields:
        """Returns a nested object. An absent one is empty: every field takes its default."""
        value = self.data.get(name)
        if value is not None and not isinstance(value, dict):
            self._report(name, value, "an object")
        inner = value if isinstance(value, dict) else {}
        return Fields(f"{self.where}: {name}", inner, self.problems)

    def has(self, name: str) -> bool:
        """Returns whether a field is present and not null."""
        return self.data.get(name) is not None

    def token(self, name: str, default: int) -> int:
        """Returns a token id, 0 or more; the default for null or an absent field."""
        value = self.data.get(name)
        if value is None:
            return default
        # `type`, not isinstance: True is an int for Python.
        if type(value) is not int or not 0 <= value <= MAX_SIZE:
            self._report(name, value, f"a whole number from 0 to {MAX_SIZE}")
            return 0
        return value

    def size(self, name: str, default: int | None, limit: int = MAX_SIZE) -> int:
        """Returns a positive int; the default, unless that is None, for null or an absent field."""
        value = self.data.get(name)
        if isinstance(value, list) and value and all(v == value[0] for v in value):
            value = value[0]  # transformers allows [384, 384] for a square
        if value is None and default is not None:
            return default
        if type(value) is not int or not 0 < value <= limit:
            self._report(name, value, f"a whole number from 1 to {limit}")
            return default or 1
        return value

    def number(self, name: str, default: float) -> float:
        """Returns a positive number; the default for null or an absent field."""
        value = self.data.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e12:
            self._report(name, value, "a positive number")
            return default
        return float(value)

    def sizes(self, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """Returns a list of small positive ints."""
        value = self.data.get(name)
        if value is None:
            return default
        if (
            not isinstance(value, list)
            or not 0 < len(value) <= 16
            or not all(type(v) is int and 0 < v <= 1024 for v in value)
        ):
            self._report(name, value, "a list of whole numbers")
            return default
        return tuple(value)

    def expect(self, name: str, allowed: tuple[Any, ...], why: str) -> None:
        """Checks a setting of which this implementation supports only some values.

        The first of `allowed` is the meaning of an absent field.
        """
        # Types too, because 1 == True == 1.0.
        value = self.data.get(name, allowed[0])
        if not any(value == choice and type(value) is type(choice) for choice in allowed):
            choices = " or ".join(repr(choice) for choice in allowed)
            self._report(name, value, f"{choices}: {why}")

    def equal(self, name: str, expected: int) -> None:
        """Checks a size that repeats another field."""
        if self.has(name) and self.data[name] != expected:
            self._report(name, self.data[name], f"{expected}, as the other sizes of this file say")

    def _report(self, name: str, value: Any, expected: str) -> None:
        self.problems.add(f"{self.where}: {name} is {value!r}, expected {expected}")
