"""Errors that a user can act on, and the exit codes of every command.

0   done.
1   anything else: an exception, a checkpoint that cannot be written, a reward that keeps failing,
    a hang that the watchdog ended. Look at the message; the same command resumes.
2   bad input: a config, file or argument; correct it. Commands find it before they start work,
    except in rows of the data: too many unusable rows end a training later.
3   a guard stopped the training: too many updates in a row with a loss or gradient that is not
    finite, no reward that applies to anything, or an alarm of `guards.fatal`. Resuming without a
    change leads there again.
75  preempted: saved at the step boundary after SIGTERM. The same command resumes.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import ParamSpec, TypeVar

from corl_jax.console import escape_unprintable_text

P = ParamSpec("P")
R = TypeVar("R")

FAILED_EXIT_CODE = 1
BAD_INPUT_EXIT_CODE = 2
GUARD_EXIT_CODE = 3
PREEMPTED_EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again

MAX_PRINTED_PROBLEMS = 20


class InputError(ValueError):
    """A wrong config, file or argument, with every problem of the input.

    Each problem names the file or key, what was found, what was expected and the remedy.
    """

    exit_code = BAD_INPUT_EXIT_CODE

    def __init__(self, problems: str | Iterable[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class Problems:
    """Collects the problems of an input, to report all of them together.

        problems = Problems()
        rows = problems.attempt(open_rows, path)  # None, and noted, if it raises an InputError
        if rows is not None and not len(rows):
            problems.add(f"{path}: found no rows; expected at least one")
        problems.raise_any()

    Equal problems are kept once.
    """

    def __init__(self) -> None:
        # A dict keeps the order, and each problem once: several readers may find the same one.
        self._lines: dict[str, None] = {}

    def add(self, problems: str | Iterable[str], prefix: str = "") -> None:
        """Adds one problem, or several, each with `prefix` in front."""
        lines = [problems] if isinstance(problems, str) else problems
        self._lines.update(dict.fromkeys(prefix + line for line in lines))

    def attempt(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R | None:
        """Returns the function's result; for an InputError adds its problems and returns None."""
        with self.collect():
            return function(*args, **kwargs)
        return None

    @contextlib.contextmanager
    def collect(self, prefix: str = "") -> Iterator[None]:
        """Adds the problems of an InputError that the block raises, and ends the error there."""
        try:
            yield
        except InputError as error:
            self.add(error.problems, prefix)

    def raise_any(self) -> None:
        """Raises an InputError of all problems, if there are any."""
        if self._lines:
            raise InputError(self._lines)

    def __len__(self) -> int:
        return len(self._lines)

    def __iter__(self) -> Iterator[str]:
        return iter(self._lines)


class GuardError(RuntimeError):
    """The error of a guard that stops a training; one line says what, where and why."""

    exit_code = GUARD_EXIT_CODE

    @property
    def problems(self) -> list[str]:
        """The lines that a command prints."""
        return str(self).splitlines()


class SaveError(RuntimeError):
    """A checkpoint could not be written."""

    exit_code = FAILED_EXIT_CODE

    @property
    def problems(self) -> list[str]:
        """The lines that a command prints."""
        return str(self).splitlines()


class RewardError(RuntimeError):
    """A user's reward has failed too often for the run to go on; shows the user's traceback."""

    exit_code = FAILED_EXIT_CODE

    @property
    def problems(self) -> list[str]:
        """The lines that a command prints."""
        return [str(self).rstrip()]


class ConnectionFailure(ConnectionError):
    """A connection could not be made: of the processes of a run, or to a server."""

    exit_code = FAILED_EXIT_CODE

    @property
    def problems(self) -> list[str]:
        """The lines that a command prints."""
        return str(self).splitlines()


class Preempted(BaseException):
    """The end of a run that was asked to stop and has saved its state; says how to resume."""

    # BaseException, because signal handlers raise it too: no `except Exception` on the way may
    # catch it.
    exit_code = PREEMPTED_EXIT_CODE


def shorten(
    problems: list[str], limit: int = MAX_PRINTED_PROBLEMS, what: str = "problems"
) -> list[str]:
    """Returns the first `limit` problems and, for a longer list, a line that counts the rest.

    `what` is the noun in that line.
    """
    if len(problems) <= limit:
        return problems
    return [*problems[:limit], f"... and {len(problems) - limit:,} more {what}"]


def take_first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def exit_on_input_error(main: Callable[P, R]) -> Callable[P, R]:
    """Wraps a command's `main`: prints errors of this module and exits with their code."""

    @functools.wraps(main)
    def run_main(*args: P.args, **kwargs: P.kwargs) -> R:
        # Here, because every command's main has this decorator.
        escape_unprintable_text()
        try:
            return main(*args, **kwargs)
        except Preempted as stopped:
            print(stopped, file=sys.stderr)
            sys.exit(stopped.exit_code)
        except (InputError, GuardError, RewardError, SaveError, ConnectionFailure) as error:
            for problem in shorten(error.problems):
                print(f"error: {problem}", file=sys.stderr)
            sys.exit(error.exit_code)

    return run_main
