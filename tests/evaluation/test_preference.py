"""`--suite preference`: images of any prompts, their scores and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizerFast  # pyright: ignore[reportAttributeAccessIssue]

from corl_jax.evaluate import __main__ as evaluate
from corl_jax.evaluation.preference import make_units, summarize_units
from corl_jax.evaluation.units import read_units
from corl_jax.evaluation.writers.writer import HarnessPrompt
from corl_jax.rewards import clip_scores
from corl_jax.rewards.samples import Network
from tests.support import tiny_networks
from tests.support.tiny_networks import load_network, network_dir

ALPHABET = sorted(ByteLevel.alphabet())
VOCAB = [*ALPHABET, *(f"{c}</w>" for c in ALPHABET), "<|startoftext|>", "<|endoftext|>"]


@pytest.fixture(autouse=True)
def _one_local_device(monkeypatch):
    first = jax.local_devices()[:1]
    monkeypatch.setattr("corl_jax.evaluate.draw_run.jax.local_devices", lambda: first)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A tiny CLIP with a tokenizer of single bytes."""
    folder = tmp_path_factory.mktemp("networks") / "clip"
    network_dir(folder, "clip", seed=1)
    config = json.loads((folder / "config.json").read_text())
    config["sizes"] |= {"vocab_size": len(VOCAB), "eos_token_id": len(VOCAB) - 1}
    (folder / "config.json").write_text(json.dumps(config))
    params = tiny_networks.flatten(tiny_networks.random_network("clip", 1))
    (name,) = [name for name, leaf in params.items() if leaf.shape == (40, 16)]
    rng = np.random.default_rng(0)
    params[name] = rng.standard_normal((len(VOCAB), 16)).astype(np.float32)
    save_file(params, folder / "model.safetensors")
    vocab = {token: i for i, token in enumerate(VOCAB)}
    CLIPTokenizerFast(vocab=vocab, merges=[]).save_pretrained(folder)
    return folder


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"a red circle {i}", "category": "ab"[i % 2]} for i in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(model, prompts, out, *more):
    return [
        "--model", str(model), "--suite", "preference", "--prompts", str(prompts), "--out",
        str(out), "--batch-size", "4", *map(str, more),
    ]  # fmt: skip


def refuse(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        evaluate.main(list(arguments))
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_images_are_drawn_and_scored(model, prompts, clip, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = command(
        model, prompts, out, "--images-per-prompt", 2, "--scores", "clip,hpsv2",
        "--network", f"clip={clip}", "--network", f"hpsv2={clip}",
    )  # fmt: skip
    evaluate.main(arguments)
    printed = capsys.readouterr().out
    units = read_units(out)
    assert [unit.name for unit in units] == [f"{i:05d}" for i in range(5)]
    assert [unit.category for unit in units] == ["a", "b", "a", "b", "a"]
    config, params = load_network(clip, "clip")
    network = Network(config, params, clip, np.float32)
    for number, unit in enumerate(units):
        files = [out / "images" / f"{number:05d}_{sample:02d}.png" for sample in range(2)]
        images = np.stack([np.asarray(Image.open(file)) for file in files])
        cosines = np.asarray(
            clip_scores.clip_similarity(network, images, [f"a red circle {number}"] * 2)
        )
        assert unit.values["hpsv2"] == pytest.approx(float(cosines.mean()), abs=1e-5)
        assert unit.values["clip"] == pytest.approx(2 * unit.values["hpsv2"], abs=1e-5)
    report = json.loads((out / "report.json").read_text())
    score = report["scores"]["clip"]
    mean = np.mean([unit.values["clip"] for unit in units])
    assert score["mean"] == pytest.approx(mean) and score["low"] < mean < score["high"]
    assert report["categories"]["b"]["clip"]["prompts"] == 2
    assert f"clip    {mean:.4f} (" in printed and report["settings"]["seed"] == 20
    assert not (out / ".drawing").exists()
    # Another time nothing is drawn, and the scores are the same.
    evaluate.main(arguments)
    assert "0 drawn, 10 kept" in capsys.readouterr().out
    assert read_units(out) == units


def test_networks_that_are_not_there_are_named_with_a_remedy(
    model, prompts, clip, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)  # where no ./weights is
    err = refuse(capsys, *command(model, prompts, tmp_path / "out", "--scores", "aesthetic,hpsv2"))
    assert "give --network hpsv2=PATH, or leave hpsv2 out of --scores" in err
    assert "--network clip_l14=PATH and --network aesthetic=PATH" in err
    err = refuse(
        capsys, *command(model, prompts, tmp_path / "out", "--scores", "clip,clop",
                         "--network", f"clip={clip}", "--network", "x=y", "--seed", -1),
    )  # fmt: skip
    assert "--scores: found 'clop'" in err and "--network: found 'x=y'" in err
    assert "--seed: found -1" in err
    err = refuse(
        capsys, *command(model, prompts, tmp_path / "out", "--scores", "clip",
                         "--network", f"clip={clip}", "--network", f"hpsv2={clip}"),
    )  # fmt: skip
    assert "--network hpsv2: no score of --scores asks it" in err
    assert not Path(tmp_path / "out").exists()


def test_the_mean_is_over_prompts():
    prompts = [HarnessPrompt("a", f"{i}", "", "a") for i in range(2)]
    units = make_units(prompts, {"x": np.array([[1.0, 2.0], [3.0, 5.0]])})
    assert [unit.values["x"] for unit in units] == [1.5, 4.0]
    summary = summarize_units(units)
    assert summary["scores"]["x"] == {"mean": 2.75, "low": 1.5, "high": 4.0, "prompts": 2}
    assert "categories" not in summary
