"""The mean of the weights: how it moves, what reads it, and what is saved and exported of it."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from corl_jax import policies
from corl_jax.config import files as config_files
from corl_jax.config.readers import find_unused_options
from corl_jax.params import flatten
from corl_jax.plan import programs
from corl_jax.policies import load_policy
from corl_jax.train import __main__ as command
from corl_jax.train import check, memory, resolve
from corl_jax.train.average import choose_evaluated, keep_average, start_average
from corl_jax.train.step import TrainState
from docs.examples.bag_family import FAMILY
from tests.support import bag_runs, tiny_runs

DECAY, STEPS = 0.75, 4
CHANGES = {
    "train": {"ema_decay": DECAY, "max_steps": STEPS}, "checkpoint": {"every": 1, "keep": STEPS},
    "eval": {"every": 2}, "log": {"images_every": 2},
}  # fmt: skip


@pytest.fixture(autouse=True)
def family(monkeypatch):
    monkeypatch.setitem(policies.FAMILIES, FAMILY.name, FAMILY)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return bag_runs.write_files(tmp_path_factory.mktemp("bag"))


def run(files, output, *more, **changes):
    tree = bag_runs.options(files, output, **CHANGES | changes)
    path = tiny_runs.write_config(output.with_suffix(".yaml"), tree)
    command.main(["--config", str(path), *more])
    return output


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(policies.FAMILIES, FAMILY.name, FAMILY)
        return run(files, tmp_path_factory.mktemp("runs") / "whole")


def saved(output, step: int, part: str) -> dict[str, np.ndarray]:
    path = (output / "checkpoints" / str(step) / "state").absolute()
    return flatten(ocp.StandardCheckpointer().restore(path)["state"][part])


def evaluations(output) -> list[dict]:
    lines = [line for line in tiny_runs.metric_lines(output) if "eval/t2i/red" in line]
    return [
        {name: line[name] for name in line if name.startswith("eval/") and "second" not in name}
        for line in lines
    ]


def test_the_mean_moves_by_its_decay_in_each_step(files, whole):
    start = flatten(load_policy(files[0]).params)
    for path, before in start.items():
        expected = average = policy = np.asarray(before, np.float32)
        for step in range(1, STEPS + 1):
            policy, average = (saved(whole, step, part)[path] for part in ("params", "average"))
            expected = DECAY * expected + (1 - DECAY) * policy
            np.testing.assert_allclose(average, expected, rtol=1e-6, atol=1e-7)
        assert average.dtype == np.float32 and (average != policy).any(), path


def test_the_export_has_the_mean_and_evaluations_measure_it(files, whole, tmp_path):
    exported, average = (
        flatten(load_policy(whole / "export").params),
        saved(whole, STEPS, "average"),
    )
    for path, leaf in average.items():
        np.testing.assert_array_equal(exported[path], leaf)
    assert (
        "| weights | their running mean over steps, decay 0.75 |"
        in (whole / "export" / "README.md").read_text()
    )
    again = run(
        files, tmp_path / "again", model={"path": str(whole / "export")}, train={"max_steps": 0},
        export={"layout": "none"}, log={"images_every": 0},
    )  # fmt: skip
    assert evaluations(again)[-1] == evaluations(whole)[-1] != evaluations(whole)[0]
    # The weights themselves have other numbers.
    plain = run(files, tmp_path / "plain", train={"max_steps": STEPS})
    assert evaluations(plain)[0] == evaluations(whole)[0]
    assert evaluations(plain)[-1] != evaluations(whole)[-1]
    of_policy = saved(plain, STEPS, "params")
    for path, leaf in saved(whole, STEPS, "params").items():
        np.testing.assert_array_equal(of_policy[path], leaf)  # training itself does not see it


def test_it_resumes_to_the_bit_and_a_finished_run_stays(files, whole, tmp_path, capsys):
    halves = tmp_path / "halves"
    run(files, halves, "train.stop_after=2")
    run(files, halves)
    for part in ("params", "average"):
        expected = saved(whole, STEPS, part)
        for path, leaf in saved(halves, STEPS, part).items():
            np.testing.assert_array_equal(leaf, expected[path])
    assert evaluations(halves) == evaluations(whole)
    record = (halves / "export" / "corl_jax_export.json").read_bytes()
    capsys.readouterr()
    run(files, halves)
    assert "nothing is left to do" in "".join(capsys.readouterr())
    assert (halves / "export" / "corl_jax_export.json").read_bytes() == record


def test_another_decay_is_no_resumption(files, whole, tmp_path, capsys):
    run(files, tmp_path / "run", "train.stop_after=1")
    with pytest.raises(SystemExit) as error:
        run(files, tmp_path / "run", train={"ema_decay": 0.5, "max_steps": STEPS})
    assert error.value.code == 2 and "train.ema_decay" in capsys.readouterr().err


def test_weights_that_rest_leave_the_mean_as_it_is():
    """In the form decay x mean + (1 - decay) x weights it would drift by rounding."""
    params = {"w": jnp.array([0.1, 1 / 3, 1e-30], jnp.float32)}
    iterate = keep_average(lambda run, state, prompts, step: (state, step), 0.9, None)  # type: ignore[arg-type]
    state = TrainState(jnp.int32(0), params, None, average={"w": params["w"] + 0})
    results = []
    for step in range(3):
        state, result = iterate(None, state, None, step)  # type: ignore[arg-type]
        results.append(result)
    assert results == [0, 1, 2]
    np.testing.assert_array_equal(choose_evaluated(state)["w"], params["w"])


def test_without_a_decay_nothing_is_kept(files, tmp_path):
    tree = bag_runs.options(files, tmp_path / "run")
    config = config_files.validate(tree, "test")

    def iterate(*_):
        return None

    assert keep_average(iterate, 0.0, None) is iterate  # type: ignore[arg-type]
    assert start_average(config, {"w": jnp.ones(1)}) is None
    state = TrainState(jnp.int32(0), {"w": jnp.ones(1)}, None)
    assert choose_evaluated(state) is state.params


def test_estimates_and_plans_count_it(files, tmp_path):
    tree = bag_runs.options(files, tmp_path / "run", **CHANGES, optimizer={"name": "sgd"})
    plan = resolve.resolve_run(config_files.validate(tree, "test"))
    estimate = memory.estimate_memory(plan)
    assert estimate["mean of the weights"] == estimate["parameters, trained"] > 0
    plain = dataclasses.replace(
        plan, config=plan.config.model_copy(
            update={"train": plan.config.train.model_copy(update={"ema_decay": 0.0})}
        ),
    )  # fmt: skip
    assert "mean of the weights" not in memory.estimate_memory(plain)
    kept = [memory.add_up_memory(memory.estimate_memory(x))[0] for x in (plan, plain)]
    assert kept[0] - kept[1] == pytest.approx(estimate["mean of the weights"])
    disk = [next(iter(check.estimate_disk(x).values())) for x in (plan, plain)]
    assert disk[0] / disk[1] == pytest.approx(12 / 8)  # weights, momentum, mean
    resident = programs.make_resident_arrays(plan)[0].by_name()
    sizes = {name: programs.count_shard_bytes(part) for name, part in resident.items()}
    assert sizes["mean of the weights"] == sizes["trained parameters"] > 0


def test_a_mean_that_nothing_reads_is_warned_of(files, tmp_path):
    tree = bag_runs.options(
        files, tmp_path / "run", train={"ema_decay": 0.9}, export={"layout": "none"},
        eval={"suite": "none"}, log={"images_every": 0},
    )  # fmt: skip
    lines = find_unused_options(config_files.validate(tree, "test"))
    assert any(line.startswith("train.ema_decay: 0.9 has no effect") for line in lines)
