"""The training command on a tiny model in processes of its own, to be killed and compared.

job = Job.make(folder, model, rows, steps=12)
job.start(); ...; job.kill()
job.finish()
assert outcome(job) == outcome(straight)
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from corl_jax.config import files as config_files
from corl_jax.devices.mesh import make_mesh
from corl_jax.policies.choices import sample_keys
from corl_jax.runs.checkpoints import Checkpoints, DamagedError
from corl_jax.tasks import QUESTION_STREAMS, TASKS
from corl_jax.train import __main__ as command
from corl_jax.train import resolve
from tests.support import tiny_runs

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 900  # seconds that anything may take on a busy machine
# Saves last longer with more to write, so that kills can fall into them; each step is one update
# more than it has rollouts, so that kills fall between updates too.
BUSY = {
    "algorithm": {"kl_coef": 0.1, "num_iterations": 2},
    "checkpoint": {"every": 1},
    "export": {"layout": "jax"},
}
# The cheapest run that has parameters, an optimizer, batches and metrics.
SUPERVISED = {"stage": "sft", "rewards": [], "algorithm": {}, "train": {"max_steps": 6}}


@dataclasses.dataclass
class Job:
    """One run directory, and the process that works in it now."""

    output: Path
    config: Path
    devices: int = 1
    driver: str = ""  # Python that runs before the command, in the same process
    process: subprocess.Popen | None = None

    @classmethod
    def make(
        cls, folder: Path, model: Path, rows: Path, *, devices: int = 1, driver: str = "",
        **changes: Any,
    ) -> Job:  # fmt: skip
        tree = tiny_runs.options(model, rows, folder / "run", **{**BUSY, **changes})
        folder.mkdir(parents=True, exist_ok=True)
        return cls(
            folder / "run", tiny_runs.write_config(folder / "run.yaml", tree), devices, driver
        )

    @property
    def log(self) -> str:
        path = self.output.parent / "log.txt"
        return path.read_text(errors="replace") if path.exists() else ""

    @property
    def checkpoints(self) -> Path:
        return self.output / "checkpoints"

    def steps(self) -> list[int]:
        """Finished checkpoints."""
        if not self.checkpoints.exists():
            return []
        return sorted(int(path.name) for path in self.checkpoints.iterdir() if path.name.isdigit())

    def partial(self) -> list[Path]:
        """Checkpoints that are being written."""
        return list(self.checkpoints.glob("*orbax-checkpoint-tmp*"))

    def logged(self) -> int:
        """The last step in the metrics."""
        path = self.output / "metrics.jsonl"
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        whole = [json.loads(line)["step"] for line in lines if line.endswith(b"\n")]
        return max(whole, default=0)

    def start(self, *arguments: str) -> subprocess.Popen:
        """The command as a user gives it, with the caches of the tests."""
        before = f"{self.driver}\nimport sys; sys.argv[0] = 'train'\n"
        program = f"{before}from corl_jax.train.__main__ import main; main()"
        command = ["-c", program] if self.driver else ["-m", "corl_jax.train"]
        environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(self.devices)}
        with (self.output.parent / "log.txt").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, *command, "--config", str(self.config), *arguments],
                cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        return self.process

    def until(self, condition: Callable[[], Any]) -> bool:
        """Waits; False if the process ended first."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if self.process is not None and self.process.poll() is not None:
                return bool(condition())
            assert time.monotonic() < deadline, self.log[-3000:]
            time.sleep(0.002)
        return True

    def kill(self) -> None:
        """kill -9 of the trainer alone, and what is there just then is left as it is."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Sends a signal and waits for the exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(PATIENCE)

    def here(self, *arguments: str) -> int:
        """Runs the command in this process, where tests can put their hands in; its exit code."""
        try:
            command.main(["--config", str(self.config), *arguments])
        except SystemExit as error:
            return int(error.code or 0)
        return 0

    def finish(self, *arguments: str, code: int = 0) -> None:
        """Runs the command to its end."""
        found = self.start(*arguments).wait(PATIENCE)
        assert found == code, f"exit code {found}, expected {code}:\n{self.log[-4000:]}"


def outcome(job: Job) -> dict[str, str]:
    """SHA-256 of all that a finished run has come to, and of what it would do next.

    Parameters, optimizer and step; the next batch and its sampling keys; metrics without what a
    clock decides; pictures and the export.
    """
    step = max(job.steps())
    record = json.loads((job.checkpoints / f"{step}/meta/metadata").read_text())
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])  # for devices of other processes
    state = ocp.StandardCheckpointHandler().restore(
        (job.checkpoints / f"{step}/state").absolute(),
        args=ocp.args.StandardRestore(fallback_sharding=here),
    )
    found = {"step": str(step), "state": _sha256(_leaves(state))}
    mesh = functools.partial(make_mesh, devices=jax.devices()[: job.devices])
    with mock.patch.object(resolve, "make_mesh", mesh):
        plan = resolve.resolve_run(config_files.load(job.config))
    plan.train_loader.set_state(record["run"]["data"])
    batch = plan.train_loader.batch(record["run"]["data"]["step"])
    parts: list[Any] = [batch.index, batch.encoded]
    parts += [
        jax.random.key_data(sample_keys(record["run"]["seed"], batch.index, 2, stream))
        for stream in (*(task.stream for task in TASKS.values()), *QUESTION_STREAMS.values())
    ]
    found["next"] = _sha256(_leaves(parts))
    lines = [
        {k: v for k, v in line.items() if "second" not in k and k != "step_time"}
        for line in tiny_runs.metric_lines(job.output)
    ]
    found["metrics"] = _sha256([("", json.dumps(lines).encode())])
    for folder in ("images", "export"):
        files = sorted(path for path in (job.output / folder).rglob("*") if path.is_file())
        # The model card names the run's directory, which differs here.
        files = [path for path in files if path.name != "README.md"]
        found[folder] = _sha256((path.name, path.read_bytes()) for path in files)
    return found


def unsound(job: Job) -> list[int]:
    """Finished checkpoints that do not verify."""
    found = []
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with Checkpoints(job.checkpoints, keep=99) as checkpoints:
        for step in checkpoints.steps():
            record = json.loads((job.checkpoints / f"{step}/meta/metadata").read_text())
            tree: dict[str, Any] = {}
            for name, (dtype, shape, _) in record["leaves"].items():
                *parents, last = name.split("/")
                node = functools.reduce(lambda node, key: node.setdefault(key, {}), parents, tree)
                node[last] = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=place)
            try:
                checkpoints.restore(step, tree)
            except DamagedError:
                found.append(step)
    return found


def _leaves(tree: Any) -> Iterator[tuple[str, bytes]]:
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        array = np.asarray(leaf)
        yield f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}", array.tobytes()


def _sha256(parts: Any) -> str:
    digest = hashlib.sha256()
    for name, content in parts:
        digest.update(f"{name} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()
