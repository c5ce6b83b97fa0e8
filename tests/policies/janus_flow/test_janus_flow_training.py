"""A tiny JanusFlow goes through the program: every stage, resuming, export, commands."""

from __future__ import annotations

import argparse
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pandas
import pytest
from PIL import Image

from corl_jax import generate
from corl_jax.config import files as config_files
from corl_jax.errors import Problems
from corl_jax.evaluate import draw_options
from corl_jax.params import flatten
from corl_jax.plan import __main__ as plan
from corl_jax.plan import programs as plan_programs
from corl_jax.policies import FAMILIES, load_policy
from corl_jax.train import __main__ as command
from corl_jax.train import build, fit, memory, resolve
from corl_jax.weights.export import convert
from tests.support import tiny_flow, tiny_runs

DIFFERENCE = "sampling/sampling_logp_difference/max"
DENOISING = {"steps": 3, "window": 2, "window_starts": 2, "eval_steps": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_flow.model_dir(tmp_path_factory.mktemp("models") / "flow")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return tiny_runs.rows_file(tmp_path_factory.mktemp("data") / "rows.parquet")


def make_options(model, rows, output, **changes):
    changes = {"rollout": {"cfg_scale": 2.0}, "denoising": DENOISING} | changes
    # The system prompt alone has more than 100 tokens of this tokenizer.
    changes["data"] = {"max_prompt_length": 256} | changes.get("data", {})
    return tiny_runs.options(model, rows, output, **changes)


def run(model, rows, output, *more, **changes):
    tree = make_options(model, rows, output, **changes)
    path = tiny_runs.write_config(output.with_suffix(".yaml"), tree)
    command.main(["--config", str(path), *more])
    return tiny_runs.metric_lines(output)


def refuse(capsys, model, rows, output, **changes) -> str:
    path = tiny_runs.write_config(
        output.with_suffix(".yaml"), make_options(model, rows, output, **changes)
    )
    with pytest.raises(SystemExit) as error:
        command.main(["--config", str(path), "--check"])
    assert error.value.code == 2
    return capsys.readouterr().err


@pytest.mark.slow
def test_both_tasks_with_several_updates_and_micro_batches(model, rows, tmp_path, one_device):
    lines = run(
        model, rows, tmp_path / "run", train={"micro_batch": 2, "max_steps": 1},
        algorithm={"num_iterations": 2, "kl_coef": 0.1}, export={"layout": "original"},
    )  # fmt: skip
    line = lines[0]
    assert 0 <= line["t2i/ratio_first"] < 1e-5 and line[f"mm2t/{DIFFERENCE}"] < 1e-4
    assert line["t2i/kl"] > 0 and line["mm2t/kl"] > 0, "the first update moved the policy"
    assert line["t2i/completions/mean_length"] == DENOISING["window"]
    assert line["t2i/group_difference"] > 0
    # The clip range of steps is so narrow that one update leaves it.
    assert line["t2i/clip_ratio/region_mean"] > 0
    assert (tmp_path / "run" / "export" / "vae" / "config.json").is_file()
    trained, start = load_policy(tmp_path / "run" / "export"), load_policy(model)
    assert trained.family.name == "janus_flow" and trained.sizes == start.sizes
    found, before = flatten(trained.params), flatten(start.params)
    for path, leaf in found.items():
        is_frozen = path.split("/")[0] in ("vae", "vision_model", "aligner", "begin_embedding")
        assert np.array_equal(leaf, before[path]) == is_frozen, path
    convert(tmp_path / "run" / "export", tmp_path / "jax", trained.family.kind)
    again = flatten(load_policy(tmp_path / "jax").params)
    assert all(np.array_equal(again[path], leaf) for path, leaf in found.items())


@pytest.mark.slow
def test_plans_and_their_images_with_several_updates_and_micro_batches(
    model, rows, tmp_path, one_device, capsys
):
    weight, output = 0.25, tmp_path / "run"
    lines = run(
        model, rows, output, train={"micro_batch": 2, "max_steps": 1},
        algorithm={"tasks": "think", "num_iterations": 2, "kl_coef": 0.1,
                   "earlier_loss_weight": weight},
        rollout={"cfg_scale": 2.0, "temperature": 0.9, "max_new_tokens": 5},
        rewards=[{"name": "t2i_pixel_mse"}], export={"layout": "original"},
        log={"images_every": 1, "samples_every": 1},
        eval={"suite": "rewards", "rows": 4, "batch_prompts": 4},
    )  # fmt: skip
    assert "has no effect" not in capsys.readouterr().err
    line = next(line for line in lines if "loss" in line)
    assert 0 <= line["think/codes/ratio_first"] < 1e-5
    assert line[f"think/text/{DIFFERENCE}"] < 1e-4
    assert line["think/codes/kl"] > 0 and line["think/text/kl"] > 0
    # With the penalty of each segment, which its loss has as well.
    expected = weight * line["think/text/loss"] + line["think/codes/loss"]
    assert line["loss"] == pytest.approx(expected, abs=1e-6)
    assert line["think/codes/completions/mean_length"] == DENOISING["window"]
    assert 1 <= line["think/text/completions/mean_length"] <= 5
    assert any("eval/think/t2i_pixel_mse" in line for line in lines)
    table = pandas.read_parquet(output / "samples" / "step_000001.parquet")
    assert set(table["task"]) == {"think"} and any(table["plan"])
    arguments = ["image", "--model", str(output / "export"), "--prompt", "a red circle"]
    generate.main([*arguments, "--out", str(tmp_path / "images"), "--think", "--image-steps", "2",
                   "--temperature", "0.5", "--dtype", "float32"])  # fmt: skip
    (record,) = map(json.loads, (tmp_path / "images" / "samples.jsonl").read_text().splitlines())
    assert record["tokens"] == [] and 1 <= len(record["plan_tokens"]) <= 5
    with Image.open(tmp_path / "images" / record["file"]) as image:
        assert image.size == (16, 16)


@pytest.mark.slow
@pytest.mark.parametrize("dynamics", ["flow", "dance", "cps"])
def test_micro_batches_change_nothing(model, rows, tmp_path, one_device, dynamics):
    changes = {
        "algorithm": {"tasks": "t2i", "kl_coef": 0.1, "num_iterations": 2},
        # The last step of cps has no noise.
        "denoising": DENOISING | {"dynamics": dynamics, "window_starts": 1 + (dynamics != "cps")},
        "rewards": [{"name": "t2i_pixel_mse"}], "train": {"max_steps": 1},
    }  # fmt: skip
    whole = run(model, rows, tmp_path / "whole", **changes)[0]
    changes["train"] = {"max_steps": 1, "micro_batch": 1}
    pieces = run(model, rows, tmp_path / "pieces", **changes)[0]
    for name in ("loss", "grad_norm", "t2i/kl"):
        assert pieces[name] == pytest.approx(whole[name], rel=1e-3), name
    assert max(line["t2i/ratio_first"] for line in (whole, pieces)) < 1e-5


@pytest.mark.slow
def test_the_guard_trains_on_rounded_latents(model, rows, tmp_path, one_device):
    """Both options go from the config to the loss; the guard's ratio starts at 1 as the plain."""
    line = run(
        model, rows, tmp_path / "run", train={"micro_batch": 2, "max_steps": 1},
        algorithm={"tasks": "t2i", "num_iterations": 2, "kl_coef": 0.1},
        denoising=DENOISING | {"guard": "ratio_per_dt", "latent_dtype": "bfloat16"},
        rewards=[{"name": "t2i_pixel_mse"}],
    )[0]  # fmt: skip
    assert 0 <= line["t2i/ratio_first"] < 1e-5 and line["t2i/clip_ratio/region_mean"] > 0
    assert line["t2i/kl"] > 0 and line["grad_norm"] > 0 and line["t2i/group_difference"] > 0


def test_a_replay_with_another_guidance_raises_the_alarm(
    model, rows, tmp_path, one_device, monkeypatch, capsys
):
    """No option can bring that about, but a family with a mistake in its replay could."""
    make = build.make_update_options

    def make_others(plan):
        options = make(plan)
        wrong = dataclasses.replace(options.logprobs, cfg_scale=3.5)
        return dataclasses.replace(options, logprobs=wrong)

    monkeypatch.setattr(build, "make_update_options", make_others)
    line = run(
        model, rows, tmp_path / "run", train={"max_steps": 1}, algorithm={"tasks": "t2i"},
        rewards=[{"name": "t2i_pixel_mse"}], export={"layout": "none"},
    )[0]  # fmt: skip
    assert line["t2i/ratio_first"] > 0.01 and line["alarm/drift_steps"] == 1
    assert line["alarm/drift_mean"] == 0, "the limits of tokens do not see it"
    said = capsys.readouterr().err
    assert "alarm drift_steps at step 1: t2i/ratio_first" in said and "model.dtype float32" in said


@pytest.mark.slow
def test_it_resumes_to_the_bit(model, rows, tmp_path, one_device):
    changes = {
        "checkpoint": {"every": 1}, "algorithm": {"kl_coef": 0.1}, "train": {"ema_decay": 0.9},
        "export": {"layout": "jax"}, "denoising": DENOISING | {"guard": "ratio"},
    }  # fmt: skip
    whole = run(model, rows, tmp_path / "whole", **changes)
    run(model, rows, tmp_path / "halves", "train.stop_after=1", **changes)
    halves = run(model, rows, tmp_path / "halves", **changes)
    for name in ("loss", "grad_norm", "t2i/loss", "t2i/kl"):
        assert [line.get(name) for line in whole] == [line.get(name) for line in halves]
    found, expected = (
        flatten(load_policy(tmp_path / name / "export").params) for name in ("halves", "whole")
    )
    assert all(np.array_equal(found[path], leaf) for path, leaf in expected.items())


def test_the_supervised_stage_learns_given_images_and_answers(model, rows, tmp_path, one_device):
    lines = run(
        model, rows, tmp_path / "run", stage="sft", rewards=[], rollout={}, algorithm={},
        sft={"caption_column": "caption"}, train={"max_steps": 8},
        optimizer={"learning_rate": 3e-3, "schedule": "constant"},
    )  # fmt: skip
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 8 and losses[-1] < losses[0]
    assert {"t2i/nll", "mm2t/nll", "caption/nll"} <= lines[0].keys()


@pytest.mark.slow
def test_adapters_are_trained_and_merged(model, rows, tmp_path, one_device):
    lines = run(
        model, rows, tmp_path / "run", lora={"rank": 2}, rewards=[{"name": "t2i_pixel_mse"}],
        algorithm={"tasks": "t2i", "kl_coef": 0.1}, export={"layout": "original"},
    )  # fmt: skip
    assert lines[0]["t2i/kl"] == pytest.approx(0, abs=1e-6) and lines[1]["t2i/kl"] > 0
    merged, before = load_policy(tmp_path / "run" / "export"), load_policy(model)
    name = ("language_model", "layers", "attn", "q_proj", "kernel")
    changed = [np.asarray(flatten(x.params)["/".join(name)]) for x in (merged, before)]
    assert (changed[0] != changed[1]).any()


def test_commands_draw_and_answer(model, tmp_path, capsys, one_device):
    generate.main([
        "image", "--model", str(model), "--prompt", "a red circle", "--images-per-prompt", "2",
        "--out", str(tmp_path / "images"), "--dtype", "float32", "--image-steps", "2",
    ])  # fmt: skip
    assert "cfg_scale 2 (default)" in capsys.readouterr().err
    images = sorted((tmp_path / "images").glob("0*.png"))
    drawn = [np.asarray(Image.open(image)) for image in images]
    assert len(drawn) == 2 and drawn[0].shape == (16, 16, 3) and (drawn[0] != drawn[1]).any()
    records = (tmp_path / "images" / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["tokens"] for line in records] == [[], []]
    generate.main([
        "text", "--model", str(model), "--image", str(images[0]), "--question", "how many?",
        "--max-new-tokens", "3", "--dtype", "float32",
    ])  # fmt: skip
    assert 1 <= len(json.loads(capsys.readouterr().out)["tokens"]) <= 3


def test_a_plan_has_the_latents_that_a_run_has(model, rows, tmp_path, capsys):
    tree = make_options(model, rows, tmp_path / "run", algorithm={"tasks": "t2i", "kl_coef": 0.1})
    path = tiny_runs.write_config(tmp_path / "run.yaml", tree)
    plan.main([str(path), "--topology", "local", "--only", "codes",
               "train.prompts_per_step=8"])  # fmt: skip
    assert "codes to pixels" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["denoising.window=9"], "correct denoising.window, denoising.window_starts"),
        (["denoising.dynamics=cps", "denoising.guard=ratio"], "correct denoising.guard"),
        (["rollout.image_window=4"], "does not draw the codes of an image in windows; set it to 1"),
        (["algorithm.tasks=self_qa"], "which a janus_flow does not make; choose another task"),
    ],
)
def test_a_plan_refuses_what_a_run_refuses(model, rows, tmp_path, capsys, overrides, message):
    tree = make_options(model, rows, tmp_path / "run", algorithm={"tasks": "t2i"})
    path = tiny_runs.write_config(tmp_path / "run.yaml", tree)
    with pytest.raises(SystemExit) as error:
        plan.main([str(path), "--topology", "local", "train.prompts_per_step=8", *overrides])
    assert error.value.code == 2 and message in capsys.readouterr().err


# ---- guidance and memory


@pytest.mark.parametrize(
    ("family", "overrides", "expected"),
    [
        ("janus_flow", ["rollout.cfg_scale=null"], 2.0),
        ("janus_flow", ["rollout.cfg_scale=1.5"], 1.5),
        ("janus", ["rollout.cfg_scale=null"], 5.0),
        # Nothing reads it.
        ("janus_flow", ["rollout.cfg_scale=null", "algorithm.tasks=mm2t", "eval.suite=none"], None),
    ],
)
def test_a_family_has_its_own_guidance(family, overrides, expected):
    config = config_files.load("configs/janus_flow_1_3b/unified.yaml", overrides)
    assert fit.choose_guidance(config, FAMILIES[family]).rollout.cfg_scale == expected


@pytest.mark.parametrize(("stated", "expected"), [(None, 2.0), (3.0, 3.0)])
def test_suites_draw_with_the_guidance_of_the_family(model, stated, expected):
    args = argparse.Namespace(
        model=str(model), temperature=1.0, roles=None, cfg_scale=stated, image_steps=None
    )
    draw_options.check_model(args, Problems())
    assert args.cfg_scale == expected


LONG, PROMPTS, GROUP, WINDOW = 512, 8, 8, 2
FLOW = FAMILIES["janus_flow"]
MANY_LAYERS = dataclasses.replace(
    tiny_flow.CONFIG,
    llama=dataclasses.replace(tiny_flow.CONFIG.llama, num_layers=8, max_position_embeddings=4096),
)


def estimate_update(cfg_scale: float):
    """The outline of an update of images behind long prompts, and its estimate in bytes."""
    config = config_files.load(
        "configs/janus_flow_1_3b/unified.yaml",
        [f"rollout.cfg_scale={cfg_scale}", "algorithm.tasks=t2i", "algorithm.kl_coef=0",
         "train.prompts_per_step=8", "model.attention=xla", "rewards=[{name: t2i_pixel_mse}]"],
    )  # fmt: skip
    outline = resolve.outline_run(
        config, FLOW, MANY_LAYERS, FLOW.stand_in_tokens, jax.devices()[:1]
    )
    estimate = memory.estimate_outline(outline, {"t2i": LONG}, lambda path: jnp.dtype("bfloat16"))
    return outline, {name: gib * memory.GIB for name, gib in estimate.items()}


def test_guidance_reads_a_prompt_once():
    """The other branch has two tokens in the place of the prompt."""
    (_, plain), (_, guided) = map(estimate_update, (1.0, 2.0))
    llama = MANY_LAYERS.llama
    images = PROMPTS * GROUP * WINDOW * 17  # tokens
    kept = 2 * llama.num_layers * llama.hidden_size  # bytes of a token
    assert plain["activations (kept by remat)"] == (PROMPTS * LONG + images) * kept
    assert guided["activations (kept by remat)"] == (PROMPTS * LONG + 2 * images) * kept
    for name in ("sampling caches (largest task)", "attention scores (xla)"):
        assert guided[name] == plain[name] > 0


def test_each_plan_has_a_copy_of_its_prompt_in_front():
    """`Llama.extend_caches` returns keys and values of prompts and plans, [L, N, P + T, ...]."""
    config = config_files.load(
        "configs/janus_flow_1_3b/think.yaml",
        ["train.prompts_per_step=8", "rewards=[{name: t2i_pixel_mse}]"],
    )
    outline = resolve.outline_run(
        config, FLOW, MANY_LAYERS, FLOW.stand_in_tokens, jax.devices()[:1]
    )
    estimate = memory.estimate_outline(outline, {"think": LONG}, lambda path: jnp.dtype("bfloat16"))
    llama = MANY_LAYERS.llama
    kept = 2 * 2 * llama.num_layers * llama.num_kv_heads * llama.head_dim  # bytes of a token
    tokens = PROMPTS * GROUP * (LONG + config.rollout.max_new_tokens)
    assert estimate["sampling caches (largest task)"] * memory.GIB == tokens * kept


@pytest.mark.slow
def test_what_guidance_adds_is_what_the_compiler_adds():
    added, compiled = [], []
    for outline, estimate in map(estimate_update, (1.0, 2.0)):
        _, programs = plan_programs.make_programs(outline, {"t2i": LONG}, jnp.bfloat16)
        with jax.set_mesh(outline.mesh):
            found = programs[-1].lower().compile().memory_analysis().temp_size_in_bytes
        assert found > estimate["activations (kept by remat)"]
        compiled.append(found)
        added.append(estimate["activations (kept by remat)"])
    assert 0.3 < (compiled[1] - compiled[0]) / (added[1] - added[0]) < 1.5


# ---- refusals, before any device work


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout": {"group_size": 1}}, "rollout.group_size: found 1"),
        ({"denoising": {"steps": 3, "window": 4}}, "denoising: window"),
        (
            {"denoising": {"steps": 3, "window": 2, "window_starts": 2, "dynamics": "cps"}},
            "correct denoising.window, denoising.window_starts or denoising.steps",
        ),
        (
            {"denoising": DENOISING | {"dynamics": "cps", "window_starts": 1, "guard": "ratio"}},
            "choose one of flow, dance, or leave the guard off; correct denoising.guard",
        ),
        (
            {"denoising": {"schedule": "euler_discrete", "latent_dtype": "bfloat16"}},
            "store latents in float32, or end the window before that step; correct "
            "denoising.latent_dtype, denoising.window",
        ),
        ({"algorithm": {"name": "remax"}}, "compares with a greedy completion"),
        ({"algorithm": {"kl_coef": 0.1, "kl_in": "reward"}}, "algorithm.kl_in: found reward"),
        ({"algorithm": {"tasks": "self_qa"}}, "which a janus_flow does not make"),
    ],
)
def test_options_that_do_not_fit_are_refused(model, rows, tmp_path, capsys, changes, message):
    found = refuse(capsys, model, rows, tmp_path / "run", **changes)
    assert message in found and not (tmp_path / "run").exists()


@pytest.mark.parametrize(("temperature", "refused"), [(0.7, True), (1.0, False)])
def test_suites_that_draw_refuse_a_temperature(model, temperature, refused):
    problems = Problems()
    args = argparse.Namespace(
        model=str(model), temperature=temperature, roles=None, cfg_scale=None, image_steps=None
    )
    draw_options.check_model(args, problems)
    assert [line.startswith("--temperature: found 0.7") for line in problems] == [True] * refused
