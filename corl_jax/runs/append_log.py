"""A log that grows by whole records, over a disk that is full for a while."""

from __future__ import annotations

import collections
import io
from pathlib import Path

WAITING_BYTES = 2**26
"""How much waits in memory for a disk with room: a day of steps, or some picture grids."""


class Records:
    """Appends records to a file; those that cannot be written wait for the next try.

    Nothing is buffered beside them, and what was written of half a record is cut off before the
    next try, so that a reader meets whole records, and half a one at most at the end.
    """

    def __init__(self, path: Path):
        """Opens nothing yet; what the file holds stays."""
        self.path = path
        self.lost = 0  # records for which there was no room in memory either
        self._waiting: collections.deque[bytes] = collections.deque()
        self._bytes = 0  # that wait
        self._file: io.FileIO | None = None
        self._end: int | None = None  # of the last whole record; None before the first try

    @property
    def waiting(self) -> int:
        """Records that are not in the file yet."""
        return len(self._waiting)

    def add(self, record: bytes) -> None:
        """Writes a record after those that wait; drops it if they are too many.

        Raises:
            OSError: it could not be written now.
        """
        kept = self._bytes + len(record) <= WAITING_BYTES or not self._waiting
        if kept:
            self._waiting.append(record)
            self._bytes += len(record)
        self.lost += not kept
        self.write()

    def write(self) -> None:
        """Writes what waits.

        Raises:
            OSError: some of it could not be written.
        """
        try:
            file = self._file or self._open()
            while self._waiting:
                left = memoryview(self._waiting[0])
                while left:
                    left = left[file.write(left) :]
                record = self._waiting.popleft()
                self._bytes -= len(record)
                self._end = (self._end or 0) + len(record)
        except OSError:
            self._let_go()
            raise

    def close(self) -> None:
        """Tries once more what waits.

        Raises:
            OSError: some of it is lost.
        """
        try:
            if self._waiting:
                self.write()
        finally:
            self._let_go()

    def _open(self) -> io.FileIO:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = file = io.FileIO(self.path, "ab")
        if self._end is not None and file.tell() > self._end:
            file.truncate(self._end)
        self._end = file.tell() if self._end is None else min(self._end, file.tell())
        return file

    def _let_go(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()
