"""Measures times on the host, and formats one line of results."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import jax

from corl_jax.errors import InputError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of the calls of one function; every call ends when its results are there."""

    first: float  # compilation and one call
    calls: tuple[float, ...]  # the calls after it

    @property
    def median(self) -> float:
        return statistics.median(self.calls)

    @property
    def compile(self) -> float:
        """Seconds of compilation, or of reading its cache: first call minus median."""
        return max(self.first - self.median, 0.0)


def measure(call: Callable[[], Any], repeats: int) -> Timing:
    """Calls once to compile, then `repeats` times."""
    first, *calls = (_time_call(call) for _ in range(repeats + 1))
    return Timing(first, tuple(calls))


def _time_call(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    # JAX returns before the device has finished.
    jax.block_until_ready(call())
    return time.perf_counter() - began


@dataclasses.dataclass(frozen=True)
class Record:
    """One measured thing; names of figures end in their unit, if they have one."""

    part: str
    name: str
    timing: Timing | None
    figures: dict[str, Any]
    memory: dict[str, float] | None = None  # GiB; None: JAX's, when the record is written

    def to_json(self) -> dict[str, Any]:
        """Returns a flat dict: part, name, seconds, figures, memory."""
        seconds: dict[str, Any] = {}
        if self.timing is not None:
            seconds = {
                "median_s": self.timing.median,
                "compile_s": self.timing.compile,
                "calls_s": list(self.timing.calls),
            }
        return {"part": self.part, "name": self.name, **seconds, **self._list_figures()}

    def format_row(self) -> str:
        """Returns the line of the table."""
        seconds, compiled = "", ""
        if self.timing is not None:
            seconds, compiled = f"{self.timing.median:.4f}", f"{self.timing.compile:.1f}"
        figures = "  ".join(
            f"{name} {_shorten(value)}" for name, value in self._list_figures().items()
        )
        return f"{self.part:<12}{self.name:<40}{seconds:>10}{compiled:>9}  {figures}"

    def _list_figures(self) -> dict[str, Any]:
        return self.figures | (measure_memory() if self.memory is None else self.memory)


HEADER = f"{'part':<12}{'name':<40}{'median s':>10}{'compile':>9}  figures"


def measure_memory() -> dict[str, float]:
    """Returns the peak and the used GiB of the first device, if the platform reports them.

    The peak is that of the process, not of the part: run a part alone to get its own peak.
    """
    stats = jax.local_devices()[0].memory_stats() or {}
    names = {"process_peak_gib": "peak_bytes_in_use", "in_use_gib": "bytes_in_use"}
    return {name: stats[key] / GIB for name, key in names.items() if key in stats}


def _shorten(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def open_records(path: Path | None, stack: contextlib.ExitStack) -> TextIO | None:
    """Opens the file of --out, which `stack` closes; None without it.

    Raises: InputError if it cannot be written.
    """
    if path is None:
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return stack.enter_context(path.open("w", encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"--out {path}: cannot be written ({error.strerror}); name another file"
        ) from error
