"""Errors that a user can act on, and the exit code that goes with them."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

BAD_INPUT_EXIT_CODE = 2


class InputError(ValueError):
    """A wrong config, file or argument: every problem of one input, reported together.

    Each problem names the file or key, what was found, what was expected and the remedy.
    """

    def __init__(self, problems: str | Iterable[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


def exit_on_input_error(main: Callable[P, R]) -> Callable[P, R]:
    """Turns an InputError that leaves `main` into lines on stderr and exit code 2."""

    @functools.wraps(main)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return main(*args, **kwargs)
        except InputError as error:
            for problem in error.problems:
                print(f"error: {problem}", file=sys.stderr)
            sys.exit(BAD_INPUT_EXIT_CODE)

    return wrapped
