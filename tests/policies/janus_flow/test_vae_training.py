"""The loss of the VAE's training, the stage `vq` with it, and the small JanusFlow."""

from __future__ import annotations

import dataclasses
import re

import jax
import numpy as np
import pytest

from corl_jax.errors import InputError
from corl_jax.models import modules
from corl_jax.models.sd_vae import SdVae
from corl_jax.policies import load_policy
from corl_jax.policies.janus_flow.prompts import SYSTEM_PROMPT
from corl_jax.policies.janus_flow.tokenizer_training import make_key, vae_loss
from tests.policies.janus_flow.test_janus_flow_training import run
from tests.support import tiny_flow, tiny_runs, tiny_vae
from tests.support.tolerances import NETWORK
from tools.small_models.__main__ import main
from tools.small_models.families import FAMILIES
from tools.small_models.janus_flow_sizes import make_mini_config, make_nano_config, take_vae

CONFIG = tiny_flow.CONFIG.vae


@pytest.fixture(scope="module")
def params():
    return tiny_vae.make_params(CONFIG)


@pytest.fixture(scope="module")
def compute(params):
    """(pixels, weights of the terms) -> (loss, metrics, gradients)."""

    @jax.jit
    def compute(pixels, weights):
        def loss(part):
            return vae_loss(modules.bind(SdVae, CONFIG, part), pixels, *weights)

        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return value, metrics, grads

    return compute


def make_pixels(rows: int = 3, seed: int = 1) -> jax.Array:
    return jax.random.uniform(jax.random.key(seed), (rows, 16, 16, 3), minval=-1)


def test_every_part_learns_from_the_pixels_alone(compute):
    _, _, grads = compute(make_pixels(), (0.0, 0.0))
    for part in ("encoder", "quant_conv", "post_quant_conv", "decoder"):
        assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(grads[part])) > 1e-7, part
    # The noise of the latents, too: the last channels are logarithms of variances.
    assert np.abs(grads["quant_conv"]["bias"][CONFIG.latent_channels :]).min() > 0


def test_the_two_terms_are_the_divergence_from_a_unit_normal(compute, params):
    pixels = make_pixels()
    value, metrics, _ = compute(pixels, (0.01, 0.3))
    mean, logvar = modules.bind(SdVae, CONFIG, params).encode(pixels)
    mean = np.asarray(mean, np.float64) * CONFIG.scaling_factor
    std = np.exp(np.asarray(logvar, np.float64) / 2) * CONFIG.scaling_factor
    divergence = ((mean**2 + std**2 - 1) / 2 - np.log(std)).mean()
    assert metrics["vq/information"] + metrics["vq/scale"] == pytest.approx(divergence, rel=1e-4)
    assert metrics["vq/scale"] > 0 and metrics["vq/information"] > 0
    expected = (
        metrics["vq/l1"] + 0.5 * metrics["vq/edges"] + 0.01 * metrics["vq/information"]
        + 0.3 * metrics["vq/scale"]
    )  # fmt: skip
    assert value == pytest.approx(float(expected), rel=NETWORK)


def test_the_noise_differs_from_batch_to_batch():
    """A decoder that always had the same noise would learn to subtract it."""
    keys = [jax.random.key_data(make_key(make_pixels(seed=seed))) for seed in (1, 1, 2)]
    assert (keys[0] == keys[1]).all() and (keys[0] != keys[2]).any()


def test_the_noise_does_not_depend_on_the_order_of_sums():
    """Devices add up their own pixels first."""
    for seed in range(8):
        pixels = make_pixels(rows=8, seed=seed)
        keys = [jax.random.key_data(make_key(x)) for x in (pixels, pixels[::-1, ::-1])]
        np.testing.assert_array_equal(*keys)


def test_the_stage_brings_latents_to_unit_size_and_exports_them(tmp_path, one_device):
    model = tiny_flow.model_dir(tmp_path / "flow", layout="original")
    rows = tiny_runs.rows_file(tmp_path / "rows.parquet")
    lines = run(
        model, rows, tmp_path / "run", stage="vq", rewards=[], rollout={}, algorithm={},
        denoising={}, optimizer={"learning_rate": 1e-2, "schedule": "constant"},
        train={"max_steps": 12, "trainable": ["vae/.*"]}, export={"layout": "original"},
    )  # fmt: skip
    lines = [line for line in lines if "vq/l1" in line]
    assert len(lines) == 12 and lines[-1]["vq/l1"] < lines[0]["vq/l1"]
    assert lines[-1]["vq/scale"] < lines[0]["vq/scale"]
    before, after = (load_policy(folder) for folder in (model, tmp_path / "run" / "export"))
    assert after.sizes == before.sizes, "scaling_factor too"
    for half in ("encoder", "decoder"):
        old, new = (x.params["vae"][half]["conv_in"]["kernel"] for x in (before, after))
        assert (np.asarray(old) != np.asarray(new)).any()
    heads = [x.params["lm_head"]["kernel"] for x in (before, after)]
    np.testing.assert_array_equal(*heads)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    out = tmp_path_factory.mktemp("models") / "start"
    main(["--family", "janus-flow", "--size", "nano", "--out", str(out)])
    return load_policy(out)


def test_the_vae_of_a_mini_can_begin_as_that_of_a_nano(start):
    assert take_vae(start, make_mini_config(512)) is start.params["vae"]
    with pytest.raises(InputError, match="its image tokenizer is None, expected SdVaeConfig"):
        take_vae(load_policy("nano"), make_mini_config(512))


def test_the_start_of_a_nano_is_a_janus_flow_whose_parts_fit(start):
    assert start.family.name == "janus_flow"
    expected = make_nano_config(start.sizes.llama.vocab_size)
    assert dataclasses.asdict(start.sizes) == dataclasses.asdict(expected)
    assert sum(leaf.size for leaf in jax.tree.leaves(start.params)) < 1_250_000, "2.5 MB"
    limits = start.family.limits(start.sizes)
    assert limits.image_side == limits.input_image_side == 32
    text = "a red circle left of a blue cross"
    ids = start.processor.t2i_ids(text)
    assert ids[0] == start.processor.special.bos
    assert start.processor.decode(start.processor.answer_ids(text)) == text
    words = re.findall(r"\w+|[.,]", SYSTEM_PROMPT)
    assert len(start.processor.answer_ids(SYSTEM_PROMPT)) == len(words), "each is one token"

    # The mini begins with the same VAE.
    begin = FAMILIES["janus-flow"].begin
    assert begin is not None
    begun = begin(start, make_mini_config(start.sizes.llama.vocab_size), 0, "full")
    assert begun == {"vae": start.params["vae"]}


def test_the_vae_of_another_model_does_not_fit():
    janus = load_policy("nano")
    with pytest.raises(InputError, match="its image tokenizer is None, expected SdVaeConfig"):
        take_vae(janus, make_nano_config(640))
