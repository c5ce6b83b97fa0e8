"""Runs with options of the rollout and the reference: short runs of a tiny model, to the end."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from corl_jax.algorithms.advantages import AdvantageOptions
from corl_jax.config import files as config_files
from corl_jax.devices.batches import put_rows
from corl_jax.devices.mesh import make_mesh
from corl_jax.params import leaf_paths
from corl_jax.plan import programs
from corl_jax.policies.choices import Choice
from corl_jax.rewards.samples import Samples
from corl_jax.tasks import TEXT, choose_tasks_of_step
from corl_jax.train import __main__ as command
from corl_jax.train import alarms, memory, redraw, reference, reports, resolve
from corl_jax.train import check as run_check
from corl_jax.train.drawn import Drawn, Scored
from corl_jax.train.greedy import separate_greedy
from corl_jax.train.kl_penalty import KlPenalty, measure_penalties
from corl_jax.train.rollout_metrics import count_tokens
from corl_jax.train.step import TaskBatch
from corl_jax.types import EncodedPrompts, Rollout, Segment
from tests.support import tiny_runs
from tests.support.tiny_models import tiny_parquet, tiny_row
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
    tree["rewards"].append({"name": "soft_overlong", "options": {"buffer": 2}})
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
    # An answer that was cut has -1, and no other one of 6 tokens or fewer has a penalty.
    for line in lines[1::2]:
        cut = line["mm2t/completions/clipped_ratio"]
        assert -1 <= line["mm2t/rewards/soft_overlong/mean"] <= -cut
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


@pytest.mark.parametrize(
    ("every", "period", "shown"),
    [
        (4, 0, [4, 8, 10]), (4, 1, [4, 5, 8, 9, 10]), (4, 3, [4, 7, 8, 10]),
        (1, 1, range(1, 11)), (0, 1, []),
    ],
)  # fmt: skip
def test_completions_of_each_task_are_shown(every, period, shown):
    run = SimpleNamespace(steps=10, tasks=("t2i", "mm2t"), alternate_every=period)
    due = [step for step in range(1, 11) if reports.are_completions_due(every, run, step)]  # type: ignore[arg-type]
    assert due == [*shown]


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
    mean = reference.average_params({"w": jnp.float32(4)}, {"w": jnp.bfloat16(8)}, 0.75)["w"]
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
    [pytest.param(0.0, {}, marks=pytest.mark.slow), (0.5, {"lora": {"rank": 2}})],
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
    # A checkpoint of SGD with momentum has 8 bytes a parameter; only a reference that moves is
    # saved beside them.
    checkpoints, *_ = run_check.estimate_disk(outline).values()
    added = size if "reference_every" in changes else 0
    assert checkpoints == pytest.approx(3 * estimate["optimizer"] * (8 + added) / 4)
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


# ---- greedy baselines


def test_the_last_row_of_a_group_is_greedy():
    logits = jnp.log(jnp.array([[0.1, 0.6, 0.3]] * 6))
    keys = jax.random.split(jax.random.key(1), 6)
    plain = Choice(1.0, False).draw(keys, jnp.int32(0), logits)
    mixed = Choice(1.0, False, greedy_last=3).draw(keys, jnp.int32(0), logits)
    assert mixed[jnp.array([2, 5])].tolist() == [1, 1]
    sampled = jnp.array([0, 1, 3, 4])
    np.testing.assert_array_equal(mixed[sampled], plain[sampled])
    assert set(plain.tolist()) != {1}


def make_rollout(values: np.ndarray, prompts: int, width: int = 4) -> Rollout:
    """A rollout whose prompts are numbers from 10 on."""
    ids = np.arange(10, 10 + prompts * width, dtype=np.int32).reshape(prompts, width)
    values = jnp.asarray(values)
    segment = Segment(TEXT, values, values > 0, values.astype(jnp.float32))
    return Rollout(EncodedPrompts(jnp.asarray(ids), jnp.ones(ids.shape, bool)), (segment,))


def make_drawn(values: np.ndarray, prompts: int, rewards: list[float], width: int = 4) -> Drawn:
    texts = [str(row) for row in values[:, 0]]
    samples = Samples({"row": texts}, texts=texts)
    scored = Scored(
        samples, {"r": np.array(rewards, np.float32)},
        {"r": {"seconds": 1.0, "failures": 3.0, "failed": 1.0}}, len(texts),
    )  # fmt: skip
    rollouts = {"mm2t": make_rollout(values, prompts, width)}
    return Drawn(rollouts, {"mm2t": scored}, count_tokens(rollouts))


def test_greedy_completions_are_separated():
    values = np.arange(1, 13).reshape(6, 2)
    drawn, baselines = separate_greedy(make_drawn(values, 2, [0, 1, 2, 3, 4, 5]), 3)
    kept = [0, 1, 3, 4]
    np.testing.assert_array_equal(drawn.rollouts["mm2t"].segments[0].values, values[kept])
    assert drawn.rollouts["mm2t"].group_size == 2
    part = drawn.scored["mm2t"]
    assert part.rewards["r"].tolist() == kept and baselines["mm2t"]["r"].tolist() == [2, 5]
    assert part.samples.texts == part.samples.columns["row"] == ["1", "3", "7", "9"]
    # The greedy ones have been sampled too: 12 tokens, and prompts of 4 for each of 6 completions.
    assert drawn.tokens.texts["mm2t"] == 12 and drawn.tokens.num_tokens == 12 + 24


# ---- groups that are drawn again


def redrawing_run(devices: int = 1, **changes) -> SimpleNamespace:
    mesh = make_mesh(data=devices, devices=jax.devices()[:devices])
    weights = (("mm2t", (1.0,)), ("t2i", (1.0,)))
    options = AdvantageOptions(weights, (("mm2t", 0.5), ("t2i", 1.0)), "separate", 2, "group")
    loader = SimpleNamespace(batch_size=4, batch=lambda number: number)
    return SimpleNamespace(**{
        "mesh": mesh, "advantage_options": options, "completions_per_prompt": 2, "redraws": 2,
        "train_loader": loader,
    } | changes)  # fmt: skip


def test_a_group_is_flat_if_no_compared_reward_differs():
    """Groups of 2: texts differ in groups 1 and 3, images in groups 2 and 3.

    In group 3 the weighted sums are 1 + 0.5 * 0 and 0.5 + 0.5 * 1: equal. In group 4 none applies.
    """
    texts = [1, 1, 0, 1, 1, 1, 0, 1, np.nan, np.nan]
    images = [2, 2, 2, 2, 0, 1, 1, 0.5, np.nan, np.nan]
    scored = {
        task: make_drawn(np.ones((10, 1), int), 5, rewards).scored["mm2t"]
        for task, rewards in (("mm2t", texts), ("t2i", images))
    }
    drawn = SimpleNamespace(scored=scored)
    run = redrawing_run()
    assert redraw.find_flat_groups(run, drawn).tolist() == [True, False, False, False, True]
    joint = dataclasses.replace(run.advantage_options, mode="unified_reward")
    run.advantage_options = joint
    assert redraw.find_flat_groups(run, drawn).tolist() == [True, False, False, True, True]


@pytest.mark.parametrize("devices", [1, 2])
def test_flat_groups_are_replaced_in_their_place(devices):
    """Of the flat groups 0, 2 and 3 the first batch replaces 2, the second 0; 3 stays."""
    values = np.arange(1, 17).reshape(8, 2)
    tries = [
        make_drawn(100 + values, 4, [5, 5, 0, 1, 0, 1, 2, 2], width=6),
        make_drawn(200 + values, 4, [0, 1, 0, 1, 0, 1, 2, 2]),
    ]
    run = redrawing_run(devices)
    numbers = []

    def draw(prompts):
        numbers.append(prompts)
        return place(run, tries[len(numbers) - 1])

    first = place(run, make_drawn(values, 4, [1, 1, 0, 2, 1, 1, 3, 3]))
    drawn, stats = redraw.replace_flat_groups(run, first, draw, step=5)
    assert stats == {
        "redraw/batches": 2, "redraw/replaced": 2, "redraw/zero_spread_left": 0.25
    }  # fmt: skip
    start = (1 << 31) // 4 + 5 * 2
    assert numbers == [start, start + 1]
    rollout = drawn.rollouts["mm2t"]
    expected = np.concatenate([200 + values[:2], values[2:4], 100 + values[4:6], values[6:]])
    np.testing.assert_array_equal(rollout.segments[0].values, expected)
    ids = np.asarray(rollout.prompts.input_ids)
    assert ids.shape == (4, 6) and ids[2].tolist() == [22, 23, 24, 25, 26, 27]
    assert ids[1].tolist() == [14, 14, 14, 15, 16, 17]
    assert rollout.prompts.attention_mask[1].tolist() == [False] * 2 + [True] * 4
    part = drawn.scored["mm2t"]
    assert part.rewards["r"].tolist() == [0, 1, 0, 2, 0, 1, 3, 3]
    assert part.samples.texts == part.samples.columns["row"] == [str(x) for x in expected[:, 0]]
    assert part.costs["r"] == {"seconds": 3.0, "failures": 3.0, "failed": 3.0}
    assert part.num_scored == 24
    # 16 tokens in each batch; prompts of 4, 6 and 4 tokens for 8 completions.
    assert drawn.tokens.num_tokens == 3 * 16 + 8 * (4 + 6 + 4)
    assert rollout.segments[0].values.sharding.num_devices == devices


def place(run: SimpleNamespace, drawn: Drawn) -> Drawn:
    return dataclasses.replace(drawn, rollouts=put_rows(run.mesh, drawn.rollouts))


def test_nothing_is_drawn_again_if_all_groups_differ():
    drawn = make_drawn(np.ones((4, 1), int), 2, [0, 1, 1, 0])
    same, stats = redraw.replace_flat_groups(redrawing_run(), drawn, None, step=0)  # type: ignore[arg-type]
    assert same is drawn and stats["redraw/batches"] == 0


JUDGE = '''
def judge(texts, prompt):
    """Equal within the groups of half of the prompts."""
    return [float(len(text)) if len(name) % 2 else 0.5 for text, name in zip(texts, prompt)]
'''


@pytest.fixture(scope="module")
def redrawn_runs(model, tmp_path_factory):
    """The metrics of a run with greedy baselines and redrawn groups, on one and on two devices."""
    folder = tmp_path_factory.mktemp("redrawn")
    file = folder / "judge.py"
    file.write_text(JUDGE)
    names = {True: "two circles", False: "a circle"}
    rows = tiny_parquet(
        folder / "rows.parquet", [tiny_row(i) | {"prompt": names[i % 2 == 0]} for i in range(16)]
    )

    def run(devices: int, *arguments: str, name: str = "") -> list[dict]:
        make = functools.partial(make_mesh, devices=jax.devices()[:devices])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(resolve, "make_mesh", make)
            output = folder / f"{name}{devices}"
            tree = tiny_runs.options(
                model, rows, output, algorithm={"name": "remax", "redraws": 2, "tasks": "mm2t"},
                rewards=[{"use": f"{file}:judge"}], export={"layout": "none"},
                mesh={"data": devices}, train={"max_steps": 3}, log={"samples_every": 1},
            )  # fmt: skip
            return metric_lines(train(tree, *arguments))

    return run


@pytest.mark.slow
def test_greedy_rows_and_redrawn_groups_do_not_depend_on_the_devices(redrawn_runs):
    one, two = redrawn_runs(1), redrawn_runs(2)
    assert len(one) == 3
    for line, other in zip(one, two, strict=True):
        shown = [name for name in line if name.startswith(("mm2t/", "redraw/", "reward", "num_"))]
        for name in shown:
            if "seconds" not in name:
                assert line[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), name
    assert any(line["redraw/replaced"] > 0 for line in one)
    assert all(0 < line["redraw/batches"] <= 2 for line in one)
    assert any(line["mm2t/greedy_reward"] != line["mm2t/reward"] for line in one)
    again = [redrawn_runs(1, "train.stop_after=1", name="resumed"), redrawn_runs(1, name="resumed")]
    names = ("loss", "mm2t/greedy_reward", "num_tokens", "redraw/replaced")
    for name in names:
        assert [line[name] for line in one] == [line[name] for line in again[-1]]


def test_the_plan_counts_what_the_options_add(options):
    """Tasks in turn have programs of their own; a penalty in the reward scores the policy too."""

    def list_programs(**algorithm) -> list[tuple[str, float]]:
        config = config_files.validate(options(algorithm=algorithm), "test")
        outline = resolve.resolve_run(config)
        lengths = memory.measure_prompt_lengths(outline)
        made = programs.make_programs(outline, lengths)[1]
        return [(x.name, x.calls) for x in made if x.name.startswith(("log", "up", "sample t2i"))]

    assert list_programs(alternate_every=3, kl_coef=0.1) == [
        ("sample t2i", 0.5), ("log-probs t2i", 0.5), ("update t2i", 0.5),
        ("log-probs mm2t", 0.5), ("update mm2t", 0.5),
    ]  # fmt: skip
    assert list_programs() == [("sample t2i", 1), ("update", 1)]
    penalised = list_programs(kl_coef=0.1, kl_in="reward")
    assert penalised == [("sample t2i", 1), ("log-probs", 2), ("update", 1)]
