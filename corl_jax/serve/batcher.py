"""Gathers samples of several requests into one call of the sampler, in a thread of its own.

The thread is the only one that uses the devices. Samples wait in one queue. The oldest one decides
which samples the next call draws: those of its program, up to a full batch.
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

Program = TypeVar("Program", bound=Hashable)
Row = TypeVar("Row")

logger = logging.getLogger(__name__)

Draw = Callable[[Any, Sequence[Any]], Sequence[Any]]
"""(program, rows) -> the sample of each row."""


class QueueFull(Exception):
    """Too many samples wait already."""


class Closed(Exception):
    """The batcher takes no more samples."""


class Waiting(Generic[Program, Row]):
    """A sample that waits for its call. Samples of one `part` are drawn in one call."""

    def __init__(self, program: Program, row: Row, part: object):
        self.program, self.row, self.part = program, row, part
        self.since = time.monotonic()
        self.future: Future = Future()


class Batcher(Generic[Program, Row]):
    """A queue of samples and the thread that draws them.

    If a call fails, each of its samples is drawn alone, so that only those fail which are to blame.
    """

    def __init__(self, draw: Draw, *, batch_size: int, max_wait_s: float, max_queue: int):
        self._draw, self._batch_size = draw, batch_size
        self._max_wait_s, self._max_queue = max_wait_s, max_queue
        self._queue: list[Waiting[Program, Row]] = []
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)
        self._thread.start()

    @property
    def queued(self) -> int:
        """The number of samples that wait."""
        return len(self._queue)

    @property
    def is_open(self) -> bool:
        """Whether it takes samples."""
        return self._thread.is_alive() and not self._is_closed

    def submit(self, program: Program, rows: Sequence[Row]) -> list[Future]:
        """Queues the samples of a request; returns the future of each.

        A future that is cancelled before its call leaves the queue.

        Raises:
            QueueFull: there is no room for all of them; none is queued.
            Closed: after `close`.
        """
        # 20 samples, 16 a call: 2 parts of 10, as `generate` does, so that the results are equal.
        size = math.ceil(len(rows) / math.ceil(len(rows) / self._batch_size))
        parts = [object() for _ in range(0, len(rows), size)]
        waiting = [Waiting(program, row, parts[i // size]) for i, row in enumerate(rows)]
        with self._changed:
            if not self.is_open:
                raise Closed
            self._queue = [item for item in self._queue if not item.future.cancelled()]
            # An empty queue takes any request, or one of more than `max_queue` never could run.
            if self._queue and len(self._queue) + len(waiting) > self._max_queue:
                raise QueueFull
            self._queue += waiting
            self._changed.notify_all()
        return [item.future for item in waiting]

    def close(self) -> None:
        """Draws what waits, then ends the thread."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while batch := self._take_batch():
            running = [x for x in batch if x.future.set_running_or_notify_cancel()]
            if running:
                self._draw_batch(running)

    def _take_batch(self) -> list[Waiting[Program, Row]]:
        """Waits for a batch and takes it from the queue; empty after the end."""
        with self._changed:
            while True:
                while not self._queue and not self._is_closed:
                    self._changed.wait()
                if not self._queue:
                    return []
                oldest = self._queue[0]
                batch = [item for item in self._queue if item.program == oldest.program]
                rest = oldest.since + self._max_wait_s - time.monotonic()
                if len(batch) >= self._batch_size or rest <= 0 or self._is_closed:
                    batch = self._keep_whole_parts(batch)
                    taken = {id(item) for item in batch}
                    self._queue = [item for item in self._queue if id(item) not in taken]
                    return batch
                self._changed.wait(rest)

    def _keep_whole_parts(
        self, batch: Sequence[Waiting[Program, Row]]
    ) -> list[Waiting[Program, Row]]:
        """Returns the first parts that fit into one call together."""
        whole_parts: list[Waiting[Program, Row]] = []
        for _, members in itertools.groupby(batch, key=lambda item: id(item.part)):
            part = list(members)
            if len(whole_parts) + len(part) > self._batch_size:
                break
            whole_parts += part
        return whole_parts

    def _draw_batch(self, batch: Sequence[Waiting[Program, Row]]) -> None:
        try:
            samples = self._draw(batch[0].program, [item.row for item in batch])
            results = list(zip(batch, samples, strict=True))
        except Exception as error:
            logger.exception("a call for %d samples failed", len(batch))
            if len(batch) == 1:
                batch[0].future.set_exception(error)
                return
            for item in batch:
                self._draw_batch([item])
            return
        for item, sample in results:
            item.future.set_result(sample)
