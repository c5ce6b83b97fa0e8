"""Writes TensorBoard's curves, images and texts of a run to an event file.

The writer of tensorboardX gives events to a thread. The first OSError ends that thread, and the
next event would wait for ever. So events are written here, where the caller handles the error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import socket
import struct
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from corl_jax.errors import InputError
from corl_jax.runs.append_log import AppendLog


@dataclasses.dataclass(frozen=True)
class Chart:
    """A chart of several metrics."""

    # Multiline: regexes of whole names. Margin: a metric, its lower and its upper bound.
    kind: Literal["Multiline", "Margin"]
    names: tuple[str, ...]


Layout = Mapping[str, Mapping[str, Chart]]
"""Title of a group -> title of a chart -> chart."""


class EventFile:
    """Writes one event file, beside those of earlier processes. Every method may raise OSError."""

    def __init__(self, directory: Path, resumed_at: int | None):
        """Hides what was logged after the restored step `resumed_at`; None hides everything.

        Raises:
            InputError: tensorboardX is not installed.
        """
        try:
            with block_torch_import():
                from tensorboardX import summary
                from tensorboardX.proto import event_pb2
                from tensorboardX.record_writer import masked_crc32c
        except ImportError:
            raise InputError(
                "tensorboardX is not installed; run `pip install tensorboardX`"
            ) from None
        self._summary, self._checksum = summary, masked_crc32c
        self._proto: Any = event_pb2
        # Readers sort by the name, which begins with whole seconds. Two processes may start in
        # the same second, so the nanoseconds come last.
        now = f"{int(time.time()):010d}.{socket.gethostname()}.{time.time_ns()}"
        self.records = AppendLog(directory / f"events.out.tfevents.{now}")
        log = self._proto.SessionLog(status=self._proto.SessionLog.START)
        purged = 0 if resumed_at is None else resumed_at + 1
        self._head = self._encode_event(file_version="brain.Event:2")
        # TensorBoard drops earlier events from `purged` on when it reads a START.
        self._head += self._encode_event(step=purged, session_log=log)

    def start(self) -> None:
        """Starts the file, which hides the later steps of earlier processes."""
        self.records.add(self._head)

    def add_scalars(self, step: int, numbers: Mapping[str, float]) -> None:
        """Adds numbers; NaN, which means "does not apply", is left out."""
        shown = {name: number for name, number in numbers.items() if not math.isnan(number)}
        self._add(step, [self._summary.scalar(name, number) for name, number in shown.items()])

    def add_image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Adds an image [H, W, 3] uint8."""
        self._add(step, [self._summary.image(name, pixels, dataformats="HWC")])

    def add_text(self, step: int, name: str, markdown: str) -> None:
        """Adds a text."""
        self._add(step, [self._summary.text(name, markdown)])

    def add_histogram(self, step: int, name: str, counts: np.ndarray, edges: np.ndarray) -> None:
        """Adds a histogram: `counts` [bins] between `edges` [bins + 1]."""
        centers = (edges[:-1] + edges[1:]) / 2
        # TensorBoard reads the lower end of the first bin from `min`.
        histogram = self._summary.histogram_raw(
            name, float(edges[0]), float(edges[-1]), float(counts.sum()),
            float(counts @ centers), float(counts @ centers**2), edges[1:].tolist(),
            counts.tolist(),
        )  # fmt: skip
        self._add(step, [histogram])

    def add_layout(self, step: int, layout: Layout) -> None:
        """Adds the charts of the tab Custom Scalars."""
        charts = {}
        for group, of_group in layout.items():
            # TensorBoard 2.21 shows Margin charts after the others, the last one first.
            lines = [title for title, chart in of_group.items() if chart.kind == "Multiline"]
            margins = [title for title in of_group if title not in lines]
            charts[group] = {
                title: [of_group[title].kind, list(of_group[title].names)]
                for title in [*lines, *reversed(margins)]
            }
        self._add(step, [self._summary.custom_scalars(charts)])

    def add_hparams(self, step: int, options: Mapping[str, Any], metrics: Iterable[str]) -> None:
        """Adds the options and metrics by which the tab HParams compares runs."""
        summaries = self._summary.hparams(dict(options), dict.fromkeys(metrics))
        self._add(step, list(summaries))

    def _add(self, step: int, summaries: list[Any]) -> None:
        self.records.add(
            b"".join(self._encode_event(step=int(step), summary=part) for part in summaries)
        )

    def _encode_event(self, **fields: Any) -> bytes:
        """Returns an event as a TFRecord: its length and its bytes, each with a checksum."""
        event = self._proto.Event(wall_time=time.time(), **fields).SerializeToString()
        # [8 bytes length][4 bytes checksum][event][4 bytes checksum], little endian
        length = struct.pack("<Q", len(event))
        sums = [struct.pack("<I", self._checksum(part)) for part in (length, event)]
        return b"".join([length, sums[0], event, sums[1]])


@contextlib.contextmanager
def block_torch_import() -> Iterator[None]:
    """Prevents an import of PyTorch in the block, unless it is imported already."""
    # tensorboardX imports it for tensors that are never used here, which takes seconds.
    if "torch" in sys.modules:
        yield
        return
    modules: dict[str, Any] = sys.modules
    modules["torch"] = None  # makes `import torch` raise an ImportError
    try:
        yield
    finally:
        del modules["torch"]
