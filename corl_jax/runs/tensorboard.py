"""TensorBoard's curves, pictures and texts of a run, as an event file.

tensorboardX's own writer hands events to a thread that the first OSError ends; whoever adds one
then waits for ever. Here they are written where the error can be borne.
"""

from __future__ import annotations

import contextlib
import math
import socket
import struct
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from corl_jax.errors import InputError
from corl_jax.runs.append_log import AppendLog


class EventFile:
    """One event file beside those of the processes before; every method may raise OSError."""

    def __init__(self, directory: Path, resumed_at: int | None):
        """What was logged after the restored step `resumed_at` is hidden; None hides everything.

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
        # Whole seconds come first in the name, by which readers sort; restarts can be quicker.
        now = f"{int(time.time()):010d}.{socket.gethostname()}.{time.time_ns()}"
        self.records = AppendLog(directory / f"events.out.tfevents.{now}")
        log = self._proto.SessionLog(status=self._proto.SessionLog.START)
        purged = 0 if resumed_at is None else resumed_at + 1
        self._head = self._record(file_version="brain.Event:2")
        self._head += self._record(step=purged, session_log=log)

    def start(self) -> None:
        """Makes the file, which hides the later steps of the processes before."""
        self.records.add(self._head)

    def add_scalars(self, step: int, numbers: Mapping[str, float]) -> None:
        """NaN, which says "does not apply", is left out."""
        shown = {name: number for name, number in numbers.items() if not math.isnan(number)}
        self._add(step, [self._summary.scalar(name, number) for name, number in shown.items()])

    def add_image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """[H, W, 3] uint8."""
        self._add(step, [self._summary.image(name, pixels, dataformats="HWC")])

    def add_text(self, step: int, name: str, markdown: str) -> None:
        self._add(step, [self._summary.text(name, markdown)])

    def _add(self, step: int, summaries: list[Any]) -> None:
        self.records.add(b"".join(self._record(step=int(step), summary=one) for one in summaries))

    def _record(self, **fields: Any) -> bytes:
        """An event as a TFRecord: its length and itself, each with a checksum."""
        event = self._proto.Event(wall_time=time.time(), **fields).SerializeToString()
        length = struct.pack("<Q", len(event))
        sums = [struct.pack("<I", self._checksum(part)) for part in (length, event)]
        return b"".join([length, sums[0], event, sums[1]])


@contextlib.contextmanager
def block_torch_import() -> Iterator[None]:
    """PyTorch, where it is installed and not in use already, cannot be imported meanwhile.

    tensorboardX imports it for tensors that nobody hands it here, which takes seconds.
    """
    if "torch" in sys.modules:
        yield
        return
    modules: dict[str, Any] = sys.modules
    modules["torch"] = None  # what `import` takes for a module that there is not
    try:
        yield
    finally:
        del modules["torch"]
