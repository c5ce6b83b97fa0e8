"""The train command, with a line about the memory that it holds before each line of a step.

The resident set cannot tell: after imports and compilation hundreds of megabytes of it are free,
and what leaks fills those first.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

from corl_jax.runs.terminal import Console
from corl_jax.train.__main__ import main


class Mallinfo(ctypes.Structure):
    """What glibc's mallinfo2 returns, in bytes (2.33 and newer)."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
            "fordblks", "keepcost",
        )
    )  # fmt: skip


def held() -> int:
    """Bytes that were asked of malloc and not given back, Python's small objects left out."""
    look = ctypes.CDLL(None).mallinfo2
    look.restype = Mallinfo
    found = look()
    return found.uordblks + found.hblkhd


def weigh(show: Any) -> Any:
    """`Console.add_metrics` that first prints what malloc and Python have given out."""

    def add_metrics(self: Console, *args: Any) -> None:
        print(f"holds {held()} bytes, {sys.getallocatedblocks()} blocks", file=sys.stderr)
        show(self, *args)

    return add_metrics


if __name__ == "__main__":
    Console.add_metrics = weigh(Console.add_metrics)
    main()
