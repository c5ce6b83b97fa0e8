"""The shipped nano Show-o: its size, its files for the original code, and transformers on them."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from corl_jax.assets import NANO_SHOW_O
from corl_jax.policies import load_policy
from corl_jax.policies.show_o import network
from corl_jax.policies.show_o.checkpoint import KIND
from corl_jax.policies.show_o.tokens import CONTROLS, PAD
from corl_jax.weights.checkpoint import load_params
from corl_jax.weights.export import convert
from tests.support.show_o_masks import make_generation_mask
from tests.support.tolerances import NETWORK

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

MAX_MIB = 3
FILES = {
    "config.json", "generation_config.json", "pytorch_model.safetensors", "magvitv2/config.json",
    "magvitv2/pytorch_model.safetensors", "phi-1_5/config.json", "phi-1_5/tokenizer.json",
    "phi-1_5/tokenizer_config.json",
}  # fmt: skip


@pytest.fixture(scope="module")
def nano():
    return load_policy("nano-show-o", jnp.float32)


def test_the_files_are_those_of_the_original_and_small_enough_to_ship():
    files = [file for file in NANO_SHOW_O.rglob("*") if file.is_file()]
    assert {file.relative_to(NANO_SHOW_O).as_posix() for file in files} == FILES
    assert sum(file.stat().st_size for file in files) < MAX_MIB * 2**20


def test_transformers_phi_gives_the_same_logits_under_the_mask_of_drawing(nano):
    from safetensors.torch import load_file

    from tests.parity.torch_show_o import additive

    stored = load_file(NANO_SHOW_O / "pytorch_model.safetensors")
    prefix = "showo."
    state = {name.removeprefix(prefix): x.float() for name, x in stored.items()}
    assert all(name.startswith(prefix) for name in stored)
    config = transformers.PhiConfig.from_pretrained(NANO_SHOW_O / "phi-1_5")
    config._attn_implementation = "eager"
    phi = transformers.PhiForCausalLM(config).float().eval()
    phi.load_state_dict(state)

    prompts, special = ("a photo of a red circle", "three blue squares"), nano.processor.special
    texts = nano.processor.pad([nano.processor.t2i_ids(text) for text in prompts]).input_ids
    image = np.full((2, 16), special.mask)
    image[:, ::3] = special.first_code + np.arange(6)  # a part is known
    ends = np.full((2, 1), special.soi), np.full((2, 1), special.eoi)
    ids = np.concatenate([texts, ends[0], image, ends[1]], axis=1)
    mask = np.array(make_generation_mask(jnp.asarray(ids), special))
    with torch.no_grad():
        theirs = phi(torch.from_numpy(ids).long(), attention_mask=additive(mask)).logits

    def compute(params):
        model = network.bind(nano.sizes, params)
        hidden = model.language_model(model.embed_text(jnp.asarray(ids)), jnp.asarray(mask))
        return model.text_logits(hidden)

    with jax.default_matmul_precision("highest"):
        ours = jax.jit(compute)(nano.params)
    real = ids != special.pad
    np.testing.assert_allclose(np.asarray(ours)[real], theirs.numpy()[real], atol=10 * NETWORK)


def test_transformers_opens_the_tokenizer_with_the_tokens_of_show_o(nano):
    tokenizer = transformers.AutoTokenizer.from_pretrained(NANO_SHOW_O / "phi-1_5")
    special = nano.processor.special
    assert tokenizer.convert_tokens_to_ids([PAD, *CONTROLS]) == [
        special.pad + place for place in range(10)
    ]
    # What the original takes for the id of the first code.
    assert len(tokenizer) == special.first_code == nano.sizes.image_offset
    text = "a red circle left of a blue cross"
    assert [special.t2i, special.eos, *tokenizer(text).input_ids, special.eos] == (
        nano.processor.t2i_ids(text)
    )


def test_it_states_how_it_is_sampled():
    stated = json.loads((NANO_SHOW_O / "generation_config.json").read_text())
    assert stated["guidance_scale"] == 1.5 and stated["max_new_tokens"] == 20


def test_both_directions_of_the_conversion_keep_its_bits(nano, tmp_path):
    stored = load_params(NANO_SHOW_O, KIND, nano.sizes)
    convert(NANO_SHOW_O, tmp_path / "jax", KIND, layout="jax")
    convert(tmp_path / "jax", tmp_path / "back", KIND, layout="original")
    again = load_params(tmp_path / "back", KIND, nano.sizes)
    jax.tree.map(np.testing.assert_array_equal, stored, again)
