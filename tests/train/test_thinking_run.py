"""Training of plans and their images from files to files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas
import pytest
from PIL import Image

import corl_jax
from corl_jax import generate
from corl_jax.report.groups import read_groups
from corl_jax.train import __main__ as command
from tests.support import tiny_runs
from tests.support.tiny_runs import metric_lines, write_config

pytestmark = pytest.mark.usefixtures("module_on_one_device")

PLAN_WEIGHT = 0.25
REWARD = """
def brief(images, plan, prompt, *, longest: int = 30):
    assert len(plan) == len(images) == len(prompt) and all(isinstance(x, str) for x in plan)
    reds = [image.getpixel((0, 0))[0] / 255 for image in images]
    return [red + len(text) / longest for red, text in zip(reds, plan)]
"""


def train(tree: dict, *arguments: str) -> Path:
    output = Path(tree["output_dir"])
    output.parent.mkdir(parents=True, exist_ok=True)
    path = write_config(output.parent / f"{output.name}.yaml", tree)
    command.main(["--config", str(path), *arguments])
    return output


def options(model, rows, folder: Path, **changes) -> dict:
    reward = folder / "brief.py"
    folder.mkdir(parents=True, exist_ok=True)
    reward.write_text(REWARD)
    return tiny_runs.options(
        model, rows, folder / "run",
        **{
            "algorithm": {"tasks": "think", "earlier_loss_weight": PLAN_WEIGHT, "kl_coef": 0.1,
                          "image_logprobs": "guided"},
            "rewards": [{"use": f"{reward}:brief"}, {"name": "t2i_pixel_mse"}],
            "data": {"max_prompt_length": 256},
            "train": {"prompts_per_step": 4, "max_steps": 2, "micro_batch": 2},
            "log": {"images_every": 2, "samples_every": 1},
            "eval": {"suite": "rewards", "rows": 4, "batch_prompts": 4, "every": 2},
        } | changes,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(model, rows, tmp_path_factory) -> Path:
    return train(options(model, rows, tmp_path_factory.mktemp("thinking")))


def test_the_loss_is_that_of_both_segments_by_their_weights(run):
    lines = [line for line in metric_lines(run) if "loss" in line]
    assert len(lines) == 2
    for line in lines:
        expected = PLAN_WEIGHT * line["think/text/loss"] + line["think/codes/loss"]
        assert line["loss"] == pytest.approx(expected, abs=1e-6)
        for segment in ("text", "codes"):
            assert line[f"think/{segment}/entropy"] > 0
            difference = line[f"think/{segment}/sampling/sampling_logp_difference/max"]
            assert difference < 1e-3
        assert line["think/codes/completions/mean_length"] == 16
        assert 1 <= line["think/text/completions/mean_length"] <= 8
        assert line["think/rewards/brief/mean"] > 0 and line["perf/tokens_per_second"] > 0
    assert any("eval/think/brief" in line for line in metric_lines(run))
    assert lines[1]["think/text/kl"] > 0 and lines[1]["think/codes/kl"] > 0


def test_plans_are_saved_beside_their_images(run):
    table = pandas.read_parquet(run / "samples" / "step_000002.parquet")
    assert len(table) == 8 and set(table["task"]) == {"think"}
    assert table["plan"].map(len).sum() > 0 and table["text"].isna().all()
    notes: list[str] = []
    (groups,) = read_groups(run, notes)
    shown = [completion for group in groups.best for completion in group.completions]
    assert not notes and all(x.uri and x.plan is not None and x.text is None for x in shown)
    longest = max(table["plan"], key=len)
    assert "plan: " in (run / "report.html").read_text() and len(longest) > 1
    assert len(list((run / "images").glob("step_*.png"))) == 2


def test_the_export_generates_with_plans(run, tmp_path):
    arguments = ["image", "--model", str(run / "export"), "--prompt", "a red circle", "--seed", "3"]
    out = tmp_path / "out"
    generate.main([*arguments, "--out", str(out), "--think", "--images-per-prompt", "2"])
    records = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [len(record["tokens"]) for record in records] == [16, 16]
    # As the run sampled: the export states max_new_tokens.
    assert all(1 <= len(record["plan_tokens"]) <= 8 for record in records)
    model = corl_jax.load(run / "export")
    images = model.generate_images("a red circle", n=2, seed=3, think=True)
    for image, record in zip(images, records, strict=True):
        assert image.info["plan"] == record["plan"]
        np.testing.assert_array_equal(image, Image.open(out / record["file"]))
    plain = model.generate_images("a red circle", n=2, seed=3)
    assert "plan" not in plain[0].info


def test_without_its_weight_a_plan_adds_nothing_to_the_loss(model, rows, tmp_path):
    changes = {"tasks": "think", "earlier_loss_weight": 0.0, "mask_truncated": True}
    tree = options(model, rows, tmp_path, algorithm=changes)
    line, *_ = metric_lines(train(tree, "train.max_steps=1", "eval.suite=none"))
    assert line["loss"] == pytest.approx(line["think/codes/loss"], abs=1e-7)
    assert math.isfinite(line["think/text/loss"])


def refused(capsys, call) -> str:
    with pytest.raises(SystemExit) as error:
        call()
    assert error.value.code == 2
    return capsys.readouterr().err


def test_what_leaves_no_room_or_has_no_targets_is_refused(model, rows, tmp_path, run, capsys):
    tree = options(model, rows, tmp_path, rollout={"max_new_tokens": 300})
    message = refused(capsys, lambda: train(tree, "--check"))
    assert "256 plus a completion is 573 tokens; the model has positions for 512" in message
    train(tree, "--check", "rollout.max_new_tokens=239")
    message = refused(capsys, lambda: train(tree, "stage=sft", "sft.tasks=think"))
    assert "sft.tasks: found think, of which no column of the data has all parts" in message
    image = ["image", "--model", str(run / "export"), "--prompt", "a", "--out", str(tmp_path / "o")]
    message = refused(capsys, lambda: generate.main([*image, "--max-new-tokens", "9"]))
    assert "--max-new-tokens: found 9, but only plans are texts; add --think" in message
    long = [*image, "--think", "--max-new-tokens", "500"]
    assert "expected less than 495" in refused(capsys, lambda: generate.main(long))
