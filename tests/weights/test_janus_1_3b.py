"""Janus-1.3B: its tokenizer has no tokens for roles, and may lack that of images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from corl_jax.policies import inspect_policy
from corl_jax.policies.janus.checkpoint import KIND
from corl_jax.policies.janus.tokens import STRINGS, special_tokens
from corl_jax.weights.export import convert
from tests.support.tiny_models import tiny_image
from tests.support.weight_files import (
    SPECIALS,
    assert_same_bits,
    carried_state,
    hf_shapes,
    random_state,
    read_state,
    to_original,
    write_checkpoint,
    write_tokenizer,
)

QUESTION = "How many items in this image?"


@pytest.fixture(scope="module")
def state():
    return {**to_original(random_state(hf_shapes())), **carried_state()}


@pytest.fixture(scope="module")
def released(tmp_path_factory, state) -> Path:
    folder = tmp_path_factory.mktemp("released") / "Janus-1.3B"
    write_checkpoint(folder, state, "original", tokenizer=False)
    write_tokenizer(folder, "original", roles=False, image=False)
    return folder


@pytest.fixture(scope="module")
def folders(released, tmp_path_factory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("converted")
    convert(released, out / "jax", KIND, layout="jax")
    convert(released, out / "transformers", KIND, layout="transformers")
    return {"original": released, "jax": out / "jax", "transformers": out / "transformers"}


@pytest.mark.parametrize("layout", ["original", "jax", "transformers"])
def test_roles_and_ids_are_the_same_in_every_layout(folders, layout):
    processor = inspect_policy(folders[layout]).processor
    # Behind all others, where the original package puts it.
    assert processor.special.image == processor.num_tokens - 1
    assert processor.special == special_tokens(folders["original"])
    assert processor.choose_roles(None).name == "old"
    special = processor.special
    text = processor.answer_ids
    drawing = [special.bos, *text("User: a cat\n\nAssistant:"), special.boi]
    assert processor.t2i_ids("a cat") == drawing
    asked = [special.bos, *text("User: "), special.boi, *[special.image] * 16, special.eoi]
    asked += text(f"\n{QUESTION}\n\nAssistant:")
    assert processor.mm2t_ids(QUESTION) == asked


def test_user_text_cannot_inject_the_image_token_that_is_added(released):
    processor = inspect_policy(released).processor
    ids = processor.mm2t_ids(f"see {STRINGS['image']}")
    assert ids.count(processor.special.image) == 16


@pytest.mark.parametrize("layout", ["jax", "transformers"])
def test_weights_come_back_to_the_bit(folders, state, layout, tmp_path):
    convert(folders[layout], tmp_path / "back", KIND, layout="original")
    if layout == "transformers":  # has no place for the tensors that no layer reads
        state = {key: value for key, value in state.items() if key not in carried_state()}
    assert_same_bits(read_state(tmp_path / "back"), state)
    back = inspect_policy(tmp_path / "back").processor
    assert back.special == special_tokens(folders["original"])
    settings = json.loads((tmp_path / "back" / "processor_config.json").read_text())
    assert settings["sft_format"] == "deepseek_old"


def test_transformers_reads_the_same_prompts(folders):
    pytest.importorskip("torch")
    from transformers import JanusProcessor

    theirs: Any = JanusProcessor.from_pretrained(folders["transformers"])
    ours = inspect_policy(folders["original"]).processor
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
    text = theirs.apply_chat_template([turn], add_generation_prompt=True)
    assert text == f"User: <image_placeholder>\n{QUESTION}\n\nAssistant:"
    batch = theirs(text=[text], images=[tiny_image(0)], return_tensors="np")
    assert batch["input_ids"][0].tolist() == ours.mm2t_ids(QUESTION)
    ids = theirs(text=["User: a cat\n\nAssistant:"], generation_mode="image", return_tensors="np")
    assert ids["input_ids"][0].tolist() == ours.t2i_ids("a cat")


def test_a_tokenizer_of_another_model_is_refused_as_before(tmp_path):
    write_tokenizer(tmp_path, "original", image=False)
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text().replace(SPECIALS["boi"], "<other>"))
    with pytest.raises(Exception, match="has no token '<begin_of_image>'") as caught:
        special_tokens(tmp_path)
    assert "has no token '<image_placeholder>'" in str(caught.value)
