"""JanusFlow's prompts, to the letter of its processor."""

from __future__ import annotations

import json

import numpy as np
import pytest

from corl_jax.errors import InputError
from corl_jax.policies.janus.prompts import Processor as JanusProcessor
from corl_jax.policies.janus.tokens import STRINGS
from corl_jax.policies.janus_flow.checkpoint import KIND
from corl_jax.policies.janus_flow.prompts import SYSTEM_PROMPT, Processor
from corl_jax.weights.export import convert
from tests.support.janus_flow_files import make_config, original_folder, write_small_files
from tests.support.tiny_models import tiny_image, tiny_tokenizer_dir


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_small_files(tmp_path_factory.mktemp("flow"))


@pytest.fixture(scope="module")
def processor(folder):
    return Processor.from_dir(folder)


def text_of(processor, ids):
    """The text of a prompt with its special tokens, BOS left out."""
    assert ids[0] == processor.special.bos
    return processor.tokenizer.decode(ids[1:])


def test_an_image_follows_its_prompt_without_a_tag(processor):
    ids = processor.prompt_ids("generate", {"prompt": "  a cat \n"})
    assert text_of(processor, ids) == "User: a cat\n\nAssistant:"
    assert processor.special.boi not in ids
    # As the original: the whole text with its tag, without the tag.
    tag = STRINGS["boi"]
    whole = processor.tokenizer.encode(f"User: a cat\n\nAssistant:{tag}")
    assert whole == [*ids, processor.special.boi]


def test_a_question_has_the_models_system_prompt(processor):
    image = STRINGS["boi"] + STRINGS["image"] * 16 + STRINGS["eoi"]
    question = f"User: {image}\nwhat?\n\nAssistant:"
    for ids in (
        processor.mm2t_ids("what? "),
        processor.prompt_ids("question", {"qa_problem": "what?"}),
    ):
        assert text_of(processor, ids) == f"{SYSTEM_PROMPT}\n\n{question}"
    ids = processor.prompt_ids("question", {"qa_problem": "what?"}, "Be brief.")
    assert text_of(processor, ids) == f"Be brief.\n\n{question}"
    assert text_of(processor, processor.mm2t_ids("what?", "")) == question
    assert SYSTEM_PROMPT.startswith("You are a helpful language and vision assistant. You are able")


def test_text_of_a_user_makes_no_image(processor):
    """The network replaces every BOI, so none may come from a text."""
    text = "<begin_of_image> and <image_placeholder>"
    assert processor.special.boi not in processor.t2i_ids(text)
    ids = processor.mm2t_ids(text)
    assert ids.count(processor.special.boi) == 1 and ids.count(processor.special.image) == 16


def test_roles_are_words_even_if_the_tokenizer_has_role_tokens(tmp_path):
    tiny_tokenizer_dir(tmp_path, image_size=16, patch_size=4)
    (tmp_path / "config.json").write_text(json.dumps(make_config()))
    ids = Processor.from_dir(tmp_path).t2i_ids("a cat")
    assert text_of(Processor.from_dir(tmp_path), ids) == "User: a cat\n\nAssistant:"


def test_batches_are_padded_on_the_left_with_pixels_as_janus_makes_them(processor, folder):
    ids = [processor.mm2t_ids("what?"), processor.mm2t_ids("how many red squares are there?")]
    images = [tiny_image(0), tiny_image(1, (20, 32))]
    batch = processor.encode("question", ids, images)
    assert batch.input_ids.shape[1] % processor.bucket_size == 0
    for row, mask, unpadded in zip(batch.input_ids, batch.attention_mask, ids, strict=True):
        assert row[-len(unpadded) :].tolist() == unpadded and mask.sum() == len(unpadded)
    janus = JanusProcessor(folder, processor.image)
    np.testing.assert_array_equal(batch.pixel_values[1], janus.preprocess_image(images[1]))
    assert batch.pixel_values.shape == (2, 16, 16, 3)


def test_other_kinds_of_prompts_are_no_templates_of_this_model(processor):
    with pytest.raises(AssertionError, match="caption"):
        processor.prompt_ids("caption", {"prompt": "a cat"})


def test_a_converted_folder_has_the_same_prompts(tmp_path):
    source = original_folder(tmp_path / "flow")
    convert(source, tmp_path / "jax", KIND)
    first, second = Processor.from_dir(source), Processor.from_dir(tmp_path / "jax")
    assert first.image == second.image and first.special == second.special
    assert first.mm2t_ids("what?") == second.mm2t_ids("what?")


def test_sizes_that_disagree_are_refused(tmp_path):
    write_small_files(tmp_path)
    file = tmp_path / "processor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_image_tokens": 25}))
    with pytest.raises(InputError, match="image tokens is 25 in the processor files and 16"):
        Processor.from_dir(tmp_path)
