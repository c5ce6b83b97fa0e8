"""A tiny Show-o goes through the program: training in every stage, resuming, export, commands."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from corl_jax import generate
from corl_jax.config import files as config_files
from corl_jax.plan import __main__ as plan
from corl_jax.policies import load_policy
from corl_jax.train import __main__ as command
from corl_jax.train import resolve
from corl_jax.weights.checkpoint import detect_layout
from tests.support import tiny_runs, tiny_show_o
from tests.support.tiny_models import tiny_parquet, tiny_row

DIFFERENCE = "sampling/sampling_logp_difference/max"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_show_o.model_dir(tmp_path_factory.mktemp("models") / "show_o")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return tiny_runs.rows_file(tmp_path_factory.mktemp("data") / "rows.parquet")


def run(model, rows, output, *more, **changes):
    changes.setdefault("export", {"layout": "jax"})
    tree = tiny_runs.options(model, rows, output, **changes)
    path = tiny_runs.write_config(output.with_suffix(".yaml"), tree)
    command.main(["--config", str(path), *more])
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_both_tasks_with_several_updates_and_micro_batches(model, rows, tmp_path, one_device):
    lines = run(
        model, rows, tmp_path / "run", train={"micro_batch": 2},
        algorithm={"num_iterations": 2, "kl_coef": 0.1},
        rollout={"cfg_scale": 3.0}, unmasking={"steps": 3}, checkpoint={"every": 1},
        export={"layout": "auto"},
    )  # fmt: skip
    for line in lines[:2]:
        # The sampler scores its images as the update does, and hides the same codes.
        assert 0 <= line[f"t2i/{DIFFERENCE}"] < 1e-4 and line[f"mm2t/{DIFFERENCE}"] < 1e-4
    assert lines[1]["t2i/kl"] > 0, "the policy has moved away from the reference"
    folder = tmp_path / "run" / "export"
    exported = load_policy(folder)
    assert exported.family.name == "show_o"
    # The family's usual layout, by its name.
    assert detect_layout(folder, exported.family.kind) == "original"
    assert config_files.load(tmp_path / "run/config.yaml").export.layout == "original"
    start = load_policy(model)
    head = np.asarray(start.params["lm_head"]["kernel"])
    assert (np.asarray(exported.params["lm_head"]["kernel"]) != head).any()


def test_adapters_of_a_show_o_are_exported_merged(model, rows, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(model, rows, tmp_path / "run", "--check", lora={"rank": 2},
            export={"layout": "auto", "lora": "adapter"})  # fmt: skip
    said = capsys.readouterr().err
    assert "export.lora: adapter, but a show_o is exported in the layout original" in said


SHORT = "def short(texts):\n    return [-float(len(text)) for text in texts]\n"


def own_images(tmp_path, **changes):
    (tmp_path / "short.py").write_text(SHORT)
    return {
        "rewards": [{"use": f"{tmp_path / 'short.py'}:short"}],
        "algorithm": {"tasks": "self_qa", "image_logprobs": "guided"},
        "rollout": {"cfg_scale": 3.0},
        "unmasking": {"steps": 4, "logprobs": "trajectory", "scored_steps": 2},
    } | changes


def test_questions_about_own_images_with_log_probs_of_the_trajectory(
    model, rows, tmp_path, one_device
):
    lines = run(model, rows, tmp_path / "run", train={"micro_batch": 2}, **own_images(tmp_path))
    for line in lines[:2]:
        assert 0 <= line[f"self_qa/codes/{DIFFERENCE}"] < 1e-4
        assert 0 <= line[f"self_qa/text/{DIFFERENCE}"] < 1e-4
        assert line["self_qa/codes/completions/mean_length"] == 16


@pytest.mark.slow
def test_it_resumes_to_the_bit(model, rows, tmp_path, one_device):
    changes = own_images(tmp_path, checkpoint={"every": 1})
    whole = run(model, rows, tmp_path / "whole", **changes)
    run(model, rows, tmp_path / "halves", "train.stop_after=1", **changes)
    halves = run(model, rows, tmp_path / "halves", **changes)
    for name in ("loss", "grad_norm", "self_qa/codes/loss"):
        assert [line.get(name) for line in whole] == [line.get(name) for line in halves]


@pytest.mark.parametrize(
    "stage",
    [
        "sft",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("released sft", "self_sft", "self_sft_through")
        ),
    ],
)
def test_supervised_stages_hide_codes_of_given_images(model, rows, tmp_path, one_device, stage):
    released, stage = stage.startswith("released"), stage.removeprefix("released ")
    changes = {"stage": stage, "rewards": [], "rollout": {}, "algorithm": {}}
    if stage == "sft":
        changes["sft"] = {"text_column": "caption", "released": released}
    else:
        changes["rewards"] = own_images(tmp_path)["rewards"]
    lines = run(
        model, rows, tmp_path / "run", optimizer={"learning_rate": 1e-2, "schedule": "constant"},
        train={"max_steps": 8}, **changes,
    )  # fmt: skip
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 8 and losses[-1] < losses[0]
    if stage == "sft":  # coefficients 1, 1, 0.1; captions have no coefficient of Show-o
        kinds = {"t2i": 1.0, "mm2t": 1.0, "caption": 1.0, "plain_text": 0.1}
        parts = [weight * lines[0][f"{kind}/nll"] for kind, weight in kinds.items()]
        assert lines[0]["loss"] == pytest.approx(sum(parts), rel=1e-4)


@pytest.mark.parametrize("column", ["sft_answer", "caption"])
def test_a_target_with_a_control_token_is_a_bad_row(model, tmp_path, column):
    """The step that needs it would end the run, without the row's number."""
    good = {"sft_answer": "<answer>two</answer>", "caption": "a red circle"}
    rows = [tiny_row(i) | good for i in range(8)]
    rows[5][column] = "a <|soi|> b"
    tree = tiny_runs.options(
        model, tiny_parquet(tmp_path / "rows.parquet", rows), tmp_path / "run",
        train={"prompts_per_step": 8}, data={"max_bad_fraction": 0.5}, stage="sft", rewards=[],
    )  # fmt: skip
    loader = resolve.resolve_run(config_files.validate(tree, "test")).train_loader
    loader.batch(0)
    assert loader.counts == {"bad": 1, "long": 0}


def test_the_stage_of_the_image_tokenizer_trains_it_alone(model, rows, tmp_path, one_device):
    lines = run(
        model, rows, tmp_path / "run", stage="vq", rewards=[], rollout={}, algorithm={},
        optimizer={"learning_rate": 1e-2, "schedule": "constant"},
        train={"max_steps": 8, "trainable": ["vqmodel/.*"]},
    )  # fmt: skip
    errors = [line["vq/l1"] for line in lines if "vq/l1" in line]
    assert len(errors) == 8 and errors[-1] < errors[0]
    before, after = (load_policy(folder).params for folder in (model, tmp_path / "run" / "export"))
    for half in ("encoder", "decoder"):
        kernels = [np.asarray(x["vqmodel"][half]["conv_in"]["kernel"]) for x in (before, after)]
        assert (kernels[0] != kernels[1]).any()
    np.testing.assert_array_equal(before["lm_head"]["kernel"], after["lm_head"]["kernel"])


def test_commands_draw_and_answer(model, tmp_path, capsys, one_device):
    generate.main([
        "image", "--model", str(model), "--prompt", "a red circle", "--images-per-prompt", "2",
        "--out", str(tmp_path / "images"), "--dtype", "float32", "--image-steps", "3",
    ])  # fmt: skip
    images = sorted((tmp_path / "images").glob("0*.png"))
    assert len(images) == 2 and Image.open(images[0]).size == (16, 16)
    generate.main([
        "text", "--model", str(model), "--image", str(images[0]), "--question", "how many?",
        "--max-new-tokens", "4", "--dtype", "float32",
    ])  # fmt: skip


def test_a_plan_has_the_arrays_that_scoring_repeats(model, rows, tmp_path, capsys):
    tree = tiny_runs.options(model, rows, tmp_path / "run", unmasking={"logprobs": "trajectory"})
    path = tiny_runs.write_config(tmp_path / "run.yaml", tree)
    plan.main([str(path), "--topology", "local", "--only", "update",
               "train.prompts_per_step=8"])  # fmt: skip
    assert "update" in capsys.readouterr().out
