"""REPA on a tiny JanusFlow: its number, its projector, a run from files to files."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from corl_jax.models import layers
from corl_jax.params import flatten, merge
from corl_jax.policies import FAMILIES, load_policy
from corl_jax.policies.denoising import add_drawn_noise
from corl_jax.policies.family import NOISE_KEYS, PIXELS, LogprobOptions
from corl_jax.policies.janus_flow import network
from corl_jax.policies.janus_flow.family import FAMILY
from corl_jax.policies.janus_flow.logprobs import score_steps
from corl_jax.tasks import LATENTS
from corl_jax.train import __main__ as command
from corl_jax.types import Segment
from tests.policies.janus_flow.test_janus_flow_training import make_options, refuse, run
from tests.support import tiny_flow, tiny_runs
from tests.support.tiny_flow import CONFIG, SPECIAL, pad_left

PROMPTS = ([1, 5, 6, 7], [1, 30, 31, 32, 33])
ALIGNED = network.add_alignment(CONFIG)
SUPERVISED = {"stage": "sft", "rewards": [], "rollout": {}, "algorithm": {}, "denoising": {}}
WEIGHT = 0.5


@pytest.fixture(scope="module")
def params():
    projector = FAMILY.alignment.init(ALIGNED, jax.random.key(0))
    grown = jax.tree.map(lambda x: 10 * x + 0.1, projector)
    return jax.device_put(merge(tiny_flow.make_params(), grown))


@pytest.mark.usefixtures("exact_products")
def test_it_compares_states_of_a_quarter_of_the_layers_with_the_encoder(params):
    """Written out: one text at a time, block by block, and the projector in NumPy."""
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(2, 16, 16, 3)).astype(np.float32)
    latents = jnp.asarray(rng.normal(size=(2, 1, *CONFIG.latent_shape)), jnp.float32)
    replay = {NOISE_KEYS: jax.random.key_data(jax.random.split(jax.random.key(3), 2))}
    given = Segment(LATENTS, latents, jnp.ones((2, 1), bool), replay=replay)
    options, prompts = LogprobOptions(SPECIAL, is_given=True), pad_left(PROMPTS, 6)
    base = {name: part for name, part in params.items() if name != "alignment_projector"}
    plain: Any = score_steps(CONFIG, base, prompts, (given,), options)[0]
    seen = dataclasses.replace(given, replay=replay | {PIXELS: pixels})
    aligned = dataclasses.replace(options, aligned=True)
    result: Any = score_steps(ALIGNED, params, prompts, (seen,), aligned)[0]
    scores, _, velocities, found = result
    np.testing.assert_allclose(scores, plain[0], rtol=1e-5)
    np.testing.assert_allclose(velocities, plain[2], atol=1e-5)

    model = network.bind(ALIGNED, params)
    blocks = layers.unstack(model.language_model.layers, CONFIG.llama.num_layers)
    noisy, times, _ = add_drawn_noise(given)
    features = np.asarray(model.vision_model(jnp.asarray(pixels)))
    weights = jax.device_get(params["alignment_projector"])
    for i, ids in enumerate(PROMPTS):
        tokens = model._read_latents(noisy[i : i + 1], times[i : i + 1], "none")[0]
        x = jnp.concatenate([model.embed_text(jnp.asarray([ids])), tokens], axis=1)
        rope = model.language_model.rope(jnp.arange(x.shape[1])[None])
        for block in blocks[: CONFIG.llama.num_layers // 2]:  # 1 of 2; 6 of the released 24
            x, _ = block(x, rope, jnp.ones(x.shape[:2], bool))
        h = np.asarray(x[0, -CONFIG.num_image_tokens :])
        for name in ("fc1", "fc2", "fc3"):
            h = h @ weights[name]["kernel"] + weights[name]["bias"]
            h = h if name == "fc3" else h / (1 + np.exp(-h))
        target = features[i]
        cosines = (h * target).sum(-1) / np.sqrt((h**2).sum(-1) * (target**2).sum(-1))
        assert found[i, 0] == pytest.approx(cosines.mean(), abs=1e-5)
        assert abs(cosines.mean()) > 1e-3


def test_sizes_of_the_checkpoint_know_nothing_of_it():
    assert FAMILY.base(ALIGNED) == CONFIG and type(FAMILY.base(ALIGNED)) is type(CONFIG)
    assert network.PRESETS["janusflow-1.3b"].aligned_layer == 6
    added = flatten(FAMILY.abstract(ALIGNED)).keys() - flatten(FAMILY.abstract(CONFIG)).keys()
    assert {path.split("/")[0] for path in added} == {"alignment_projector"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_flow.model_dir(tmp_path_factory.mktemp("models") / "flow")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return tiny_runs.rows_file(tmp_path_factory.mktemp("data") / "rows.parquet")


RUN = SUPERVISED | {
    "sft": {"caption_column": None, "repa_weight": WEIGHT},
    "optimizer": {"learning_rate": 3e-3, "schedule": "constant",
                  "learning_rates": {"image_head": 1e-2}},
    "train": {"max_steps": 6, "micro_batch": 2}, "checkpoint": {"every": 3},
    "export": {"layout": "original"},
}  # fmt: skip


def list_updates(lines: list[dict]) -> list[dict]:
    return [line for line in lines if "loss" in line]


@pytest.mark.slow
def test_a_run_raises_it_and_exports_no_projector(model, rows, tmp_path, one_device):
    lines = list_updates(run(model, rows, tmp_path / "run", **RUN))
    assert len(lines) == 6 and lines[-1]["t2i/alignment"] > lines[0]["t2i/alignment"] + 0.05
    for line in lines:
        expected = line["t2i/nll"] - WEIGHT * line["t2i/alignment"] + line["mm2t/nll"]
        assert line["loss"] == pytest.approx(expected, abs=1e-5)
    exported = load_policy(tmp_path / "run" / "export")
    assert exported.sizes == load_policy(model).sizes
    assert "alignment_projector" not in exported.params
    card = (tmp_path / "run" / "export" / "README.md").read_text()
    assert "| optimizer | adamw, learning rate 0.003, image_head 0.01 |" in card


@pytest.mark.slow
def test_it_resumes_to_the_bit(model, rows, tmp_path, one_device):
    """With the projector, which no file of the model has, and rates of groups."""
    whole = list_updates(run(model, rows, tmp_path / "whole", **RUN))
    run(model, rows, tmp_path / "halves", "train.stop_after=3", **RUN)
    halves = list_updates(run(model, rows, tmp_path / "halves", **RUN))
    for name in ("loss", "grad_norm", "t2i/alignment"):
        assert [line[name] for line in halves] == [line[name] for line in whole]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": {"rank": 2}}, "whose projector adapters do not train"),
        ({"sft": {"tasks": "mm2t", "caption_column": None, "repa_weight": 1.0}}, "has no effect"),
        ({"sft": {"t2i_weight": 0, "caption_column": None, "repa_weight": 1.0}}, "has no effect"),
    ],
)
def test_what_cannot_be_aligned_is_told(
    model, rows, tmp_path, capsys, changes, message, one_device
):
    changes = SUPERVISED | {"sft": {"caption_column": None, "repa_weight": 1.0}} | changes
    if message == "has no effect":
        tree = make_options(model, rows, tmp_path / "run", **changes)
        path = tiny_runs.write_config(tmp_path / "run.yaml", tree)
        command.main(["--config", str(path), "--check"])
        assert "sft.repa_weight: 1.0 has no effect" in "".join(capsys.readouterr())
    else:
        assert message in refuse(capsys, model, rows, tmp_path / "run", **changes)


def test_a_family_without_an_alignment_refuses_it(tmp_path, capsys, tiny_config):
    assert FAMILIES["janus"].alignment is None
    folder = tiny_runs.model_dir(tmp_path / "janus", tiny_config)
    rows = tiny_runs.rows_file(tmp_path / "rows.parquet")
    changes = SUPERVISED | {"sft": {"caption_column": None, "repa_weight": 1.0}}
    found = refuse(capsys, folder, rows, tmp_path / "run", **changes)
    assert "but a janus aligns no images with an image encoder; set it to 0" in found
