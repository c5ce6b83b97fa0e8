"""Two processes that save, fall back and stop together (T1b, T2, T7b), each with two devices.

A loop around the checkpoints and signals of the training command, without a model.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.faults.harness import ROOT

WORKER = """
import sys, time
import jax, jax.numpy as jnp, numpy as np

jax.config.update("jax_cpu_collectives_implementation", "gloo")
index, port, folder, every, steps, pause = sys.argv[1:]
index, every, steps, pause = int(index), int(every), int(steps), float(pause)
jax.distributed.initialize(f"127.0.0.1:{port}", 2, index, heartbeat_timeout_seconds=10)

from jax.sharding import NamedSharding, PartitionSpec
from corl_jax import sharding
from corl_jax.errors import Preempted, SaveError, exit_on_input_error
from corl_jax.train.checkpoint import Checkpoints, abstract_of
from corl_jax.train.preemption import Interruption

mesh = sharding.make_mesh(data=1, fsdp=4, tensor=1)
spread = NamedSharding(mesh, PartitionSpec("fsdp"))
everywhere = NamedSharding(mesh, PartitionSpec())
start = lambda: {"w": jnp.arange(4096.0).reshape(64, 64) / 7, "step": jnp.int32(0)}
state = jax.jit(start, out_shardings={"w": spread, "step": everywhere})()
advance = jax.jit(lambda s: {"w": jnp.sin(s["w"]) + s["w"], "step": s["step"] + 1})

@exit_on_input_error
def main():
    global state
    with Interruption() as interruption, Checkpoints(folder, keep=2) as checkpoints:
        if checkpoints.steps():
            found = checkpoints.newest(abstract_of(state), {"seed": 1})
            state = found.tree
            print("from", found.step, found.warnings, flush=True)
        with interruption.waits():
            for step in range(int(state["step"]) + 1, steps + 1):
                state = advance(state)
                jax.block_until_ready(state)
                stopping = interruption.reached(step)
                if step % every == 0 or stopping:
                    checkpoints.save(step, state, {"config": {"seed": 1}})
                if stopping:
                    checkpoints.wait()
                    raise Preempted(f"stopped by {interruption.reason} after step {step}")
                print("step", step, flush=True)
                time.sleep(pause)
        checkpoints.wait()
        local = [s.data.tobytes().hex() for s in state["w"].addressable_shards]
        import hashlib
        print("digest", hashlib.sha256("".join(local).encode()).hexdigest(), flush=True)

main()
"""


class Pair:
    """Both processes of one start."""

    def __init__(self, folder, every: int = 4, steps: int = 12, pause: float = 0):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        options = [str(every), str(steps), str(pause)]
        environment = os.environ | {
            "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu",
        }  # fmt: skip
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", WORKER, str(index), port, str(folder), *options], cwd=ROOT,
                env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for index in range(2)
        ]  # fmt: skip

    def reach(self, step: int) -> list[str]:
        """Reads until both have done a step."""
        seen = []
        for process in self.processes:
            while not (line := process.stdout.readline()).startswith(f"step {step}"):
                assert line, process.stderr.read()[-3000:]
                seen.append(line)
        return seen

    def end(self) -> tuple[list[int], list[str], list[str]]:
        """(exit codes, stdout, stderr)"""
        texts = [process.communicate(timeout=240) for process in self.processes]
        codes = [process.returncode for process in self.processes]
        return codes, [out for out, _ in texts], [error for _, error in texts]


def digests(outputs: list[str]) -> list[str]:
    return [out.partition("digest ")[2].strip() for out in outputs]


@pytest.mark.slow
def test_a_signal_to_one_and_a_damaged_step_for_both(tmp_path, figure):
    codes, outputs, errors = Pair(tmp_path / "calm").end()
    assert codes == [0, 0], errors
    calm = digests(outputs)
    for target in (0, 1):
        folder = tmp_path / f"to {target}"
        pair = Pair(folder, pause=0.5)
        pair.reach(2)
        began = time.monotonic()
        pair.processes[target].send_signal(signal.SIGTERM)
        if target:
            pair.processes[0].send_signal(signal.SIGTERM)
        codes, _, errors = pair.end()
        seconds = time.monotonic() - began
        assert codes == [75, 75], errors
        stops = [error.rpartition("after step ")[2].split()[0] for error in errors]
        saved = sorted(path.name for path in folder.iterdir())
        assert stops[0] == stops[1] and stops[0] in saved
        codes, outputs, errors = Pair(folder).end()
        assert codes == [0, 0] and digests(outputs) == calm, errors
        figure(
            "T2", fault=f"SIGTERM, {1 + target} of two processes", tries=1, losses=0,
            note=f"signal to exit {seconds:.1f} s",
        )  # fmt: skip
        assert f"from {stops[0]} []" in outputs[0]
    folder = tmp_path / "calm"
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


@pytest.mark.slow
def test_kills_of_one_of_two(tmp_path, figure):
    """Either one, alternately, around a save; the other ends by itself."""
    codes, outputs, errors = Pair(tmp_path / "calm", every=1, steps=60).end()
    assert codes == [0, 0], errors
    calm, chance = digests(outputs), random.Random(0)
    folder, hits, seconds = tmp_path / "killed", 0, []
    for kill in range(12):
        pair = Pair(folder, every=1, steps=60, pause=0.1)
        newest = max((int(p.name) for p in folder.glob("[0-9]*") if p.name.isdigit()), default=0)
        pair.reach(newest + 2)
        time.sleep(chance.uniform(0, 0.3))
        pair.processes[kill % 2].kill()
        hits += bool(list(folder.glob("*orbax-checkpoint-tmp*")))
        began = time.monotonic()
        codes, _, _ = pair.end()
        seconds.append(time.monotonic() - began)
        assert 0 not in codes, codes
    codes, outputs, errors = Pair(folder, every=1, steps=60).end()
    assert codes == [0, 0], errors
    lost = digests(outputs) != calm
    figure(
        "T1b", fault="kill -9 of one of two processes", tries=12, hits=hits, losses=lost,
        note=f"until the other ends: mean {sum(seconds) / 12:.1f} s, max {max(seconds):.1f} s",
    )  # fmt: skip
    assert not lost
