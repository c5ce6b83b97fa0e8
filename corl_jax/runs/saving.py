"""When a save fails: said at once, borne a few times, never taken for a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from corl_jax.errors import SaveError
from corl_jax.runs.checkpoints import Checkpoints


class Saver:
    """Saves in the background and tells what became of it."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        say: Callable[[str], None],
        max_failures: int,
        note: Callable[[int], None] = lambda step: None,
    ):
        """`max_failures` in a row are an error; a save that succeeds starts the count again.

        `note` is told each step that is saved, before people are.
        """
        self._checkpoints = checkpoints
        self._say = say
        self._max_failures = max_failures
        self._failures = 0
        self._note = note

    def save(self, step: int, tree: Any, meta: dict[str, Any]) -> None:
        """Starts a save when the one before is done, whatever has become of that.

        Raises:
            SaveError: it is the last failure that is borne.
        """
        self._settle(self._checkpoints.wait)
        try:
            self._checkpoints.save(step, tree, meta)
        except SaveError as error:
            self._failed(error)

    def poll(self) -> None:
        """Tells of a save that has ended; does not wait.

        Raises:
            SaveError: it is the last failure that is borne.
        """
        self._settle(self._checkpoints.poll)

    def finish(self) -> None:
        """Waits for the last save, without which the work since the one before would be lost.

        Raises:
            SaveError: it failed, also if that was told before.
        """
        self._max_failures = 1
        self._settle(self._checkpoints.wait)
        if self._failures:
            raise self._last

    def _settle(self, outcome: Callable[[], int | None]) -> None:
        try:
            step = outcome()
        except SaveError as error:
            self._failed(error)
            return
        if step is not None:
            self._failures = 0
            try:
                self._note(step)
            except OSError as error:
                self._say(f"warning: step {step} cannot be noted ({error}); it is saved")
            self._say(f"checkpoint of step {step} saved")

    def _failed(self, error: SaveError) -> None:
        self._failures += 1
        self._last = error
        if self._failures >= self._max_failures:
            raise error
        self._say(
            f"warning: {error}; training goes on, {self._failures} of at most "
            f"{self._max_failures} failures in a row"
        )
