"""The shipped mini Janus is a Janus to transformers too: it loads there and draws the same."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from corl_jax import sampling
from corl_jax.assets import MINI_JANUS
from corl_jax.data.processor import Processor
from corl_jax.models import janus
from corl_jax.weights import files
from tests import draws

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

PROMPTS = ["a photo of a red circle", "three blue squares"]


@pytest.fixture(scope="module")
def mini():
    config = files.load_config(MINI_JANUS)
    return config, files.load_params(MINI_JANUS, config, np.float32), Processor.from_dir(MINI_JANUS)


def test_the_checkpoint_is_small_enough_to_ship():
    assert sum(file.stat().st_size for file in MINI_JANUS.iterdir()) < 8 * 2**20


def test_transformers_draws_the_same_tokens_greedily(mini):
    config, params, processor = mini
    model, info = transformers.JanusForConditionalGeneration.from_pretrained(
        MINI_JANUS, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    encoded = processor.encode_t2i(PROMPTS)
    with jax.default_matmul_precision("highest"):
        ours = sampling.sample_images(
            config, params, encoded, sampling.sample_keys(0, np.arange(2), 1),
            special=processor.special, cfg_scale=5.0, greedy=True, dtype=np.float32,
        )  # fmt: skip
    try:
        theirs = model.generate(
            torch.from_numpy(encoded.input_ids).long(),
            attention_mask=torch.from_numpy(encoded.attention_mask).long(),
            generation_mode="image",
            do_sample=False,
            guidance_scale=5.0,
        )
    except TypeError as error:
        if "prefill_chunk_size" not in str(error):
            raise
        pytest.skip("this transformers release cannot draw with Janus at all")
    ids = processor.special.image
    with_prompt, without = (
        draws.full_logits(config, params, prompts, ours.tokens, ids)
        for prompts in (encoded, draws.without_prompt(encoded, processor.special))
    )
    margins = draws.margins(without + 5.0 * (with_prompt - without), ours)
    assert margins.min() > draws.SAFE, "a tie decides nothing: choose other prompts"
    np.testing.assert_array_equal(np.asarray(ours.tokens), theirs.numpy())


def test_transformers_reads_how_it_is_sampled():
    """Our own key among them is kept and harms nothing."""
    read = transformers.GenerationConfig.from_pretrained(MINI_JANUS)
    assert (read.guidance_scale, read.max_new_tokens, read.do_sample) == (3.0, 48, True)
    assert read.question_instruction == "auto"


def test_both_directions_of_the_conversion_keep_its_bits(mini, tmp_path):
    config, _, _ = mini
    stored = files.load_params(MINI_JANUS, config)
    files.convert(MINI_JANUS, tmp_path / "jax", layout="jax")
    files.convert(tmp_path / "jax", tmp_path / "back", layout="transformers")
    again = files.load_params(tmp_path / "back", config)
    jax.tree.map(np.testing.assert_array_equal, stored, again)
    assert jax.tree.structure(stored) == jax.tree.structure(janus.abstract(config))
