"""Training of images and the answers about them, from files to files."""

from __future__ import annotations

import dataclasses
import io
import types
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from corl_jax.config import files as config_files
from corl_jax.config.schema import Config, Sft
from corl_jax.data.drawn_world.held_out import HeldOutShapes
from corl_jax.data.images import decode_image
from corl_jax.data.self_questions.objects import TAGS
from corl_jax.evaluation.intervals import Rate
from corl_jax.policies.janus.family import FAMILY
from corl_jax.report.groups import read_groups
from corl_jax.train import __main__ as command
from corl_jax.train import self_sft
from corl_jax.train.resolve import find_missing_abilities
from corl_jax.train.stages import STAGES
from tests.support import metrics_page, tiny_runs
from tests.support.tiny_runs import metric_lines, write_config

pytestmark = pytest.mark.usefixtures("module_on_one_device")

COLUMNS = {"qa_problem": "question", "qa_solution": "answer"}
WEIGHTS = {"earlier_loss_weight": 0.5, "mm2t_loss_weight": 2.0}


def train(tree: dict, *arguments: str) -> Path:
    output = Path(tree["output_dir"])
    path = write_config(output.parent / f"{output.name}.yaml", tree)
    command.main(["--config", str(path), *arguments])
    return output


def options(model, rows, output: Path, **changes) -> dict:
    return tiny_runs.options(
        model, rows, output,
        **{
            "algorithm": {"tasks": "self_qa", "kl_coef": 0.1, **WEIGHTS},
            "data": {"max_prompt_length": 256},
            "train": {"prompts_per_step": 4, "max_steps": 2, "micro_batch": 2},
            "log": {"images_every": 2, "samples_every": 1},
            "checkpoint": {"every": 1},
            "eval": {"suite": "rewards", "rows": 4, "batch_prompts": 4, "every": 2},
        } | changes,
    )  # fmt: skip


REWARD = """
def short(texts, qa_problem):
    assert len(texts) == len(qa_problem) and all(isinstance(text, str) for text in texts)
    return [-float(len(text)) for text in texts]
"""


@pytest.fixture(scope="module")
def reward(tmp_path_factory) -> dict:
    path = tmp_path_factory.mktemp("rewards") / "short.py"
    path.write_text(REWARD)
    return {"use": f"{path}:short"}


@pytest.fixture(scope="module")
def tree(model, rows, reward, tmp_path_factory) -> dict:
    rewards = [reward, {"name": "t2i_pixel_mse", "weight": 0.0}]
    return options(model, rows, tmp_path_factory.mktemp("self_qa") / "run", rewards=rewards)


@pytest.fixture(scope="module")
def run(tree) -> Path:
    return train(tree)


def test_the_loss_is_that_of_both_segments_by_their_weights(run):
    lines = [line for line in metric_lines(run) if "loss" in line]
    assert len(lines) == 2
    for line in lines:
        expected = 0.5 * line["self_qa/codes/loss"] + 2.0 * line["self_qa/text/loss"]
        assert line["loss"] == pytest.approx(expected, abs=1e-6)
        for segment in ("text", "codes"):
            assert line[f"self_qa/{segment}/entropy"] > 0
            assert line[f"self_qa/{segment}/sampling/sampling_logp_difference/max"] < 1e-3
        assert line["self_qa/codes/completions/mean_length"] == 16
        assert 1 <= line["self_qa/text/completions/mean_length"] <= 8
    assert lines[1]["self_qa/text/kl"] > 0 and lines[1]["self_qa/codes/kl"] > 0


def test_a_reward_of_weight_0_is_logged_and_trains_nothing(run):
    for line in (line for line in metric_lines(run) if "loss" in line):
        assert 0 < line["self_qa/rewards/t2i_pixel_mse/mean"] < 1
        assert line["self_qa/reward"] == pytest.approx(line["self_qa/rewards/short/mean"], abs=1e-5)
    assert any("eval/self_qa/t2i_pixel_mse" in line for line in metric_lines(run))


def test_images_questions_and_answers_are_saved_and_shown(run):
    table = pandas.read_parquet(run / "samples" / "step_000002.parquet")
    assert len(table) == 8 and set(table["task"]) == {"self_qa"}
    assert table["question"].str.startswith("how many squares").all()
    assert table["prompt"].str.startswith("a red circle").all()
    pictures = {Image.open(io.BytesIO(image["bytes"])).tobytes() for image in table["image"]}
    assert len(pictures) == 8 and table["text"].map(len).sum() > 0
    notes: list[str] = []
    (groups,) = read_groups(run, notes)
    shown = [completion for group in groups.best for completion in group.completions]
    assert not notes and all(x.uri and x.text is not None for x in shown)
    assert groups.best[0].question
    page = (run / "report.html").read_text()
    assert "question: how many squares" in page and "answer: " in page
    assert len(list((run / "images").glob("step_*.png"))) == 2


def test_a_resumed_run_is_the_same(tree, run, tmp_path):
    halves = tree | {"output_dir": str(tmp_path / "halves")}
    train(halves, "train.stop_after=1")
    train(halves)
    names = ("loss", "grad_norm", "self_qa/reward", "self_qa/text/loss")
    whole, resumed = (
        [[line[name] for name in names] for line in metric_lines(folder) if "loss" in line]
        for folder in (run, tmp_path / "halves")
    )
    assert whole == resumed


@pytest.mark.parametrize(
    ("stage", "sft", "weight"),
    [("self_sft", {}, 1.0), ("self_sft_through", {}, 0.0),
     ("self_sft_through", {"t2i_weight": 0.5}, 0.5)],
)  # fmt: skip
def test_only_the_detached_stage_learns_right_images_by_default(stage, sft, weight):
    # model_construct: the weights read no other part of a config.
    config = Config.model_construct(stage=stage, sft=Sft(**sft))
    weights = STAGES[stage].loss_weights(config)
    assert weights == {"self_qa/codes": weight, "self_qa/text": 1.0}


def test_an_image_is_right_if_every_reward_with_a_weight_is_1():
    weights = {"a": 0.1, "b": 0.2, "c": 0.0}
    run: Any = types.SimpleNamespace(
        rewards={"self_qa": [types.SimpleNamespace(name=n, weight=w) for n, w in weights.items()]}
    )
    rewards = {"a": [1, 1, 1, 0.5], "b": [1, 0, np.nan, 1], "c": [0, 0, 0, 0]}
    scored: Any = types.SimpleNamespace(
        rewards={name: np.array(values, np.float32) for name, values in rewards.items()}
    )
    is_right = self_sft.find_right_images(run, "self_qa", scored)
    assert is_right.tolist() == [True, False, False, False]


def test_a_family_without_gradients_through_images_is_refused(model, records, tmp_path):
    tree = options(model, records, tmp_path / "run", stage="self_sft_through")
    config = config_files.load(write_config(tmp_path / "run.yaml", tree))
    stage, kinds = STAGES[config.stage], (("codes",), ("text",))
    program = dataclasses.replace(FAMILY.turns[kinds], passes_gradients=False)
    other = dataclasses.replace(FAMILY, turns={kinds: program})
    (problem,) = find_missing_abilities(config, stage, other)
    assert problem.endswith("choose stage self_sft, which needs none")
    assert not find_missing_abilities(config, stage, FAMILY)


def refused(capsys, call) -> str:
    with pytest.raises(SystemExit) as error:
        call()
    assert error.value.code == 2
    return capsys.readouterr().err


def test_what_cannot_teach_anything_is_refused(tree, tmp_path, capsys):
    tree = tree | {"output_dir": str(tmp_path / "run")}
    weights = ("algorithm.earlier_loss_weight=0", "algorithm.mm2t_loss_weight=0")
    message = refused(capsys, lambda: train(tree, "--check", *weights))
    assert "every loss weight of algorithm.tasks self_qa is 0" in message
    message = refused(capsys, lambda: train(tree, "--check", "rollout.group_size=1"))
    assert "expected at least 2; raise it" in message
    watched = tree | {"rewards": [{"name": "t2i_pixel_mse", "weight": 0.0}]}
    message = refused(capsys, lambda: train(watched, "--check"))
    assert "with a weight other than 0: t2i_pixel_mse is only logged" in message
    message = refused(capsys, lambda: train(tree, "stage=sft", "sft.tasks=self_qa"))
    assert "sft.tasks: found self_qa, of which no column of the data has all parts" in message
    message = refused(capsys, lambda: train(tree, "--check", "data.max_prompt_length=20"))
    assert "self_qa" in message


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> Path:
    """Rows of the drawn world, with their records of self-questioning."""
    source = HeldOutShapes(8, 7, "small")
    rows = [source[row] for row in range(8)]
    for row in rows:
        buffer = io.BytesIO()
        decode_image(row["real_image"]).save(buffer, "PNG")
        row["real_image"] = {"bytes": buffer.getvalue(), "path": None}
    path = tmp_path_factory.mktemp("records") / "drawn.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def test_the_suite_asks_about_own_blank_and_real_images(model, records, tmp_path):
    tree = options(
        model, records, tmp_path / "run",
        data={"max_prompt_length": 256, "columns": COLUMNS},
        rewards=[{"name": "self_answer"}, {"name": "shapes_checker", "weight": 0.0}],
        eval={"suite": "own_answers", "rows": 3, "batch_prompts": 2},
    )  # fmt: skip
    line, *_ = metric_lines(train(tree, "train.max_steps=0"))
    for name in ("draw", "own", "blank", "foreign"):
        assert 0 <= line[f"eval/{name}/accuracy"] <= 1
    assert line["eval/hacking_gap"] == line["eval/own/accuracy"] - line["eval/draw/accuracy"]
    assert 1 <= line["eval/own/tokens"] <= 8
    assert len(list((tmp_path / "run" / "images").glob("held_out_*.png"))) == 1


def test_the_suite_refuses_questions_of_another_kind_and_leaves_out_missing_images(
    model, records, tmp_path, capsys
):
    rows = pq.read_table(records).to_pylist()
    rows[0]["real_image"] = rows[-1]["real_image"] = None  # one of them is held out
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    tree = options(
        model, path, tmp_path / "run", data={"max_prompt_length": 256, "columns": COLUMNS},
        rewards=[{"name": "self_answer"}], train={"prompts_per_step": 4, "max_steps": 0},
        eval={"suite": "own_answers", "rows": 4, "batch_prompts": 4},
    )  # fmt: skip
    line, *_ = metric_lines(train(tree))
    for name, count in (("foreign", 3), ("own", 4)):  # of 4 rows one has no real image
        rate = Rate.of(round(line[f"eval/{name}/accuracy"] * count), count)
        assert line[f"eval/{name}/accuracy_high"] == pytest.approx(rate.high)
    data = tree["data"] | {"columns": {}}
    unnamed = tree | {"output_dir": str(tmp_path / "unnamed"), "data": data}
    message = refused(capsys, lambda: train(unnamed))
    assert ", but its tag " in message and "as {qa_problem: question}" in message


EVEN = """
def even(texts):
    return [float(row % 2 == 0) for row in range(len(texts))]
"""


def test_supervised_training_learns_true_answers_about_own_images(model, records, tmp_path):
    """And the images whose answers are right: every second one here."""
    (tmp_path / "even.py").write_text(EVEN)
    tree = options(
        model, records, tmp_path / "run", stage="self_sft", algorithm={}, sft={"t2i_weight": 0.5},
        data={"max_prompt_length": 256, "columns": COLUMNS}, eval={"suite": "none"},
        rewards=[{"use": f"{tmp_path / 'even.py'}:even"}, {"name": "self_answer", "weight": 0.0}],
        optimizer={"learning_rate": 1e-2},
    )  # fmt: skip
    del tree["algorithm"]
    lines = [line for line in metric_lines(train(tree, "train.max_steps=4")) if "loss" in line]
    for line in lines:
        assert line["self_qa/right_fraction"] == 0.5
        assert 0 <= line["self_qa/rewards/self_answer/mean"] <= 1
        by_tag = [line[name] for tag in TAGS if (name := f"self_qa/rewards/even/{tag}") in line]
        assert by_tag and set(by_tag) == {0.5}
        # The mean over answers of different lengths is near that over tokens, and not equal.
        expected = 0.5 * line["self_qa/codes/nll"] + line["self_qa/text/nll"]
        assert line["loss"] == pytest.approx(expected, rel=0.2)
    assert lines[-1]["self_qa/text/nll"] < lines[0]["self_qa/text/nll"] - 0.5
    assert not metrics_page.never(["Supervised stages on own images"], lines[0])
    table = pandas.read_parquet(tmp_path / "run" / "samples" / "step_000004.parquet")
    assert list(table["advantage"]) == [1, 0] * 4


@pytest.mark.slow
def test_the_gradient_of_an_answer_can_reach_its_image(model, records, tmp_path, capsys):
    """The head that draws is trained alone: answers change it only through the images."""
    (tmp_path / "even.py").write_text(EVEN)
    tree = options(
        model, records, tmp_path / "run", stage="self_sft_through", sft={"t2i_weight": 0.0},
        data={"max_prompt_length": 256, "columns": COLUMNS}, eval={"suite": "none"},
        rewards=[{"use": f"{tmp_path / 'even.py'}:even"}], log={"images_every": 0},
    )  # fmt: skip
    del tree["algorithm"]
    tree["train"] |= {"trainable": ["generation_head/.*"], "max_steps": 2}
    lines = [line for line in metric_lines(train(tree)) if "loss" in line]
    assert all(line["grad_norm"] > 0 for line in lines)
    redrawn = tree | {"output_dir": str(tmp_path / "redrawn")}
    others = [line for line in metric_lines(train(redrawn, "sft.redraw=true")) if "loss" in line]
    assert others[0]["loss"] != lines[0]["loss"]
    detached = tree | {"output_dir": str(tmp_path / "detached"), "stage": "self_sft"}
    without = [line for line in metric_lines(train(detached)) if "loss" in line]
    assert all(line["grad_norm"] == 0 for line in without)
    assert without[0]["loss"] == pytest.approx(lines[0]["loss"], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "algorithm", [{"name": "remax"}, {"name": "dapo", "redraws": 2, "num_iterations": 2}]
)
def test_other_algorithms_train_pairs(tree, tmp_path, algorithm):
    """A greedy pair is a greedy image with a greedy answer; redrawn groups keep both turns."""
    tree = tree | {"output_dir": str(tmp_path / "run"), "eval": {"suite": "none"}}
    tree["algorithm"] = {"tasks": "self_qa", **algorithm}
    tree["rollout"] = tree["rollout"] | {"batch_prompts": 2}
    lines = [line for line in metric_lines(train(tree)) if "loss" in line]
    assert len(lines) == 2 and all(np.isfinite(line["loss"]) for line in lines)
    for segment in ("codes", "text"):
        assert lines[0][f"self_qa/{segment}/sampling/sampling_logp_difference/max"] < 1e-3
