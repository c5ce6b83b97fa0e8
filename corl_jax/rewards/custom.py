"""Rewards that users write: a plain function in a file, loaded once and called with care.

    def brightness(images, *, scale: float = 1.0):
        return [scale * ImageStat.Stat(image.convert("L")).mean[0] / 255 for image in images]

The names of the parameters say what it gets: `images` (PIL pictures; a reward of drawings) or
`texts` (strings; a reward of answers), and columns of the data, each a list with one value per
sample. `**columns` takes all other columns. Keyword-only parameters are options of the config.
The function may be `async def`. It returns one number per sample, None where it does not apply.
"""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import logging
import os
import sys
import threading
import traceback
import types
import typing
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image

from corl_jax.config_checks import REWARD_GRACE_S
from corl_jax.errors import InputError
from corl_jax.rewards.options import REQUIRED, Option, option_problem
from corl_jax.rewards.samples import Context, Samples
from corl_jax.rewards.user_code import find_function

logger = logging.getLogger(__name__)

TASK_OF = {"images": "t2i", "texts": "mm2t"}
"""Parameter that a reward must have one of -> the task that it belongs to."""

MACHINERY = (__file__, threading.__file__, os.path.dirname(asyncio.__file__))


class RewardError(RuntimeError):
    """A user's reward has failed too often for the run to go on."""


# ---- calling


@dataclasses.dataclass(frozen=True)
class Parameters:
    """What a user's function asks for."""

    task: str
    columns: tuple[str, ...]
    optional: tuple[str, ...]  # columns with a default
    every_column: bool  # it has `**columns`
    options: Mapping[str, Option]


@dataclasses.dataclass(eq=False)
class CustomReward:
    """A user's function as a reward; it looks at its own process's rows and at nothing else.

    A call fails by an exception (SystemExit too), by `timeout_s` seconds without a result, or by
    a result that is not one number or None per sample. Its samples then get NaN and a warning is
    logged; `max_failures` failed calls in a row end the run.

    Every call has a daemon thread of its own, in which an async function gets its own event
    loop. An async function that runs out of time is cancelled. Python cannot end a thread, so a
    plain function that hangs stays in its own until it returns or the process ends; at most
    `max_failures` such threads may pile up.
    """

    use: str
    function: Callable[..., Any]
    parameters: Parameters
    options: Mapping[str, Any]
    timeout_s: float
    max_failures: int
    failures: int = dataclasses.field(default=0, init=False)  # calls that failed so far
    failed_samples: int = dataclasses.field(default=0, init=False)  # of the last call
    _in_a_row: int = dataclasses.field(default=0, init=False, repr=False)
    _hung: list[_Call] = dataclasses.field(default_factory=list, init=False, repr=False)

    @property
    def name(self) -> str:
        return self.use.rpartition(":")[2]

    @property
    def task(self) -> str:
        return self.parameters.task

    @property
    def columns(self) -> tuple[str, ...]:
        return self.parameters.columns

    @property
    def optional(self) -> tuple[str, ...]:
        return self.parameters.optional

    def __call__(self, samples: Samples, context: Context) -> np.ndarray:
        """Rewards [N] float32; NaN where the function gives None or NaN, or where it failed.

        Raises:
            RewardError: the call was the last that may fail.
            KeyboardInterrupt: during the call, which is left to itself.
        """
        if not len(samples):
            return np.zeros(0, np.float32)
        call = _Call(self.function, self._arguments(samples), len(samples), self.timeout_s)
        failure = call.wait()
        if failure is None:
            self._in_a_row = self.failed_samples = 0
            return call.scores
        self.failed_samples = len(samples)
        self._count(call, failure)
        return np.full(len(samples), np.nan, np.float32)

    def _arguments(self, samples: Samples) -> dict[str, Any]:
        asked = self.parameters
        if asked.task == "t2i":
            values: dict[str, Any] = {"images": [Image.fromarray(x) for x in samples.pictures()]}
        else:
            values = {"texts": list(samples.written())}
        taken = {*asked.columns, *asked.optional}
        if asked.every_column:
            taken |= samples.columns.keys() - values.keys() - asked.options.keys()
        # Copies: neither a careless function nor one that still hangs changes the samples.
        columns = {name: list(x) for name, x in samples.columns.items() if name in taken}
        return values | columns | dict(self.options)

    def _count(self, call: _Call, failure: _Failure) -> None:
        self.failures += 1
        self._in_a_row += 1
        logger.warning(
            "reward %s: its call failed (%d in a row; %d end the run), %d samples go without: %s",
            self.name, self._in_a_row, self.max_failures, self.failed_samples, failure.line,
        )  # fmt: skip
        self._hung = [one for one in (*self._hung, call) if one.running]
        if self._in_a_row >= self.max_failures:
            what = f"failed calls in a row: {self._in_a_row}"
        elif len(self._hung) >= self.max_failures:
            what = f"calls that never came back: {len(self._hung)}"
        else:
            return
        raise RewardError(
            f"reward {self.name} ({self.use}): {what} (max_failures: {self.max_failures}); "
            f"{self.failures} have failed in all, the last one with\n{failure.trace}"
        )


@dataclasses.dataclass(frozen=True)
class _Failure:
    line: str  # the last one of the traceback
    trace: str


class _Call:
    """One call of a user's function, under way in a daemon thread."""

    scores: np.ndarray

    def __init__(self, function: Callable, arguments: dict, count: int, timeout_s: float):
        self._function, self._arguments = function, arguments
        self._samples, self._timeout_s = count, timeout_s
        self._awaiting = False
        self._error: BaseException | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        return not self._ended.is_set()

    def wait(self) -> _Failure | None:
        """Waits for the end or the time limit; None once there are scores."""
        limit = min(self._timeout_s, threading.TIMEOUT_MAX)
        if self._ended.wait(limit) or (self._awaiting and self._ended.wait(REWARD_GRACE_S)):
            error, stack = self._error, None
        else:
            error, stack = self._late(), sys._current_frames().get(self._thread.ident or 0)
        if error is None:
            return None
        if isinstance(error, KeyboardInterrupt):
            raise error
        trace = traceback.TracebackException.from_exception(error)
        if stack is not None:
            trace.stack = traceback.extract_stack(stack)
        lines = list(_trim(trace).format())
        return _Failure("".join(lines).rstrip().splitlines()[-1], "".join(lines))

    def _run(self) -> None:
        try:
            found = self._function(**self._arguments)
            if inspect.isawaitable(found):
                self._awaiting = True
                found = asyncio.run(self._within(found))
            self.scores = as_scores(found, self._samples)
        except BaseException as error:  # in a thread, so SystemExit would be lost
            self._error = error
        finally:
            self._ended.set()

    async def _within(self, found: Awaitable) -> Any:
        limit = asyncio.timeout(self._timeout_s)
        try:
            async with limit:
                return await found
        except TimeoutError as error:
            if limit.expired():
                raise self._late() from error.__cause__
            raise  # the function's own

    def _late(self) -> TimeoutError:
        return TimeoutError(f"no result after {self._timeout_s:g} s")


def as_scores(values: Any, count: int) -> np.ndarray:
    """What a user's function returned, as [count] float32; None becomes NaN.

    Raises:
        TypeError: no sequence, or a value that is not a number.
        ValueError: not `count` values.
    """
    expected = f"expected a list or array of {count} numbers or None, one per sample"
    if hasattr(values, "__array__"):
        values = np.asarray(values)
        if values.ndim != 1:
            raise ValueError(f"returned an array of shape {values.shape}; {expected}")
        values = values.tolist()
    if not isinstance(values, list | tuple):
        raise TypeError(f"returned {type(values).__name__}; {expected}")
    if len(values) != count:
        raise ValueError(f"returned {len(values)} values; {expected}")
    scores = np.empty(count, np.float64)
    for row, value in enumerate(values):
        try:
            if isinstance(value, str | bytes) or np.ndim(value):
                raise TypeError
            scores[row] = np.nan if value is None else float(value)
        except TypeError:
            raise TypeError(f"returned {value!r} for sample {row}; {expected}") from None
    with np.errstate(over="ignore"):  # to infinity, which scoring takes for not applicable
        return scores.astype(np.float32)


def _trim(trace: traceback.TracebackException) -> traceback.TracebackException:
    """Without the frames of this module and of the threads and loops that lead to the user's."""
    part: traceback.TracebackException | None = trace
    while part is not None:
        foreign = (i for i, f in enumerate(part.stack) if not f.filename.startswith(MACHINERY))
        del part.stack[: next(foreign, len(part.stack))]
        part = part.__cause__ or (None if part.__suppress_context__ else part.__context__)
    return trace


# ---- loading


def load(
    use: str,
    options: Mapping[str, Any],
    *,
    timeout_s: float = 60.0,
    max_failures: int = 5,
    where: str = "rewards",
) -> CustomReward:
    """The reward `FILE.py:FUNCTION` or `package.module:FUNCTION`, with its options bound.

    A file's path starts at the working directory; the file runs once however many rewards it
    holds. `where` starts the error messages.

    Raises:
        InputError: listing what is wrong with the file, the function or the options.
    """
    try:
        function = find_function(use)
        parameters = _parameters(function)
        problems = [
            f"option {key}: {problem}"
            for key, value in options.items()
            if (problem := option_problem(parameters.options, key, value))
        ]
        problems += [
            f"option {key}: missing, and the function has no default for it; "
            f"set options: {{{key}: ..}}"
            for key, option in parameters.options.items()
            if option.default is REQUIRED and key not in options
        ]
        if problems:
            raise InputError(problems)
    except InputError as error:
        raise InputError([f"{where}: {use}: {problem}" for problem in error.problems]) from error
    return CustomReward(use, function, parameters, dict(options), timeout_s, max_failures)


def _parameters(function: Callable[..., Any]) -> Parameters:
    """What the signature asks for. Raises InputError listing the parameters that nothing fills."""
    try:
        listed = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise InputError(f"its parameters cannot be read ({error}); wrap it in a def") from None
    problems, inputs = [], []
    columns: dict[str, bool] = {}  # name -> whether it has a default
    for one in listed:
        if one.kind is one.POSITIONAL_ONLY:
            problems.append(f"parameter {one.name}: positional-only; move it behind the /")
        elif one.kind is one.VAR_POSITIONAL:
            problems.append(f"parameter *{one.name}: nothing fills it; write * or drop it")
        elif one.kind is one.KEYWORD_ONLY and one.name in TASK_OF:
            problems.append(f"parameter {one.name}: an option by its place; move it before the *")
        elif one.kind is one.POSITIONAL_OR_KEYWORD and one.name in TASK_OF:
            inputs.append(one.name)
        elif one.kind is one.POSITIONAL_OR_KEYWORD:
            columns[one.name] = one.default is not one.empty
    if len(inputs) != 1 and not problems:
        names = ", ".join(one.name for one in listed) or "none"
        problems.append(
            f"found the parameters {names}; expected images (a reward of drawings) or texts (a "
            "reward of answers) among them, and not both"
        )
    keywords = {one.name: one for one in listed if one.kind is one.KEYWORD_ONLY}
    annotations = _annotations(function, keywords, problems)
    if problems:
        raise InputError(problems)
    return Parameters(
        task=TASK_OF[inputs[0]],
        columns=tuple(name for name, optional in columns.items() if not optional),
        optional=tuple(name for name, optional in columns.items() if optional),
        every_column=any(one.kind is one.VAR_KEYWORD for one in listed),
        options={key: Option(annotations[key], keywords[key].default) for key in keywords},
    )


def _annotations(
    function: Callable[..., Any],
    keywords: Mapping[str, inspect.Parameter],
    problems: list[str],
) -> dict[str, Any]:
    """The types of the options alone: those of other parameters may name what is not imported."""
    callables: tuple[Any, ...] = (inspect.unwrap(function), type(function).__call__)
    names = next((one.__globals__ for one in callables if hasattr(one, "__globals__")), {})
    found = {}
    for key, parameter in keywords.items():
        given = Any if parameter.annotation is parameter.empty else parameter.annotation
        holder = types.SimpleNamespace(__annotations__={key: given})
        try:
            found |= typing.get_type_hints(holder, globalns=names, include_extras=True)
        except Exception as error:  # an annotation is any expression
            problems.append(
                f"option {key}: its annotation {given!r} cannot be read ({error}); use a type "
                "that the file imports"
            )
    return found
