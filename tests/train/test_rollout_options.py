"""Runs with options of the rollout and the reference: short runs of a tiny model, to the end."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from corl_jax.config import files as config_files
from corl_jax.params import leaf_paths
from corl_jax.plan import programs
from corl_jax.tasks import TEXT, choose_tasks_of_step
from corl_jax.train import __main__ as command
from corl_jax.train import alarms, memory, reference, resolve
from corl_jax.train.kl_penalty import KlPenalty, measure_penalties
from corl_jax.train.step import TaskBatch
from corl_jax.types import EncodedPrompts, Segment
from tests.support import tiny_runs
from tests.support.tiny_runs import metric_lines, write_config

pytestmark = pytest.mark.usefixtures("module_on_one_device")


@pytest.fixture
def options(model, rows, tmp_path):
    return functools.partial(tiny_runs.options, model, rows, tmp_path / "run")


def train(tree: dict, *arguments: str) -> Path:
    """Runs the command on a config; the run directory."""
    output = Path(tree["output_dir"])
    output.parent.mkdir(parents=True, exist_ok=True)
    path = write_config(output.parent / f"{output.name}.yaml", tree)
    command.main(["--config", str(path), *arguments])
    return output


def name_tasks(line: dict) -> set[str]:
    """The tasks whose training has metrics in a line."""
    return {name.partition("/")[0] for name in line} & {"t2i", "mm2t"}


# ---- tasks that take turns


def test_the_task_changes_every_n_steps():
    tasks = ("t2i", "mm2t")
    steps = [choose_tasks_of_step(tasks, 2, step) for step in range(6)]
    assert steps == [("t2i",), ("t2i",), ("mm2t",), ("mm2t",), ("t2i",), ("t2i",)]
    assert choose_tasks_of_step(tasks, 0, 5) == tasks


def test_tasks_take_turns_in_a_run_that_resumes(options, tmp_path):
    """Steps 1 to 4 train images, texts, images, texts, also if the run stops after step 3."""
    tree = options(
        algorithm={"alternate_every": 1, "num_iterations": 2, "kl_coef": 0.1},
        train={"max_steps": 4}, log={"samples_every": 1, "images_every": 2},
        export={"layout": "none"}, checkpoint={"every": 4},
    )  # fmt: skip
    once = train(tree)
    twice = tree | {"output_dir": str(tmp_path / "twice")}
    train(twice, "train.stop_after=3")
    train(twice)
    lines = metric_lines(once)
    assert [name_tasks(line) for line in lines] == [{"t2i"}, {"mm2t"}] * 2
    assert [line["reward"] for line in lines] == [
        line[f"{task}/reward"] for line, task in zip(lines, ["t2i", "mm2t"] * 2, strict=True)
    ]
    assert all(("perf/images_per_second" in line) == ("t2i/kl" in line) for line in lines)
    assert all(line["alarm/kl"] == 0 for line in lines)
    clocks = ("second", "step_time")
    assert [
        {name: x for name, x in line.items() if not any(clock in name for clock in clocks)}
        for line in lines
    ] == [
        {name: x for name, x in line.items() if not any(clock in name for clock in clocks)}
        for line in metric_lines(tmp_path / "twice")
    ]
    assert len(list((once / "samples").iterdir())) == 4
    assert json.loads((once / "summary.json").read_text())["optimizer_steps"] == 8
    assert "mm2t" in (once / "report.html").read_text()


def test_a_log_that_shows_one_task_alone_is_a_warning(options):
    def warn(every: int, period: int) -> list[str]:
        tree = options(algorithm={"alternate_every": period}, log={"every": every})
        return resolve.find_unlogged_tasks(config_files.validate(tree, "test"))

    (line,) = warn(every=2, period=1)
    assert line.startswith("log.every: with 2 and algorithm.alternate_every 1 no step of t2i ")
    assert not warn(every=3, period=3) and not warn(every=2, period=2) and not warn(1, 1)
    assert not warn(every=2, period=0)


def test_alarms_compare_each_task_that_takes_turns_with_itself():
    options = alarms.schema.Guards(zero_spread=0.5)
    guards = alarms.make_guards(options, ("t2i", "mm2t"))
    printed = []
    for step in range(1, 21):
        task, share = ("t2i", 1.0) if step % 2 else ("mm2t", 0.0)
        values = {"frac_reward_zero_std": share, f"{task}/frac_reward_zero_std": share}
        printed += guards.check_logged(step, values | {f"{task}/reward": share})[1]
    (line,) = printed
    assert "t2i/frac_reward_zero_std 1, above 0.5" in line and "step 19" in line
    # The images' reward is higher than the texts': the mean of both has not risen.
    assert guards.check_evaluation(20, {"eval/x": (0.5, 0.01)})[1] == []
    guards.check_logged(21, {"t2i/reward": 1.0})
    assert guards.check_evaluation(21, {"eval/x": (0.1, 0.01)})[1] == []
    for step, task, reward in ((22, "mm2t", 0.5), (23, "t2i", 1.0)):
        guards.check_logged(step, {f"{task}/reward": reward})
    assert "0.75 after 0.5" in guards.check_evaluation(23, {"eval/x": (0.1, 0.01)})[1][0]


# ---- a reference that follows the policy


def test_the_reference_is_averaged_or_replaced():
    """0.75 * 4 + 0.25 * 8 = 5."""
    mean = reference.average({"w": jnp.float32(4)}, {"w": jnp.bfloat16(8)}, 0.75)["w"]
    assert mean == 5 and mean.dtype == jnp.float32


def moving_options(decay: float) -> dict:
    algorithm = {
        "tasks": "t2i", "kl_coef": 0.1, "reference_every": 2, "reference_decay": decay,
    }  # fmt: skip
    return {
        "algorithm": algorithm, "train": {"max_steps": 5}, "export": {"layout": "none"},
        "checkpoint": {"every": 5}, "rewards": [{"name": "t2i_pixel_mse"}],
        "optimizer": {"learning_rate": 0.01},
    }  # fmt: skip


def saved_reference(run: Path, step: int) -> dict[str, np.ndarray]:
    state = ocp.StandardCheckpointer().restore((run / f"checkpoints/{step}/state").absolute())
    return {path: np.asarray(leaf) for path, leaf in leaf_paths(state["state"]["reference"])}


@pytest.mark.parametrize(
    ("decay", "changes"),
    [(0.0, {}), (0.5, {"lora": {"rank": 2}})],
    ids=["replaced", "averaged adapters"],
)
def test_a_moving_reference_resumes_bit_by_bit(options, tmp_path, decay, changes):
    """Also if it lies in host memory before or after the stop."""
    tree = options(**moving_options(decay), **changes)
    once = train(tree)
    twice = tree | {"output_dir": str(tmp_path / "twice")}
    train(twice, "train.stop_after=3", "algorithm.reference=host")
    train(twice)
    lines = metric_lines(once)
    kl = [line["t2i/kl"] for line in lines]
    # Moved after steps 2 and 4. A replaced reference is the policy at steps 3 and 5. Two programs
    # compute the log-probs, so they differ by rounding.
    is_near = [x < 1e-9 for x in kl]
    assert is_near == [True, False, decay == 0, False, decay == 0], kl
    assert kl == [line["t2i/kl"] for line in metric_lines(tmp_path / "twice")]
    saved = saved_reference(once, 5)
    for path, leaf in saved_reference(tmp_path / "twice", 5).items():
        np.testing.assert_array_equal(leaf, saved[path], strict=True)
    assert all("lora" in path for path in saved) == bool(changes)


def test_a_fixed_reference_is_not_saved(options):
    tree = options(**moving_options(0.0))
    tree["algorithm"]["reference_every"] = 0
    run = train(tree, "train.max_steps=1")
    state = ocp.StandardCheckpointer().restore((run / "checkpoints/1/state").absolute())
    assert "reference" not in state["state"]


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({"kl_coef": 0.0}, 0),
        ({}, 2),
        ({"reference_every": 3}, 2),
        ({"reference_every": 3, "reference_decay": 0.9}, 4),
    ],
)
def test_memory_of_a_reference(options, changes, size):
    """A mean of policies is kept in float32, a copy of one in the compute dtype."""
    tree = options(
        model={"dtype": "bfloat16"}, algorithm={"kl_coef": 0.1} | changes, optimizer={"name": "sgd"}
    )
    outline = resolve.resolve_run(config_files.validate(tree, "test"))
    estimate = memory.estimate_memory(outline)
    assert estimate["reference"] == pytest.approx(estimate["optimizer"] * size / 4)
    resident = programs.make_resident_arrays(outline)[0]
    shapes = jax.tree.leaves(resident.reference)
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in shapes) / 2**30 == pytest.approx(
        estimate["reference"], rel=0.02
    )


# ---- the KL penalty in the reward


def test_penalties_are_sums_over_kept_tokens():
    """k1 of row 0: (0.5 - 0.25) + (1 - 2) = -0.75; row 1 has one token: 0.5."""
    policy = jnp.array([[0.5, 1.0, -jnp.inf], [0.0, 7.0, 7.0]])
    other = jnp.array([[0.25, 2.0, -jnp.inf], [-0.5, 0.0, 0.0]])
    mask = jnp.array([[True, True, False], [True, False, False]])
    part = TaskBatch(
        EncodedPrompts(np.zeros((1, 1)), np.ones((1, 1), bool)),
        (Segment(TEXT, np.zeros((2, 3), np.int32), mask),),
        old_logprobs=(policy,), ref_logprobs=(other,),
    )  # fmt: skip
    penalties, stats = measure_penalties({"mm2t": part}, KlPenalty(2.0, "k1"))
    assert penalties["mm2t"].tolist() == [-1.5, 1.0]
    assert stats["mm2t/kl_penalty"] == -0.25
    k3 = [np.exp(-d) - 1 + d for d in (0.25, -1.0, 0.5)]
    np.testing.assert_allclose(stats["mm2t/kl"], np.mean(k3), rtol=1e-6)
    squares, _ = measure_penalties({"mm2t": part}, KlPenalty(2.0, "k2"))
    np.testing.assert_allclose(squares["mm2t"], [0.0625 + 1, 0.25])


@pytest.mark.parametrize("iterations", [1, 2])
def test_a_penalty_in_the_reward(options, iterations):
    """The first step begins at the reference; later ones are compared with the penalty."""
    algorithm = {"kl_coef": 10.0, "kl_in": "reward", "kl_estimator": "k1"}
    tree = options(
        algorithm=algorithm | {"num_iterations": iterations}, export={"layout": "none"},
        optimizer={"learning_rate": 0.01}, guards={"kl": 1e-9, "fatal": []},
    )  # fmt: skip
    first, second = metric_lines(train(tree))
    for task in ("t2i", "mm2t"):
        assert first[f"{task}/kl"] == first[f"{task}/kl_penalty"] == 0
        assert second[f"{task}/kl"] > 0 and second[f"{task}/kl_penalty"] != 0
    assert (first["alarm/kl"], second["alarm/kl"]) == (0, 1)
