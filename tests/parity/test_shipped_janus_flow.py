"""The shipped nano JanusFlow: its size, transformers on its weights, and the images of its VAE."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from corl_jax.assets import NANO_JANUS_FLOW
from corl_jax.policies import load_policy
from corl_jax.policies.janus_flow import network
from corl_jax.policies.janus_flow.checkpoint import KIND
from corl_jax.weights.checkpoint import load_params
from corl_jax.weights.export import convert
from tests.support.tolerances import NETWORK
from tools.small_models.roundtrip import measure_roundtrip

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

MAX_MIB = 2.5
PARAMETERS = 1_004_679


@pytest.fixture(scope="module")
def nano():
    return load_policy("nano-janus-flow", jnp.float32)


def test_it_is_small_enough_to_ship(nano):
    files = [file for file in NANO_JANUS_FLOW.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < MAX_MIB * 2**20
    assert sum(leaf.size for leaf in jax.tree.leaves(nano.params)) == PARAMETERS


def test_transformers_llama_gives_the_same_logits(nano):
    from safetensors.torch import load_file

    prefix = "language_model."
    stored = load_file(NANO_JANUS_FLOW / "model.safetensors")
    state = {n.removeprefix(prefix): x.float() for n, x in stored.items() if n.startswith(prefix)}
    stated = json.loads((NANO_JANUS_FLOW / "config.json").read_text())["language_config"]
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**stated)).float().eval()
    llama.load_state_dict(state)

    ids = np.asarray([nano.processor.answer_ids("a photo of a red circle")])
    with torch.no_grad():
        theirs = llama(torch.from_numpy(ids).long()).logits.numpy()
    prompts = nano.processor.pad([list(row) for row in ids], length=ids.shape[1])
    with jax.default_matmul_precision("highest"):
        model = network.bind(nano.sizes, nano.params)
        embeds = model.embed_text(jnp.asarray(prompts.input_ids))
        hidden = model.language_model.prefill(embeds, jnp.asarray(prompts.attention_mask))[0]
        ours = model.text_logits(hidden)
    np.testing.assert_allclose(np.asarray(ours), theirs, atol=10 * NETWORK)


def test_images_survive_its_vae():
    assert measure_roundtrip(NANO_JANUS_FLOW, rows=32, seed=3).mean >= 0.9


def test_both_directions_of_the_conversion_keep_its_bits(nano, tmp_path):
    stored = load_params(NANO_JANUS_FLOW, KIND, nano.sizes)
    convert(NANO_JANUS_FLOW, tmp_path / "jax", KIND, layout="jax")
    convert(tmp_path / "jax", tmp_path / "back", KIND, layout="original")
    again = load_params(tmp_path / "back", KIND, nano.sizes)
    jax.tree.map(np.testing.assert_array_equal, stored, again)
