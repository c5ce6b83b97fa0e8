"""Show-o's sequences, control tokens and pixels."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from PIL import Image

from corl_jax.errors import InputError
from corl_jax.policies.show_o.prompts import ImageSettings, Processor, preprocess_image
from corl_jax.policies.show_o.tokens import CONTROLS, END, PAD, SpecialTokens, make_special_tokens
from tests.support import tiny_show_o
from tests.support.tiny_models import tiny_image


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_show_o.tokenizer_dir(tmp_path_factory.mktemp("show_o"))


@pytest.fixture(scope="module")
def processor(folder):
    return tiny_show_o.processor(folder, bucket_size=8)


def test_control_tokens_follow_the_text_in_the_order_of_the_original(processor, folder):
    special, text = processor.special, tiny_show_o.count_tokens(folder)
    assert special.pad == text
    assert (special.soi, special.eoi, special.t2i, special.mmu) == tuple(
        text + place for place in (1, 2, 5, 6)
    )
    assert special.first_code == text + 10 == processor.num_tokens
    assert special.mask == special.first_code + tiny_show_o.CODES
    released = make_special_tokens(50295, 8192)
    assert released == SpecialTokens(50256, 50295, 50296, 50297, 50300, 50301, 50305, 58497)


def save_with_controls(processor, folder, names):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(processor.tokenizer.to_str())
    tokenizer.add_tokens(list(names))
    tokenizer.save(str(folder / "tokenizer.json"))


def test_a_saved_tokenizer_with_control_tokens_has_the_same_ids(processor, tmp_path):
    save_with_controls(processor, tmp_path, (PAD, *CONTROLS))
    again = Processor(tmp_path, processor.special, processor.image)
    assert again.t2i_ids("a red circle") == processor.t2i_ids("a red circle")
    with pytest.raises(InputError, match="a control token of Show-o"):
        again.t2i_ids("a <|soi|>")


def test_tokenizers_of_other_networks_are_refused(processor, folder, tmp_path):
    special = make_special_tokens(100, 8)
    with pytest.raises(InputError, match="tokens of text, the network has 100"):
        Processor(folder, special, processor.image)
    save_with_controls(processor, tmp_path, ["<|soi|>", PAD])
    with pytest.raises(InputError, match=r"token '<\|soi\|>' is"):
        Processor(tmp_path, processor.special, processor.image)
    with pytest.raises(InputError, match=r"tokenizer.json"):
        Processor(tmp_path / "none", special, processor.image)


def test_a_prompt_is_task_start_text_and_end(processor):
    special = processor.special
    text = processor.tokenizer.encode("a red circle").ids
    assert processor.t2i_ids("a red circle") == [special.t2i, special.eos, *text, special.eos]
    assert processor.t2i_ids("") == [special.t2i, special.eos, special.eos]
    # A text that begins with the token gets no second one.
    assert processor.t2i_ids(f"{END}a red circle") == processor.t2i_ids("a red circle")


def test_a_long_prompt_is_cut_before_its_end_token_and_counted(folder, caplog):
    processor = tiny_show_o.processor(folder, max_text=6)
    whole = tiny_show_o.processor(folder).t2i_ids("one two three four five six")
    with caplog.at_level(logging.WARNING):
        assert processor.t2i_ids("one two three four five six") == [*whole[:6], whole[-1]]
        assert processor.num_cut == 1 and "cut to 6 tokens" in caplog.text
        fits = processor.t2i_ids("a")
        assert len(fits) <= 7 and processor.num_cut == 1
        caplog.clear()
        processor.t2i_ids("one two three four five six")
        assert processor.num_cut == 2 and not caplog.text


def test_a_question_has_the_mask_token_at_the_places_of_the_codes(processor):
    special = processor.special
    text = processor.tokenizer.encode("USER: \nhow many? ASSISTANT:").ids
    image = [special.soi, *[special.mask] * tiny_show_o.TOKENS, special.eoi]
    ids = processor.prompt_ids("question", {"qa_problem": "how many?"})
    assert ids == [special.mmu, *image, special.eos, *text]
    joined = processor.tokenizer.encode("USER: \nhow many? ASSISTANT: two").ids
    assert [*text, *processor.answer_ids("two")] == joined


@pytest.mark.parametrize("name", [PAD, *CONTROLS])
def test_texts_with_control_tokens_are_refused(processor, name):
    with pytest.raises(InputError, match="a control token of Show-o; remove it"):
        processor.prompt_ids("generate", {"prompt": f"a {name} b"})
    with pytest.raises(InputError, match="a control token of Show-o; remove it"):
        processor.prompt_ids("question", {"qa_problem": f"a {name} b"})


def test_a_question_about_several_images_is_refused(processor):
    with pytest.raises(InputError, match="found 2 images; a Show-o reads exactly one"):
        processor.prompt_ids("question", {"qa_problem": "which?", "num_images": 2})


def test_prompts_are_padded_on_the_left(processor):
    rows = [processor.t2i_ids("a"), processor.t2i_ids("a red circle and two blue squares")]
    encoded = processor.encode("generate", rows)
    assert encoded.input_ids.shape[1] % 8 == 0 and encoded.pixel_values is None
    for ids, mask, row in zip(encoded.input_ids, encoded.attention_mask, rows, strict=True):
        assert (
            ids[-len(row) :].tolist() == row and mask.sum() == len(row) and mask[-len(row) :].all()
        )
    with pytest.raises(InputError, match="expected at most 3"):
        processor.pad(rows, 3)


def test_decoding_names_control_tokens_and_leaves_out_codes(processor):
    special = processor.special
    words = processor.tokenizer.encode("two squares").ids
    ids = [special.eos, *words, special.first_code + 3, special.mask, special.pad]
    assert processor.decode(ids) == "two squares"
    assert processor.decode([special.eoi, *ids, special.soi, *words]) == (
        "<|eoi|>two squares<|soi|>two squares"
    )


@pytest.mark.parametrize("size", [(64, 64), (100, 75), (75, 101), (32, 64), (641, 90)])
def test_the_short_side_is_resized_and_the_centre_kept(size):
    image = tiny_image(0, size)
    pixels = preprocess_image(image, ImageSettings(64, 16))
    short = min(size)
    width, height = (int(64 * x / short) for x in size)
    resized = image if short == 64 else image.resize((width, height), Image.Resampling.BICUBIC)
    top, left = round((height - 64) / 2), round((width - 64) / 2)
    levels = np.asarray(resized)[top : top + 64, left : left + 64].astype(np.float32)
    assert pixels.dtype == np.float32 and pixels.shape == (64, 64, 3)
    np.testing.assert_array_equal(pixels, (levels / 255 - 0.5) / 0.5)
