"""Saves checkpoints in the background. Reports a failed save, and raises after several in a row."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from corl_jax.errors import SaveError
from corl_jax.runs.checkpoints import Checkpoints


class Saver:
    """Saves in the background and reports the result of each save."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        say: Callable[[str], None],
        max_failures: int,
        note_saved: Callable[[int], None] = lambda step: None,
        pause: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ):
        """`max_failures` in a row raise an error; a save that succeeds resets the count.

        `note_saved` is called with each saved step, before `say` reports it. `pause` is entered
        while a save is waited for.
        """
        self._checkpoints = checkpoints
        self._say = say
        self._max_failures = max_failures
        self._failures = 0
        self._note_saved = note_saved
        self._pause = pause

    @property
    def directory(self) -> Any:
        """The directory of the checkpoints."""
        return self._checkpoints.directory

    def save(self, step: int, tree: Any, meta: dict[str, Any]) -> None:
        """Starts a save after the previous one has ended, with success or not.

        Raises:
            SaveError: this is the last failure that is allowed.
        """
        self._report(self._checkpoints.wait)
        try:
            self._checkpoints.save(step, tree, meta)
        except SaveError as error:
            self._count_failure(error)

    def poll(self) -> None:
        """Reports a save that has ended; does not wait for a running one.

        Raises:
            SaveError: this is the last failure that is allowed.
        """
        self._report(self._checkpoints.poll)

    def finish(self) -> None:
        """Waits for the last save.

        Raises:
            SaveError: it failed, even if that was reported before.
        """
        # Without the last checkpoint the work since the previous one would be lost.
        self._max_failures = 1
        self._report(self._checkpoints.wait)
        if self._failures:
            raise self._last

    def _report(self, get_saved_step: Callable[[], int | None]) -> None:
        try:
            # Storage may take any time, so the watchdog does not count it.
            with self._pause():
                step = get_saved_step()
        except SaveError as error:
            self._count_failure(error)
            return
        if step is not None:
            self._failures = 0
            try:
                # Before the message: whoever reads it may rely on saved.json.
                self._note_saved(step)
            except OSError as error:
                self._say(f"warning: step {step} cannot be noted ({error}); it is saved")
            self._say(f"checkpoint of step {step} saved")

    def _count_failure(self, error: SaveError) -> None:
        self._failures += 1
        self._last = error
        if self._failures >= self._max_failures:
            raise error
        self._say(
            f"warning: {error}; training continues, {self._failures} of at most "
            f"{self._max_failures} failures in a row"
        )
