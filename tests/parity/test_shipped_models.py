"""The shipped mini and nano Janus are Janus to transformers too: they load and draw the same."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest

from corl_jax.assets import MINI_JANUS, NANO_JANUS
from corl_jax.policies.choices import sample_keys
from corl_jax.policies.janus import network, sampling
from corl_jax.policies.janus.checkpoint import KIND
from corl_jax.policies.janus.prompts import Processor
from corl_jax.weights.checkpoint import load_config, load_params
from corl_jax.weights.export import convert
from tests.support import draws
from tests.support.tiny_models import encode_prompts

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

PROMPTS = ["a photo of a red circle", "three blue squares"]


class Shipped(NamedTuple):
    folder: Path
    max_mib: float
    parameters: int
    guidance: float  # of its generation_config.json
    max_new_tokens: int
    instruction: str


SHIPPED = {
    "mini": Shipped(MINI_JANUS, 8, 3_793_547, 3.0, 48, "auto"),
    "nano": Shipped(NANO_JANUS, 3, 958_731, 1.5, 20, "none"),
}


@pytest.fixture(scope="module", params=SHIPPED)
def shipped(request):
    return SHIPPED[request.param]


@pytest.fixture(scope="module")
def loaded(shipped):
    config = load_config(shipped.folder, KIND)
    params = load_params(shipped.folder, KIND, config, np.float32)
    return config, params, Processor.from_dir(shipped.folder)


def test_the_checkpoint_is_small_enough_to_ship(shipped, loaded):
    assert sum(file.stat().st_size for file in shipped.folder.iterdir()) < shipped.max_mib * 2**20
    assert sum(leaf.size for leaf in jax.tree.leaves(loaded[1])) == shipped.parameters


def test_transformers_draws_the_same_tokens_greedily(shipped, loaded):
    config, params, processor = loaded
    model, info = transformers.JanusForConditionalGeneration.from_pretrained(
        shipped.folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    encoded = encode_prompts(processor, PROMPTS)
    with jax.default_matmul_precision("highest"):
        ours = sampling.sample_images(
            config, params, encoded, sample_keys(0, np.arange(2), 1),
            special=processor.special, cfg_scale=shipped.guidance, greedy=True, dtype=np.float32,
        )  # fmt: skip
    try:
        theirs = model.generate(
            torch.from_numpy(encoded.input_ids).long(),
            attention_mask=torch.from_numpy(encoded.attention_mask).long(),
            generation_mode="image",
            do_sample=False,
            guidance_scale=shipped.guidance,
        )
    except TypeError as error:
        if "prefill_chunk_size" not in str(error):
            raise
        pytest.skip("this transformers release cannot draw with Janus at all")
    ids = processor.special.image
    with_prompt, without = (
        draws.full_logits(config, params, prompts, ours.values, ids)
        for prompts in (encoded, draws.without_prompt(encoded, processor.special))
    )
    margins = draws.margins(without + shipped.guidance * (with_prompt - without), ours)
    assert margins.min() > draws.SAFE, "a tie decides nothing: choose other prompts"
    np.testing.assert_array_equal(np.asarray(ours.values), theirs.numpy())


def test_transformers_reads_how_it_is_sampled(shipped):
    """Our own key among them is kept and harms nothing."""
    read = transformers.GenerationConfig.from_pretrained(shipped.folder)
    assert (read.guidance_scale, read.do_sample) == (shipped.guidance, True)
    assert read.max_new_tokens == shipped.max_new_tokens
    assert read.question_instruction == shipped.instruction


def test_both_directions_of_the_conversion_keep_its_bits(shipped, loaded, tmp_path):
    config, _, _ = loaded
    stored = load_params(shipped.folder, KIND, config)
    convert(shipped.folder, tmp_path / "jax", KIND, layout="jax")
    convert(tmp_path / "jax", tmp_path / "back", KIND, layout="transformers")
    again = load_params(tmp_path / "back", KIND, config)
    jax.tree.map(np.testing.assert_array_equal, stored, again)
    assert jax.tree.structure(stored) == jax.tree.structure(network.abstract(config))
