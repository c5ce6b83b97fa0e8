"""Appends whole records to a file, on a disk that may be full for a while."""

from __future__ import annotations

import collections
import io
from pathlib import Path

WAITING_BYTES = 2**26
"""Bytes that may wait in memory until a disk has room: a day of steps, or a few image grids."""


class AppendLog:
    """Appends records to a file. Records that cannot be written wait for the next try.

    Readers find whole records, and at most one partial record at the end.
    """

    def __init__(self, path: Path):
        """Does not open the file yet. Existing content is kept."""
        self.path = path
        self.lost = 0  # records for which there was no room in memory either
        self._waiting: collections.deque[bytes] = collections.deque()
        self._waiting_bytes = 0
        self._file: io.FileIO | None = None
        self._end: int | None = None  # of the last whole record; None before the first try

    @property
    def waiting(self) -> int:
        """Number of records that are not in the file yet."""
        return len(self._waiting)

    def add(self, record: bytes) -> None:
        """Writes a record after the waiting ones; drops it if too many bytes wait.

        Raises:
            OSError: it could not be written now.
        """
        if self._waiting_bytes + len(record) <= WAITING_BYTES or not self._waiting:
            self._waiting.append(record)
            self._waiting_bytes += len(record)
        else:
            self.lost += 1
        self.write()

    def write(self) -> None:
        """Writes the records that wait.

        Raises:
            OSError: some of them could not be written.
        """
        try:
            file = self._file or self._open()
            while self._waiting:
                # On a full disk `write` may take only a part of a record and raise at the next
                # call.
                rest = memoryview(self._waiting[0])
                while rest:
                    rest = rest[file.write(rest) :]
                record = self._waiting.popleft()
                self._waiting_bytes -= len(record)
                self._end = (self._end or 0) + len(record)
        except OSError:
            # Opened anew at the next try, which cuts off the partial record.
            self._close_file()
            raise

    def close(self) -> None:
        """Tries once more to write the records that wait, and closes the file.

        Raises:
            OSError: some of them are lost.
        """
        try:
            if self._waiting:
                self.write()
        finally:
            self._close_file()

    def _open(self) -> io.FileIO:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Unbuffered: a kill loses no record that was written.
        self._file = file = io.FileIO(self.path, "ab")
        # A failed write may have left a part of a record behind the last whole one.
        if self._end is not None and file.tell() > self._end:
            file.truncate(self._end)
        self._end = file.tell() if self._end is None else min(self._end, file.tell())
        return file

    def _close_file(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()
