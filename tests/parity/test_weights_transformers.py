"""What we write in transformers' layout, transformers' own classes load and run."""

from __future__ import annotations

import json

import numpy as np
import pytest

from corl_jax.policies.janus.checkpoint import KIND
from corl_jax.policies.janus.tokens import special_tokens
from corl_jax.weights.export import convert
from tests.support.weight_files import (
    SPECIALS,
    carried_state,
    hf_config_dict,
    hf_shapes,
    random_state,
    to_original,
    write_checkpoint,
    write_tokenizer,
)

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def state():
    return {key: value.astype(np.float32) for key, value in random_state(hf_shapes()).items()}


@pytest.fixture(scope="module")
def original(tmp_path_factory, state):
    folder = tmp_path_factory.mktemp("parity") / "original"
    return write_checkpoint(folder, {**to_original(state), **carried_state()}, "original")


@pytest.fixture(scope="module")
def crossed(tmp_path_factory, original):
    out = tmp_path_factory.mktemp("parity") / "hf"
    convert(original, out, KIND, layout="transformers", max_shard_bytes=10**6)
    return out


@pytest.fixture(scope="module")
def model(crossed):
    model, info = transformers.JanusForConditionalGeneration.from_pretrained(
        crossed, output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


def test_the_class_loads_every_tensor_to_the_bit(model, state):
    loaded = model.state_dict()
    assert loaded.keys() == state.keys()
    for key, value in state.items():
        np.testing.assert_array_equal(loaded[key].numpy(), value, err_msg=key)
    assert not model.config.tie_word_embeddings
    assert model.lm_head.weight.data_ptr() != model.get_input_embeddings().weight.data_ptr()


def test_a_checkpoint_that_the_class_saved_converts_exactly(tmp_path, state):
    config = transformers.JanusConfig.from_dict(hf_config_dict())
    saved = transformers.JanusForConditionalGeneration(config)
    saved.save_pretrained(tmp_path / "hf")
    write_tokenizer(tmp_path / "hf", "transformers")
    convert(tmp_path / "hf", tmp_path / "jax", KIND, layout="jax")
    convert(tmp_path / "jax", tmp_path / "back", KIND, layout="transformers")
    again = transformers.JanusForConditionalGeneration.from_pretrained(tmp_path / "back")
    for key, value in saved.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


def test_the_processor_loads_and_encodes_as_janus_does(crossed):
    processor = transformers.JanusProcessor.from_pretrained(crossed)
    ids = special_tokens(crossed)
    message = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": message}], add_generation_prompt=True
    )
    assert text == "<|User|>: <image_placeholder>\nWhat is it?\n\n<|Assistant|>:"
    picture = np.full((20, 32, 3), 255, np.uint8)
    batch = processor(text=[text], images=[picture], return_tensors="pt")
    row = batch["input_ids"][0].tolist()
    assert row[0] == ids.bos
    assert row.count(ids.bos) == 1
    start = row.index(ids.boi)
    assert row[start : start + 18] == [ids.boi, *[ids.image] * 16, ids.eoi]
    assert batch["pixel_values"].shape == (1, 3, 32, 32)
    assert batch["pixel_values"].max() == pytest.approx(1.0)  # mean and std are 0.5


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_the_chat_template_is_the_specifications(crossed, system):
    processor = transformers.JanusProcessor.from_pretrained(crossed)
    turns = [{"role": "system", "content": system}] if system else []
    turns += [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": [{"type": "text", "text": " Two? "}]},
    ]
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    body = f"<|User|>: One?\n\n<|Assistant|>: Yes.{SPECIALS['eos']}<|User|>: Two?\n\n<|Assistant|>:"
    assert text == (f"{system}\n\n{body}" if system else body)


def test_image_and_text_generation_run_from_the_written_configs(crossed, model):
    processor = transformers.JanusProcessor.from_pretrained(crossed)
    generation = transformers.GenerationConfig.from_pretrained(crossed)
    assert generation.generation_kwargs == {"boi_token_id": special_tokens(crossed).boi}
    batch = processor(
        text=["<|User|>: a dot\n\n<|Assistant|>:"], generation_mode="image", return_tensors="pt"
    )
    with torch.no_grad():
        tokens = model.generate(**batch, generation_mode="image")
        text = model.generate(**batch, max_new_tokens=3)
    assert tokens.shape == (1, 16)
    assert int(tokens.max()) < 56
    assert text.shape[1] > batch["input_ids"].shape[1]


def test_a_tokenizer_without_role_tokens_gets_the_older_template(tmp_path, state):
    """Janus-1.3B."""
    source = write_checkpoint(tmp_path / "o", to_original(state), "original", tokenizer=False)
    write_tokenizer(source, "original", roles=False)
    convert(source, tmp_path / "hf", KIND, layout="transformers")
    processor = transformers.JanusProcessor.from_pretrained(tmp_path / "hf")
    turns = [{"role": "user", "content": "Hi"}]
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    assert text == "User: Hi\n\nAssistant:"
    convert(tmp_path / "hf", tmp_path / "back", KIND, layout="original")
    written = json.loads((tmp_path / "back" / "processor_config.json").read_text())
    assert written["sft_format"] == "deepseek_old"
