"""What TensorBoard shows of an iteration beside its curves."""

from __future__ import annotations

import io
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from corl_jax.rewards.samples import Samples
from corl_jax.runs import pictures
from corl_jax.runs.directory import RunDir
from corl_jax.runs.log import RunLog
from corl_jax.train import dashboard, reports, showing
from corl_jax.train.showing import Completions

NAN = float("nan")


def test_the_layout_has_the_metrics_of_the_run():
    names = {
        "step", "reward", "t2i/reward", "mm2t/reward", "t2i/rewards/shapes_checker/mean",
        "grad_norm", "mm2t/completions/mean_length", "mm2t/completions/min_length",
        "mm2t/completions/max_length", "t2i/completions/mean_length", "eval/draw/accuracy",
        "eval/draw/accuracy_low", "eval/draw/accuracy_high", "eval/draw/colors",
        "eval/draw/colors_low", "eval/draw/colors_high", "eval/seconds",
    }  # fmt: skip
    layout = dashboard.make_layout(names)
    assert list(layout) == ["Rewards", "Evaluation", "Health"]
    assert layout["Rewards"]["reward"].names == ("^mm2t/reward$", "^reward$", "^t2i/reward$")
    assert list(layout["Rewards"]) == ["reward", "rewards of t2i"]
    assert list(layout["Evaluation"]) == ["draw/accuracy", "draw/colors"]
    chart = layout["Evaluation"]["draw/accuracy"]
    assert chart.kind == "Margin" and chart.names == (
        "eval/draw/accuracy", "intervals/draw/accuracy_low", "intervals/draw/accuracy_high",
    )  # fmt: skip
    # An image always has the same length, so that there is no range of it.
    assert list(layout["Health"]) == [
        "gradient norm", "length of mm2t, shortest to longest",
    ]  # fmt: skip


def test_every_hparam_is_an_option():
    from corl_jax.config import files

    tree = files.validate(
        {"output_dir": "r", "model": {"path": "m"}, "data": {"path": "d"},
         "rewards": [{"name": "format"}]}, "test",
    ).model_dump(mode="json")  # fmt: skip
    tree["rollout"]["cfg_scale"] = 5.0  # the model's own, which a run fills in
    values = [dashboard.find_option(tree, key) for key in dashboard.HPARAMS]
    assert all(isinstance(value, str | int | float | bool) for value in values)


@pytest.fixture
def answers():
    """Three groups of two: equal rewards, different ones, none."""
    images = [Image.new("RGB", (8, 8), color) for color in ("red", "blue", "lime")]
    columns = {
        "qa_problem": ["equal?"] * 2 + ["different?"] * 2 + ["none?"] * 2,
        "qa_solution": ["1"] * 6,
        "real_image": [image for image in images for _ in range(2)],
    }
    return Completions(
        "mm2t", Samples(columns, texts=["a", "b", "wrong", "right", "e", "f"]),
        {"format": np.array([1, 1, 0, 1, NAN, NAN])}, np.array([1, 1, 0, 1, NAN, NAN]),
        np.array([0, 0, -0.7, 0.7, 0, 0]), np.array([3, 3, 5, 4, 1, 1]), 2,
    )  # fmt: skip


def test_groups_that_differ_come_first_and_those_without_a_reward_never(answers):
    assert answers.choose_groups(8) == [(3, 2), (0, 0)]
    assert answers.choose_groups(1) == [(3, 2)]


def test_answers_are_shown_with_the_image_of_their_question(answers):
    page = showing.draw_answers(answers, answers.choose_groups(1))
    blue, red = [(page == color).all(-1).sum() for color in ((0, 0, 255), (255, 0, 0))]
    assert blue == 128 * 128 and red == 0
    # The head of the better answer is green, that of the worse one red.
    good, bad = [np.argwhere((page == c).all(-1)) for c in (pictures.GOOD, pictures.BAD)]
    assert len(good) and len(bad) and good[:, 0].mean() < bad[:, 0].mean()
    table = showing.tabulate_answers(answers).splitlines()
    assert table[2] == (
        "| different? | 1 | right | reward 1<br>format 1<br>advantage 0.7<br>tokens 4 |"
    )
    assert table[3].startswith("|  | 1 | wrong | reward 0<br>")


def test_samples_that_cannot_be_written_warn_once(answers, tmp_path, monkeypatch):
    part = answers
    monkeypatch.setattr(showing, "collect_completions", lambda *_: part)
    run = SimpleNamespace(steps=9, tasks=("t2i", "mm2t"), alternate_every=0)
    config = SimpleNamespace(log=SimpleNamespace(samples_every=1, images_every=0))
    stream, directory = io.StringIO(), RunDir(tmp_path)
    iteration = SimpleNamespace(samples={"mm2t": part.samples})
    with RunLog(directory, stream=stream) as log:
        outputs = SimpleNamespace(log=log, primary=True, directory=directory)
        part.samples.columns["qa_solution"][0] = {"not": "a text"}
        for step in (1, 2):
            assert showing.show_iteration(config, run, outputs, step, iteration)
        assert not [*directory.samples.iterdir()]
        part.samples.columns["qa_solution"][0] = "1"
        showing.show_iteration(config, run, outputs, 3, iteration)
    warning, again = stream.getvalue().splitlines()
    assert warning.startswith("warning: samples: cannot be written (column solution: ")
    assert again == "samples: can be written again"
    assert [path.name for path in directory.samples.iterdir()] == ["step_000003.parquet"]


def test_an_image_is_marked_by_the_mean_of_its_rewards():
    run = SimpleNamespace(
        rewards={"t2i": [SimpleNamespace(name="a", weight=1), SimpleNamespace(name="b", weight=3)]}
    )
    scores = {"a": np.array([1, 0, 1, NAN]), "b": np.array([0, 1, NAN, NAN])}
    totals = reports.average_rewards(run, "t2i", scores)  # type: ignore[arg-type]
    np.testing.assert_allclose(totals, [0.25, 0.75, 1.0, NAN])
    images = np.full((1, 4, 200, 200, 3), 255, np.uint8)
    grid = reports.Grid(images, ["a fox"], [[{"a": 1.0}] * 4], totals[None], "step 5")
    page, card = grid.draw().pixels, grid.draw_card().pixels
    assert card.shape[1] == 3 * 128 + 4 * pictures.MARGIN < 420 < page.shape[1]
    for picture in (page, card):
        good, bad = [(picture == c).all(-1).any() for c in (pictures.GOOD, pictures.BAD)]
        assert good and bad
