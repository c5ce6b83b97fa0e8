"""Commands started as several processes of one run, on this machine."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 900


@dataclasses.dataclass
class Process:
    """A started process; its output goes to a file, so that nothing waits for a reader."""

    popen: subprocess.Popen
    out: IO[str]
    started: float = dataclasses.field(default_factory=time.monotonic)

    @property
    def text(self) -> str:
        """Standard output and errors so far."""
        self.out.seek(0)
        return self.out.read()

    def wait(self, limit: float = LIMIT_S) -> int:
        """The exit code. Raises AssertionError, with the output, if it is not there in time."""
        try:
            return self.popen.wait(limit)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()
            raise AssertionError(f"did not end within {limit} s:\n{self.text}") from None


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def start(arguments: list[str], devices: int = 2, **environment: str) -> Process:
    """`python ARGUMENTS` with so many CPU devices."""
    settings = {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "PYTHONPATH": str(ROOT),
    }
    out = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 (open as long as it runs)
    popen = subprocess.Popen(
        [sys.executable, *arguments],
        stdout=out, stderr=subprocess.STDOUT, env=os.environ | settings | environment, text=True,
    )  # fmt: skip
    return Process(popen, out)


def train(
    config: Path, *overrides: str, only: Sequence[int] = (0, 1), port: int | None = None
) -> list[Process]:
    """Two processes of the train command with two devices each, or `only` some, started."""
    port = port or free_port()
    common = [
        "-m", "corl_jax.train", "--config", str(config),
        f"distributed.coordinator_address=127.0.0.1:{port}", "distributed.num_processes=2",
    ]  # fmt: skip
    return [start([*common, f"distributed.process_id={index}", *overrides]) for index in only]


def finished(processes: list[Process]) -> list[str]:
    """Their outputs; all ended well."""
    codes = [process.wait() for process in processes]
    texts = [process.text for process in processes]
    assert not any(codes), f"exit codes {codes}\n" + "\n\n".join(texts)
    return texts
