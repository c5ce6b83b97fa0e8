"""Runs a user's reward: a plain function in a file, called in a separate process.

    def brightness(images, *, scale: float = 1.0):
        return [scale * ImageStat.Stat(image.convert("L")).mean[0] / 255 for image in images]

The names of the parameters say what the function gets. `images` are PIL images: it scores image
generation. `texts` are strings: it scores answers. Other names are columns of the data, each a
list with one value per sample. `**columns` takes all other columns. Keyword-only parameters are
options of the config. The function may be `async def`. It returns one number per sample, or None
for a sample to which the reward does not apply.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np

from corl_jax.config.checks import REWARD_GRACE_S
from corl_jax.errors import InputError, RewardError
from corl_jax.rewards.samples import Context, Samples
from corl_jax.rewards.signature import Parameters
from corl_jax.rewards.user_code import locate
from corl_jax.rewards.user_process import UserProcess
from corl_jax.rewards.worker import Failure, Interrupt, RawImage

logger = logging.getLogger(__name__)

_processes: weakref.WeakValueDictionary[Any, UserProcess] = weakref.WeakValueDictionary()
"""The process that has imported a file's code. A process lives as long as a reward of its file."""


@dataclasses.dataclass(eq=False)
class UserReward:
    """A user's function as a reward. It scores the rows of this process only.

    A call fails if the function raises (SystemExit too) or gives no result for `timeout_s` seconds.
    It also fails if it ends its process, or does not return one number or None per sample. Then
    the samples get NaN and a warning is logged. After `max_failures` failed calls in a row the run
    ends.
    """

    use: str
    parameters: Parameters
    options: Mapping[str, Any]
    timeout_s: float
    max_failures: int
    process: UserProcess
    failures: int = dataclasses.field(default=0, init=False)  # calls that failed so far
    failed_samples: int = dataclasses.field(default=0, init=False)  # of the last call
    last_failure: Failure | None = dataclasses.field(default=None, init=False)
    _in_a_row: int = dataclasses.field(default=0, init=False, repr=False)

    @property
    def name(self) -> str:
        """The name of the function, without its file or module."""
        return self.use.rpartition(":")[2]

    @property
    def scores(self) -> str:
        """What it scores: images or texts."""
        return self.parameters.completions

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the data that the function reads."""
        return self.parameters.columns

    @property
    def optional(self) -> tuple[str, ...]:
        """The columns that the data may lack."""
        return self.parameters.optional

    def __call__(self, samples: Samples, context: Context) -> np.ndarray:
        """Returns the rewards [N] float32; NaN for None, for NaN, and for a call that failed.

        Raises:
            RewardError: too many calls in a row have failed.
            KeyboardInterrupt: the function raised it, or the user pressed Ctrl-C during the call.
        """
        count = len(samples)
        if not count:
            return np.zeros(0, np.float32)
        reply = self.process.call(
            self.name, self._build_arguments(samples), count, self.timeout_s, REWARD_GRACE_S
        )
        if isinstance(reply, Interrupt):
            raise KeyboardInterrupt
        if isinstance(reply, Failure):
            self.failed_samples = count
            self._count_failure(reply)
            return np.full(count, np.nan, np.float32)
        self._in_a_row = self.failed_samples = 0
        with np.errstate(over="ignore"):  # becomes infinity, which scoring turns into NaN
            return np.array(reply, np.float64).astype(np.float32)

    def _build_arguments(self, samples: Samples) -> dict[str, Any]:
        parameters = self.parameters
        values: dict[str, Any] = {}
        if parameters.completions == "images":
            # As bytes, because the other process then needs neither numpy nor JAX.
            images = samples.list_images()
            values["images"] = [RawImage((x.shape[1], x.shape[0]), x.tobytes()) for x in images]
        else:
            values["texts"] = samples.require_texts()
        names = {*parameters.columns, *parameters.optional}
        if parameters.every_column:
            names |= samples.columns.keys() - values.keys() - {*parameters.options}
        columns = {name: x for name, x in samples.columns.items() if name in names}
        return values | columns | dict(self.options)

    def _count_failure(self, failure: Failure) -> None:
        self.failures += 1
        self._in_a_row += 1
        self.last_failure = failure
        # One failure may be a network error of a remote scorer; many in a row are a broken reward,
        # which would train on nothing.
        if self._in_a_row >= self.max_failures:
            raise RewardError(
                f"reward {self.name} ({self.use}): failed calls in a row: {self._in_a_row} "
                f"(max_failures: {self.max_failures}); {self.failures} have failed in all, the "
                f"last one with\n{failure.trace}"
            )
        logger.warning(
            "reward %s: its call failed (%d in a row; %d end the run), %d samples go without: %s",
            self.name, self._in_a_row, self.max_failures, self.failed_samples, failure.line,
        )  # fmt: skip


def load_user_reward(
    use: str,
    options: Mapping[str, Any],
    *,
    timeout_s: float = 60.0,
    max_failures: int = 5,
    where: str = "rewards",
) -> UserReward:
    """Loads the reward `FILE.py:FUNCTION` or `package.module:FUNCTION` and binds its options.

    A file's path starts at the working directory. A file with several rewards runs once, in one
    process. Error messages begin with `where`.

    Raises:
        InputError: listing what is wrong with the file, the function or the options.
    """
    try:
        source, name = locate(use)
        # The same file in another folder, with another content or another path of imports is other
        # code.
        key = (source.path or source.name, source.content, os.getcwd(), *sys.path)
        process = _processes.get(key)
        if process is None:
            process = _processes[key] = UserProcess(source)
        parameters = process.inspect(name, dict(options))
    except InputError as error:
        raise InputError([f"{where}: {use}: {problem}" for problem in error.problems]) from error
    return UserReward(use, parameters, dict(options), timeout_s, max_failures, process)
