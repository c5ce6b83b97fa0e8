"""Two processes that save, fall back and stop together (T1b, T2, T7b), each with two devices.

The training command, and for damaged steps a loop around its checkpoints, without a model.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.harness import PATIENCE, ROOT, SUPERVISED, Job, outcome
from tests.support import several_processes

WORKER = """
import sys
import jax, jax.numpy as jnp, numpy as np

jax.config.update("jax_cpu_collectives_implementation", "gloo")
index, port, folder, every, steps = sys.argv[1:]
index, every, steps = int(index), int(every), int(steps)
jax.distributed.initialize(f"127.0.0.1:{port}", 2, index, heartbeat_timeout_seconds=10)

from jax.sharding import NamedSharding, PartitionSpec
from corl_jax.devices.mesh import make_mesh
from corl_jax.errors import exit_on_input_error
from corl_jax.runs.checkpoints import Checkpoints, to_abstract

mesh = make_mesh(data=1, fsdp=4, tensor=1)
spread = NamedSharding(mesh, PartitionSpec("fsdp"))
everywhere = NamedSharding(mesh, PartitionSpec())
start = lambda: {"w": jnp.arange(4096.0).reshape(64, 64) / 7, "step": jnp.int32(0)}
state = jax.jit(start, out_shardings={"w": spread, "step": everywhere})()
advance = jax.jit(lambda s: {"w": jnp.sin(s["w"]) + s["w"], "step": s["step"] + 1})

@exit_on_input_error
def main():
    global state
    with Checkpoints(folder, keep=2) as checkpoints:
        if checkpoints.steps():
            found = checkpoints.restore_newest(to_abstract(state), {"seed": 1})
            state = found.tree
            print("from", found.step, found.warnings, flush=True)
        for step in range(int(state["step"]) + 1, steps + 1):
            state = advance(state)
            if step % every == 0:
                checkpoints.save(step, state, {"config": {"seed": 1}})
        checkpoints.wait()
        local = [s.data.tobytes().hex() for s in state["w"].addressable_shards]
        import hashlib
        print("digest", hashlib.sha256("".join(local).encode()).hexdigest(), flush=True)

main()
"""


class Pair:
    """Both processes of one start."""

    def __init__(self, folder, every: int = 4, steps: int = 12):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        options = [str(every), str(steps)]
        environment = os.environ | {"JAX_NUM_CPU_DEVICES": "2"}
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", WORKER, str(index), port, str(folder), *options], cwd=ROOT,
                env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for index in range(2)
        ]  # fmt: skip

    def end(self) -> tuple[list[int], list[str], list[str]]:
        """(exit codes, stdout, stderr)"""
        texts = [process.communicate(timeout=PATIENCE) for process in self.processes]
        codes = [process.returncode for process in self.processes]
        return codes, [out for out, _ in texts], [error for _, error in texts]


@pytest.fixture(autouse=True)
def short_starts(monkeypatch):
    """From the compilation cache, which what runs here bears; see `processes`."""
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "true")


def digests(outputs: list[str]) -> list[str]:
    return [out.partition("digest ")[2].strip() for out in outputs]


@pytest.mark.slow
def test_a_damaged_step_for_both(tmp_path, figure):
    folder = tmp_path / "calm"
    codes, outputs, errors = Pair(folder).end()
    assert codes == [0, 0], errors
    calm = digests(outputs)
    (folder / "12" / "meta" / "metadata").write_text("{}")
    codes, outputs, errors = Pair(folder).end()
    assert codes == [0, 0], errors
    figure("T7b", fault="damaged step, two processes", tries=1, losses=digests(outputs) != calm)
    assert digests(outputs) == calm
    assert all("from 8 [" in out for out in outputs)
    assert sorted(path.name for path in folder.iterdir()) == ["12", "12.corrupt-0", "8"]


@pytest.mark.slow
def test_a_part_that_one_process_cannot_read_is_damage_for_both(tmp_path, figure):
    codes, outputs, errors = Pair(tmp_path / "run", every=1, steps=2).end()
    assert codes == [0, 0], errors
    calm = digests(outputs)
    parts = list((tmp_path / "run" / "2" / "state" / "ocdbt.process_1" / "d").iterdir())
    assert parts
    for part in parts:
        part.write_bytes(bytes(byte ^ 0x5A for byte in part.read_bytes()))
    codes, outputs, errors = Pair(tmp_path / "run", every=1, steps=2).end()
    assert codes == [0, 0], errors
    losses = digests(outputs) != calm
    figure("T7b", fault="one process's part of a step damaged", tries=1, losses=losses)
    assert not losses and all("from 1 [" in out for out in outputs)
    assert (tmp_path / "run" / "2.corrupt-0").is_dir()


# ---- the training command


def job_of_two(
    folder: Path, model: Path, rows: Path, steps: int, every: int = 1, **more: Any
) -> Job:
    changes = {
        "train": {"max_steps": steps, "prompts_per_step": 8},
        "checkpoint": {"every": every}, "distributed": {"heartbeat_timeout_s": 10},
    }  # fmt: skip
    mesh = {"data": 1, "fsdp": 4}
    return Job.make(folder, model, rows, devices=4, **{"mesh": mesh} | more | changes)


def until(pair: list[several_processes.Process], condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        for process in pair:
            assert process.popen.poll() is None, process.text[-3000:]
        assert time.monotonic() < end, pair[0].text[-3000:]
        time.sleep(0.002)


def finished(job: Job) -> dict[str, str]:
    several_processes.finished(several_processes.train(job.config))
    return outcome(job)


@pytest.fixture(scope="module")
def calm(model, rows, tmp_path_factory) -> dict[str, str]:
    """What a run of six steps comes to."""
    return finished(job_of_two(tmp_path_factory.mktemp("calm"), model, rows, 6, **SUPERVISED))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("targets", "again"), [((1,), False), ((0, 1), False), ((0, 1), True)],
    ids=["one", "both", "both again and again"],
)  # fmt: skip
def test_a_signal_to_the_command(model, rows, tmp_path, targets, again, calm, figure):
    """`again`: once more each tenth of a second, in the save too, until they have ended."""
    job = job_of_two(tmp_path, model, rows, 6, every=100, **SUPERVISED)
    pair = several_processes.train(job.config)
    until(pair, lambda: "step 1/" in pair[0].text)
    began, sent = time.monotonic(), 0
    while not sent or (again and any(pair[index].popen.poll() is None for index in targets)):
        for index in targets:
            pair[index].popen.send_signal(signal.SIGTERM)
        sent += 1
        time.sleep(0.1)
        assert time.monotonic() < began + PATIENCE, pair[0].text[-3000:]
    codes = [process.wait(PATIENCE) for process in pair]
    seconds = time.monotonic() - began
    assert codes == [75, 75], [process.text[-3000:] for process in pair]
    (step,) = job.steps()
    assert f"after step {step} of 6, which is saved in" in pair[0].text
    found = finished(job)
    wrong = [name for name, value in calm.items() if found[name] != value]
    figure(
        "T2", fault=f"SIGTERM to {len(targets)} of two processes"
        f"{', again and again' if again else ''}, the command", tries=1,
        losses=len(wrong), note=f"step {step}, signal to exit {seconds:.1f} s",
    )  # fmt: skip
    assert not wrong and (sent > 2 or not again)


KILLS = 12
# Each process has a part of every parameter, or all of them. Not GRPO in parts: on CPUs it cannot
# take its programs from the compilation cache (`processes`), so that each start would take minutes.
KINDS = {"supervised, in parts": SUPERVISED, "GRPO, replicated": {"mesh": {"data": 4, "fsdp": 1}}}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_kills_of_one_of_two(model, rows, tmp_path, kind, figure):
    """Either one, alternately, in a save; the other ends by itself."""
    steps, more = 5 * KILLS, KINDS[kind]
    expected = finished(job_of_two(tmp_path / "calm", model, rows, steps, **more))
    job, chance = job_of_two(tmp_path / "killed", model, rows, steps, **more), random.Random(0)
    hits, lost, seconds = 0, [], []
    for kill in range(KILLS):
        pair = several_processes.train(job.config)
        wanted = max(job.steps(), default=0) + 1 + chance.randrange(2)
        until(pair, lambda: max(job.steps(), default=0) >= wanted and job.partial())  # noqa: B023
        time.sleep(chance.uniform(0, 0.03))
        pair[kill % 2].popen.kill()
        hits += bool(job.partial())
        lost.append(max(0, job.logged() - max(job.steps(), default=0)))
        began = time.monotonic()
        codes = [process.wait(PATIENCE) for process in pair]
        seconds.append(time.monotonic() - began)
        assert 0 not in codes, (codes, pair[0].text[-3000:])
    found = finished(job)
    wrong = [name for name, value in expected.items() if found[name] != value]
    figure(
        "T1b", fault=f"kill -9 of one of two processes in a save, {kind}", tries=KILLS, hits=hits,
        losses=len(wrong),
        note=f"steps lost: max {max(lost)}; until the other ends: mean "
        f"{sum(seconds) / KILLS:.1f} s, max {max(seconds):.1f} s",
    )  # fmt: skip
    assert not wrong and hits >= KILLS / 2, (wrong, hits)


@pytest.mark.slow
def test_the_first_of_two_speaks_alone_and_both_know_the_end(model, rows, tmp_path):
    """The second process waits for the first one's decision that nothing is left to do."""
    job = job_of_two(tmp_path, model, rows, 2, **SUPERVISED)
    first, second = several_processes.finished(several_processes.train(job.config))
    again, silent = several_processes.finished(several_processes.train(job.config))
    assert "devices  4 x cpu of 2 processes, mesh fsdp 4, attention: xla" in first
    assert "finished" in first and "nothing is left to do" in again and "compiling" not in again
    for text in (second, silent):
        # Gloo speaks for itself.
        assert not [line for line in text.splitlines() if not line.startswith("[Gloo]")], text
