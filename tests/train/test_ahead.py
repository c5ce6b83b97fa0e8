"""Programs of a resumed run's first step, compiled while its checkpoint is read."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from corl_jax.config import files as config_files
from corl_jax.devices.compiling import compile_ahead
from corl_jax.devices.mesh import batch_sharding, make_mesh
from corl_jax.policies.janus import sampling
from corl_jax.runs.checkpoints import to_abstract
from corl_jax.train import __main__ as command
from corl_jax.train import command as training
from corl_jax.train import resolve, states
from corl_jax.train.ahead import compile_meanwhile
from corl_jax.train.reference import use_whole_state
from tests.support import tiny_runs
from tests.support.tiny_runs import write_config

pytestmark = pytest.mark.usefixtures("module_on_one_device")

COMPILE = "/jax/core/compile/"
LARGE = {"text_program", "image_program", "train_step", "logprob_step"}


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
    "a reference that moves": {
        "algorithm": {"kl_coef": 0.1, "reference_every": 1, "reference_decay": 0.5},
    },
    "adapters, penalty in the reward": {
        "lora": {"rank": 2}, "algorithm": {"kl_coef": 0.1, "kl_in": "reward"},
    },
    "greedy completions, pieces, mean of the weights": {
        "algorithm": {"name": "remax"}, "rollout": {"batch_prompts": 2},
        "train": {"ema_decay": 0.5},
    },
}  # fmt: skip
FIXED, CHEAPEST, *_ = CASES


@pytest.mark.parametrize(
    "name",
    [x if x == CHEAPEST else pytest.param(x, marks=pytest.mark.slow) for x in CASES],
)
def test_the_first_step_after_a_resume_compiles_no_large_program(
    model, rows, tmp_path, compilations, name, capsys
):
    changes = {"export": {"layout": "none"}, **CASES[name]}
    tree = tiny_runs.options(model, rows, tmp_path / "run", **changes)
    config = str(write_config(tmp_path / "run.yaml", tree))
    forget_programs()
    command.main(["--config", config, "train.stop_after=1"])
    large = LARGE & compilations.step
    assert large >= {"text_program", "image_program", "train_step"}
    forget_programs()
    compilations.before, compilations.step, compilations.is_step = set(), set(), False
    capsys.readouterr()
    command.main(["--config", config])
    assert compilations.before >= large
    assert not large & compilations.step
    assert "compiles its programs itself" not in capsys.readouterr().err


@pytest.mark.parametrize("name", CASES)
def test_what_a_checkpoint_has_is_described_and_not_loaded(
    model, rows, tmp_path, monkeypatch, name
):
    tree = tiny_runs.options(model, rows, tmp_path / "run", **CASES[name])
    config = config_files.load(write_config(tmp_path / "run.yaml", tree), [])
    plan, load, loads = resolve.resolve_run(config), states.load_parts, []
    monkeypatch.setattr(states, "load_parts", lambda plan: loads.append(plan) or load(plan))
    with jax.set_mesh(plan.mesh):
        fresh = states.prepare_start(plan, from_checkpoint=False)
        assert len(loads) == 1
        described = states.prepare_start(plan, from_checkpoint=True)
        assert len(loads) == 1 + (name == FIXED)  # its reference is made of them
        with use_whole_state(fresh.moving, fresh.state) as whole:
            expected = to_abstract(whole)
    assert jax.tree.structure(described.state) == jax.tree.structure(expected)
    for leaf, right in zip(*map(jax.tree.leaves, (described.state, expected)), strict=True):
        assert (leaf.shape, leaf.dtype) == (right.shape, right.dtype)
        assert leaf.sharding.is_equivalent_to(right.sharding, len(right.shape))
    jax.tree.map(np.testing.assert_array_equal, described.frozen, fresh.frozen)
    assert (described.reference is None) == (fresh.reference is None)
    if fresh.reference is not None:
        with described.reference.use() as reference, fresh.reference.use() as right:
            jax.tree.map(np.testing.assert_array_equal, reference, right)


# ---- the thread


def make_run() -> SimpleNamespace:
    loader = SimpleNamespace(batch=lambda step: step)
    return SimpleNamespace(mesh=make_mesh(devices=jax.devices()[:1]), steps=3, train_loader=loader)


def test_a_failure_is_told_and_left_to_the_step(capsys):
    def fail(run, state, prompts, step):
        yield
        raise RuntimeError("no room")

    with compile_meanwhile(fail, make_run(), None) as begin:
        begin(1)
    assert "the next step compiles its programs itself (RuntimeError: no room)" in (
        capsys.readouterr().err
    )


def test_an_error_waits_for_one_program_alone():
    began, may_end, steps = threading.Event(), threading.Event(), []

    def compile_two(run, state, prompts, step):
        began.set()
        may_end.wait(30)
        yield steps.append(step)
        yield steps.append("the second program")

    with pytest.raises(KeyError), compile_meanwhile(compile_two, make_run(), None) as begin:
        begin(2)
        begin(1)  # an older checkpoint, because the newest is damaged
        began.wait(30)
        threading.Timer(0.2, may_end.set).start()
        raise KeyError
    assert steps == [2]


def test_nothing_is_compiled_without_a_next_step_or_beside_other_processes(monkeypatch):
    steps = []

    def compile_step(run, state, prompts, step):
        yield steps.append(step)

    with compile_meanwhile(compile_step, make_run(), None) as begin:
        begin(3)  # all are done
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with compile_meanwhile(compile_step, make_run(), None) as begin:
        begin(1)
    assert not steps


def test_a_call_finds_what_was_compiled_for_shapes(compilations):
    @jax.jit
    def double_rows(x: jax.Array, factor: jax.Array) -> dict[str, jax.Array]:
        return {"rows": 2 * x * factor, "sum": x.sum()}

    mesh = make_mesh(devices=jax.devices()[:1])
    shape = jax.ShapeDtypeStruct((4, 3), jnp.bfloat16, sharding=batch_sharding(mesh))
    with jax.set_mesh(mesh):
        zeros = compile_ahead(double_rows, shape, jnp.float32(2))
        assert "double_rows" in compilations.before
        compilations.before.clear()
        x = jax.device_put(jnp.ones((4, 3), jnp.bfloat16), batch_sharding(mesh))
        results = double_rows(x, jnp.float32(2))
    assert "double_rows" not in compilations.before
    assert results["rows"].sum() == 48 and not zeros["rows"].any()
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), zeros) == jax.tree.map(
        lambda x: (x.shape, x.dtype, x.sharding), results
    )
