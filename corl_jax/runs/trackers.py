"""Sends the log of a run to trackers of experiments beside TensorBoard: W&B and Trackio.

A tracker is a row of `TRACKERS`. Its package is imported only for a run that names it.
"""

from __future__ import annotations

import dataclasses
import html
import importlib
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

TENSORBOARD = "tensorboard"
PROJECT = "corl-jax"
ID_FILE = "tracker_id.txt"


@dataclasses.dataclass(frozen=True)
class Description:
    """What trackers are told about a run."""

    name: str
    directory: Path
    config: Mapping[str, Any]
    run_id: str  # stays the same when the run is resumed


class Tracker(Protocol):
    """A place for the log of a run. Every method may raise anything: the run continues."""

    def add_scalars(self, step: int, numbers: Mapping[str, float]) -> None:
        """Adds numbers; NaN, which means "does not apply", is left out."""
        ...

    def add_image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Adds an image [H, W, 3] uint8."""
        ...

    def add_text(self, step: int, name: str, markdown: str) -> None:
        """Adds a text."""
        ...

    def add_histogram(self, step: int, name: str, counts: np.ndarray, edges: np.ndarray) -> None:
        """Adds a histogram: `counts` [bins] between `edges` [bins + 1]."""
        ...

    def close(self) -> None:
        """Ends the run in the tracker."""
        ...


class WandbLike:
    """Sends the log through a package with W&B's interface, which Trackio has too."""

    def __init__(self, package: Any, run: Any):
        """`run`: the run that the package's `init` returned."""
        self._package, self._run = package, run

    def add_scalars(self, step: int, numbers: Mapping[str, float]) -> None:
        """Adds numbers; NaN is left out."""
        self._log(step, {name: number for name, number in numbers.items() if number == number})

    def add_image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Adds an image [H, W, 3] uint8."""
        self._log(step, {name: self._package.Image(pixels)})

    def add_text(self, step: int, name: str, markdown: str) -> None:
        """Adds a text, shown as it is."""
        page = f"<pre>{html.escape(markdown)}</pre>"
        self._log(step, {f"{name}_text": self._package.Html(page)})

    def add_histogram(self, step: int, name: str, counts: np.ndarray, edges: np.ndarray) -> None:
        """Adds a histogram: `counts` [bins] between `edges` [bins + 1]."""
        self._log(step, {name: self._package.Histogram(np_histogram=(counts, edges))})

    def close(self) -> None:
        """Ends the run, which sends what waits."""
        self._run.finish()

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        self._run.log(dict(values), step=int(step))


def open_wandb(description: Description) -> Tracker:
    """Starts or continues a run of W&B. WANDB_PROJECT, WANDB_MODE and the like are read by it."""
    wandb = importlib.import_module("wandb")
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT), name=description.name,
        id=description.run_id, resume="allow", dir=str(description.directory),
        config=dict(description.config),
    )  # fmt: skip
    return WandbLike(wandb, run)


def open_trackio(description: Description) -> Tracker:
    """Starts or continues a run of Trackio, which finds it by its name."""
    trackio = importlib.import_module("trackio")
    run = trackio.init(
        os.environ.get("TRACKIO_PROJECT", PROJECT), f"{description.name}-{description.run_id}",
        resume="allow", config=dict(description.config), embed=False,
    )  # fmt: skip
    return WandbLike(trackio, run)


TRACKERS: dict[str, Callable[[Description], Tracker]] = {
    "wandb": open_wandb,
    "trackio": open_trackio,
}
"""Name of a tracker, of its package and of its extra -> what starts or continues a run."""


def read_run_id(directory: Path, is_resumed: bool) -> str:
    """Returns the id of a run for trackers; a run from its beginning gets a new one."""
    path = directory / ID_FILE
    if is_resumed and path.exists():
        return path.read_text(encoding="utf-8").strip()
    run_id = uuid.uuid4().hex[:8]
    path.write_text(f"{run_id}\n", encoding="utf-8")
    return run_id
