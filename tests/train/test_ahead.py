"""Programs of a resumed run's first step, compiled while its checkpoint is read."""

from __future__ import annotations

import json
import threading

import jax
import numpy as np
import pytest

from corl_jax.devices.compiling import compile_ahead
from corl_jax.devices.mesh import batch_sharding, make_mesh
from corl_jax.policies.janus import sampling
from corl_jax.runs.checkpoints import to_abstract
from corl_jax.train import __main__ as command
from corl_jax.train import build, command as training
from corl_jax.train.ahead import compile_meanwhile
from tests.support import tiny_runs
from tests.support.tiny_runs import write_config

pytestmark = pytest.mark.usefixtures("module_on_one_device")

COMPILE = "/jax/core/compile/"
AHEAD = {"text_program", "image_program", "train_step", "logprob_step"}


class Compilations:
    """Names of traced functions and compiled programs, of the step and of what is before it."""

    def __init__(self):
        self.before, self.step, self.is_step = set(), set(), False

    def add(self, event: str, seconds: float, fun_name: str = "", **_) -> None:
        if event.startswith(COMPILE):
            name = fun_name.removeprefix("jit(").removesuffix(")")
            (self.step if self.is_step else self.before).add(name)


@pytest.fixture
def compilations(monkeypatch):
    counter, train = Compilations(), training.train

    def count(*arguments):
        counter.is_step = True
        return train(*arguments)

    monkeypatch.setattr(training, "train", count)
    jax.monitoring.register_event_duration_secs_listener(counter.add)
    yield counter
    jax.monitoring.unregister_event_duration_listener(counter.add)


def forget_programs() -> None:
    """Makes this process one that has traced no sampler."""
    sampling.text_program.clear_cache()
    sampling.image_program.clear_cache()


CASES = {
    "two updates and a reference": {"algorithm": {"kl_coef": 0.1, "num_iterations": 2}},
    "a reference that moves": {"algorithm": {"kl_coef": 0.1, "reference_every": 1}},
    "adapters, penalty in the reward": {
        "lora": {"rank": 2}, "algorithm": {"kl_coef": 0.1, "kl_in": "reward"},
    },
    "greedy completions, pieces": {
        "algorithm": {"name": "remax"}, "rollout": {"batch_prompts": 2},
        "train": {"ema_decay": 0.5},
    },
}  # fmt: skip


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_the_first_step_after_a_resume_compiles_no_large_program(
    model, rows, tmp_path, compilations, changes, capsys
):
    tree = tiny_runs.options(model, rows, tmp_path / "run", export={"layout": "none"}, **changes)
    config = str(write_config(tmp_path / "run.yaml", tree))
    command.main(["--config", config, "train.stop_after=1"])
    assert compilations.step >= {"text_program", "image_program", "train_step"}
    large = AHEAD & compilations.step
    forget_programs()
    compilations.before, compilations.step, compilations.is_step = set(), set(), False
    capsys.readouterr()
    command.main(["--config", config])
    assert compilations.before >= large
    assert not large & compilations.step
    assert "compiles its programs itself" not in capsys.readouterr().err
