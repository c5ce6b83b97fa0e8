"""Templates, token ids and pixels; parity with transformers' JanusProcessor."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from corl_jax.data.images import MAX_SIDE, BadImage, decode_image
from corl_jax.errors import InputError
from corl_jax.policies.janus.image_settings import preprocess_image, read_vision_geometry
from corl_jax.policies.janus.prompts import Processor
from corl_jax.policies.janus.tokens import STRINGS
from tests.support.tiny_models import (
    encode,
    encode_prompts,
    encode_questions,
    tiny_image,
    tiny_tokenizer_dir,
)

QUESTION = "how many squares are there?\nOptions:\nA. one\nB. two"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return tiny_tokenizer_dir(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def processor(model_dir):
    return Processor.from_dir(model_dir)


def janus_processor(folder, image_size=32, num_image_tokens=16):
    """transformers' own processor over the same tokenizer file; its Pillow image processor."""
    pytest.importorskip("torch")
    from transformers import PreTrainedTokenizerFast
    from transformers.models.janus.processing_janus import JanusProcessor

    try:
        from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil
    except ImportError:  # before the Pillow backend was split off
        from transformers.models.janus.image_processing_janus import (
            JanusImageProcessor as JanusImageProcessorPil,
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        bos_token=STRINGS["bos"],
        eos_token=STRINGS["eos"],
        pad_token=STRINGS["pad"],
        padding_side="left",
        extra_special_tokens={f"{k}_token": STRINGS[k] for k in ("boi", "eoi", "image")},
    )
    images = JanusImageProcessorPil(
        size={"height": image_size, "width": image_size}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return JanusProcessor(images, tokenizer, num_image_tokens=num_image_tokens)


# ---- text


def text_of(processor, ids):
    """The text of a prompt with its special tokens, BOS left out, and an image as one token."""
    assert ids[0] == processor.special.bos
    text = processor.tokenizer.decode(ids[1:])
    image = STRINGS["image"]
    return text.replace(STRINGS["boi"] + image * processor.num_image_tokens + STRINGS["eoi"], image)


def test_templates_to_the_letter(processor):
    drawing = "<|User|>: a cat\n\n<|Assistant|>:<begin_of_image>"
    assert text_of(processor, processor.t2i_ids("  a cat \n")) == drawing
    expected = "<|User|>: <image_placeholder>\nwhat?\n\n<|Assistant|>:"
    assert text_of(processor, processor.mm2t_ids("what?")) == expected
    brief = processor.mm2t_ids("what?", "Be brief.")
    assert text_of(processor, brief) == "Be brief.\n\n" + expected


def test_several_images_come_before_the_text(processor):
    columns = {"qa_problem": "what? ", "num_images": 2, "lead": ""}
    ids = processor.prompt_ids("question", columns, "Be brief.")
    expected = "Be brief.\n\n<|User|>: <image_placeholder><image_placeholder>what?\n\n"
    assert text_of(processor, ids) == expected + "<|Assistant|>:"
    old = processor.choose_roles("old").processor
    text = "\nwhat?\nA. x\n\nAnswer the question directly. "
    ids = old.prompt_ids("question", columns | {"qa_problem": text, "num_images": 1})
    expected = f"User: <image_placeholder>{text.rstrip()}\n\nAssistant:"
    assert text_of(processor, ids) == expected
    ids = processor.prompt_ids("question", columns)
    one = {"qa_problem": "what?"}
    assert processor.prompt_ids("question", one) == processor.mm2t_ids("what?")
    images = [[tiny_image(0), tiny_image(1)], [tiny_image(1), tiny_image(0)]]
    pixels = processor.encode("question", [ids, ids], images).pixel_values
    assert pixels.shape[:2] == (2, 2) and np.array_equal(pixels[0, 0], pixels[1, 1])
    assert not np.array_equal(pixels[0, 0], pixels[0, 1])


def test_padded_ids_equal_transformers(processor, model_dir):
    reference = janus_processor(model_dir)
    prompts = ["a cat", "two blue squares left of a yellow shape — ünïcode 🙂"]
    ours = encode_prompts(processor, prompts)
    bare = [f"<|User|>: {p}\n\n<|Assistant|>:" for p in prompts]
    theirs = reference(text=bare, generation_mode="image", padding=True, return_tensors="np")
    check_left_padded(ours, theirs)

    questions = ["what?", QUESTION]
    images = [tiny_image(0), tiny_image(1)]
    for system in ("", "You are a helpful assistant."):
        ours = encode_questions(processor, questions, images, system_prompt=system)
        start = f"{system}\n\n" if system else ""
        texts = [f"{start}<|User|>: <image_placeholder>\n{q}\n\n<|Assistant|>:" for q in questions]
        theirs = reference(text=texts, images=images, padding=True, return_tensors="np")
        check_left_padded(ours, theirs)
        pixels = np.transpose(theirs["pixel_values"], (0, 2, 3, 1))
        np.testing.assert_allclose(ours.pixel_values, pixels, atol=1e-6)


def check_left_padded(ours, theirs):
    """Equal on their shorter length; what ours has before is padding."""
    width = np.asarray(theirs["input_ids"]).shape[1]
    np.testing.assert_array_equal(ours.input_ids[:, -width:], theirs["input_ids"])
    np.testing.assert_array_equal(ours.attention_mask[:, -width:], theirs["attention_mask"])
    assert not ours.attention_mask[:, :-width].any()
    assert ours.input_ids.dtype == np.int32 and ours.attention_mask.dtype == bool


def test_image_expansion_and_bos_once(processor):
    special = processor.special
    encoded = encode_questions(processor, ["what?"], [tiny_image(0)])
    ids = encoded.input_ids[0][encoded.attention_mask[0]].tolist()
    assert ids[0] == special.bos and ids.count(special.bos) == 1
    slots = [i for i, token in enumerate(ids) if token == special.image]
    assert slots == list(range(slots[0], slots[0] + 16))
    assert ids[slots[0] - 1] == special.boi and ids[slots[-1] + 1] == special.eoi
    drawing = processor.t2i_ids("a cat")
    assert drawing[0] == special.bos and drawing[-1] == special.boi


def test_bos_does_not_depend_on_the_post_processor(tmp_path, processor):
    bare = Processor.from_dir(tiny_tokenizer_dir(tmp_path, adds_bos=False))
    assert bare.t2i_ids("a cat") == processor.t2i_ids("a cat")
    assert bare.mm2t_ids(QUESTION) == processor.mm2t_ids(QUESTION)


@pytest.mark.parametrize("string", [*STRINGS.values(), "<|User|>", "<|Assistant|>"])
def test_user_text_cannot_inject_structure(processor, string):
    clean, dirty = processor.mm2t_ids("is a here?"), processor.mm2t_ids(f"is {string} here?")
    token = processor.tokenizer.convert_tokens_to_ids(string)
    assert dirty.count(token) == clean.count(token)
    assert processor.t2i_ids(string).count(token) == processor.t2i_ids("a").count(token)
    start = dirty.index(processor.special.eoi) + 1
    kept = [i for i in dirty[start:] if i < len(STRINGS) + 2]
    assert kept == [processor.tokenizer.convert_tokens_to_ids("<|Assistant|>")]
    assert string in processor.decode([i for i in dirty[start:] if i not in kept])
    system = processor.mm2t_ids("what?", system_prompt=f"obey {string}")
    assert system.count(processor.special.image) == processor.num_image_tokens


def test_injection_is_closed_when_the_file_does_not_flag_the_tokens(tmp_path, processor):
    folder = tiny_tokenizer_dir(tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        token["special"] = False
    (folder / "tokenizer.json").write_text(json.dumps(content))
    unflagged = Processor.from_dir(folder)
    text = "see <image_placeholder> and <|User|>"
    assert unflagged.mm2t_ids(text) == processor.mm2t_ids(text)


def test_old_template_for_a_tokenizer_without_role_tokens(tmp_path):
    folder = tiny_tokenizer_dir(tmp_path, role_tokens=False, sft_format=None)
    old = Processor.from_dir(folder)
    expected = "User: <image_placeholder>\nq?\n\nAssistant:"
    assert text_of(old, old.mm2t_ids("q?")) == expected
    # As the first files of Janus-1.3B may state it, when these were the roles of `deepseek`.
    first = Processor.from_dir(tiny_tokenizer_dir(tmp_path / "f", role_tokens=False))
    assert text_of(first, first.mm2t_ids("q?")) == expected
    stated = Processor.from_dir(tiny_tokenizer_dir(tmp_path / "s", sft_format="deepseek_old"))
    assert [stated.choose_roles(name).name for name in (None, "pro")] == ["old", "pro"]
    drawing = "User: a cat\n\nAssistant:<begin_of_image>"
    assert text_of(stated, stated.t2i_ids("a cat")) == drawing
    with pytest.raises(InputError, match="llama-2"):
        Processor.from_dir(tiny_tokenizer_dir(tmp_path / "x", sft_format="llama-2"))


def test_lengths_are_buckets_and_never_cut(processor):
    assert [processor.bucket(n) for n in (1, 32, 33)] == [32, 32, 64]
    assert encode_prompts(processor, ["a cat"], length=40).input_ids.shape == (1, 40)
    with pytest.raises(InputError) as error:
        encode_prompts(processor, ["a", "a cat " * 40, "b " * 90], length=40)
    assert [problem[:8] for problem in error.value.problems] == ["prompt 1", "prompt 2"]


def test_decode_skips_special_tokens(processor):
    ids = [*processor.tokenizer.encode(" two squares ?", add_special_tokens=False)]
    assert processor.decode([processor.special.bos, *ids, processor.special.eos]) == (
        " two squares ?"
    )


# ---- model directories


def test_from_dir_reads_either_layout(tmp_path, processor):
    other = Processor.from_dir(tiny_tokenizer_dir(tmp_path, layout="transformers"))
    assert other.image == processor.image and other.special == processor.special
    assert (other.image_size, other.num_image_tokens) == (32, 16)


def test_vision_geometry_of_each_config():
    original = {"params": {"image_size": 384, "model_name": "siglip_large_patch16_384"}}
    assert read_vision_geometry({"vision_config": original}) == (384, 576)
    mini = {"params": {"image_size": 64, "patch_size": 8, "model_name": "siglip_large_patch16_384"}}
    assert read_vision_geometry({"vision_config": mini}) == (64, 64)
    assert read_vision_geometry({"vision_config": {"image_size": 64, "patch_size": 16}}) == (64, 16)
    assert read_vision_geometry({"janus": {"siglip": {"image_size": 64, "patch_size": 8}}}) == (
        64,
        64,
    )
    assert read_vision_geometry({}) == (None, None)


def test_from_dir_lists_every_problem(tmp_path):
    folder = tiny_tokenizer_dir(tmp_path)
    (folder / "tokenizer.json").unlink()
    (folder / "preprocessor_config.json").write_text('{"image_size": 32, "resample": 0}')
    (folder / "config.json").write_text('{"vision_config": {"image_size": 48, "patch_size": 8}}')
    with pytest.raises(InputError) as error:
        Processor.from_dir(folder)
    text = str(error.value)
    for part in ("tokenizer.json", "resample", "image_mean", "image_std", "48", "36"):
        assert part in text


def test_missing_special_tokens_are_all_named(tmp_path):
    folder = tiny_tokenizer_dir(tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["post_processor"] = None
    gone = {STRINGS["pad"], STRINGS["image"]}
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] not in gone]
    for string in gone:
        del content["model"]["vocab"][string]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError) as error:
        Processor.from_dir(folder)
    assert len(error.value.problems) == 2
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        Processor.from_dir(folder)


# ---- pixels


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (64, 48), (40, 80), (500, 20)])
def test_pixels_equal_transformers_where_rounding_agrees(processor, model_dir, size):
    image = tiny_image(3, size)
    pixels = processor.preprocess_image(image)
    assert pixels.shape == (32, 32, 3) and pixels.dtype == np.float32
    theirs = janus_processor(model_dir).image_processor(image, return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(pixels, np.transpose(theirs[0], (1, 2, 0)), atol=1e-6)


def test_resize_truncates_and_centres_on_grey(processor):
    pixels = preprocess_image(Image.new("RGB", (9, 7), "white"), processor.image)
    rows = np.flatnonzero((pixels == 1).all((1, 2)))  # int(7 / 9 * 32) = 24 rows, (32 - 24) // 2
    assert rows.tolist() == list(range(4, 28))
    np.testing.assert_allclose(pixels[0, 0], (127 / 255 - 0.5) / 0.5, atol=1e-6)


# ---- hostile and unusual pictures


def test_modes_become_rgb():
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert decode_image(encode(clear)).getpixel((0, 0)) == (255, 255, 255)
    half = Image.new("LA", (4, 4), (0, 128))
    assert decode_image(encode(half)).getpixel((0, 0)) == (127, 127, 127)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert decode_image(encode(palette, "GIF")).getpixel((0, 0)) == (10, 20, 30)
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    red = decode_image(encode(cmyk, "JPEG")).getpixel((0, 0))
    assert red[0] > 200 and max(red[1:]) < 60
    assert decode_image(encode(Image.new("L", (4, 4), 77))).getpixel((0, 0)) == (77,) * 3
    deep = Image.fromarray(np.full((4, 4), 40000, np.uint16))
    assert decode_image(encode(deep)).getpixel((0, 0)) == (156,) * 3
    assert decode_image(encode(Image.new("1", (4, 4), 1))).getpixel((0, 0)) == (255,) * 3


def test_exif_rotation_and_first_frame(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn
    data = encode(Image.new("RGB", (8, 4), "red"), "JPEG", exif=exif)
    assert decode_image({"bytes": data, "path": None}).size == (4, 8)
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    animated = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_image(animated).getpixel((0, 0)) == (255, 0, 0)
    (tmp_path / "a.png").write_bytes(encode(frames[1]))
    assert decode_image(tmp_path / "a.png").getpixel((0, 0)) == (0, 0, 255)
    assert decode_image(Image.new("L", (3, 3))).mode == "RGB"


BAD = {
    "null": (None, "null"),
    "empty": (b"", "0 bytes"),
    "header only": (encode(tiny_image(0), "JPEG")[:200], "truncated"),
    "text": (b"not a picture at all", "not a pictur"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "<svg"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n", "%!PS"),
    "path only": ({"bytes": None, "path": "x.png"}, "x.png"),
    "number": (7, "int"),
    "truncated": (encode(tiny_image(0, (64, 64)), "JPEG")[:-300], "truncated"),
    "ppm": (encode(tiny_image(0), "PPM"), "not one of"),
    "float": (Image.new("F", (4, 4)), "float"),
    "line": (encode(Image.new("1", (MAX_SIDE + 1, 1))), "a side"),
    "missing file": ("/nowhere/x.png", "cannot read"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_images_say_what_was_found(name):
    value, message = BAD[name]
    with pytest.raises(BadImage) as error:
        decode_image(value)
    assert message in str(error.value)


def test_a_bomb_is_refused_before_decoding(monkeypatch):
    bomb = encode(Image.new("1", (9000, 9000)))
    assert len(bomb) < 20_000
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(BadImage, match="9000x9000"):
        decode_image(bomb)


def test_a_lone_surrogate_is_refused_where_texts_become_tokens(processor):
    for encode_text in (processor.t2i_ids, processor.mm2t_ids, processor.answer_ids):
        with pytest.raises(InputError, match="holds a lone surrogate"):
            encode_text("a \ud83d b")
    with pytest.raises(InputError, match="surrogate"):
        processor.mm2t_ids("a", "system \udc80")


def test_from_dir_reads_what_transformers_saves(tmp_path, model_dir, processor):
    janus_processor(model_dir).save_pretrained(tmp_path)
    saved = Processor.from_dir(tmp_path)
    assert saved.image == processor.image and saved.special == processor.special
    assert saved.mm2t_ids(QUESTION) == processor.mm2t_ids(QUESTION)
    assert saved.t2i_ids("a cat") == processor.t2i_ids("a cat")


@pytest.mark.parametrize(
    "vision",
    [
        {"model_type": "janus", "vision_config": {"image_size": [64, 64], "patch_size": 16}},
        {
            "model_type": "multi_modality",
            "vision_config": {"params": {"image_size": [64, 64], "patch_size": 16}},
        },
    ],
)
def test_vision_geometry_of_square_lists(vision):
    assert read_vision_geometry(vision) == (64, 16)


def test_vision_geometry_of_absent_sections():
    """Which then have the defaults that the weights' config has."""
    for vision in ({"params": None}, {}, None):
        config = {"model_type": "multi_modality", "vision_config": vision}
        assert read_vision_geometry(config) == (384, 576)


def test_null_settings_are_absent_settings(tmp_path, processor):
    folder = tiny_tokenizer_dir(tmp_path)
    pictures = json.loads((folder / "preprocessor_config.json").read_text())
    pictures |= {"image_size": [32, 32], "min_size": None}
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures))
    settings = json.loads((folder / "processor_config.json").read_text())
    settings |= {"image_processor": None}
    (folder / "processor_config.json").write_text(json.dumps(settings))
    assert Processor.from_dir(folder).image == processor.image


def test_malformed_settings_are_all_named(tmp_path):
    folder = tiny_tokenizer_dir(tmp_path)
    pictures = {"image_size": [32, 16], "image_mean": ["a"] * 3, "image_std": 0.5, "min_size": "x"}
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures))
    settings = {"image_processor": [1], "num_image_tokens": "16"}
    (folder / "processor_config.json").write_text(json.dumps(settings))
    data = {"model_type": "janus", "vision_config": {"image_size": [64, 32]}}
    (folder / "config.json").write_text(json.dumps(data))
    with pytest.raises(InputError) as error:
        Processor.from_dir(folder)
    text = str(error.value)
    for part in (
        "image_processor is [1]", "num_image_tokens is '16'", "image size is [32, 16]",
        "image_mean is ['a', 'a', 'a']", "min_size is 'x'", "vision_config: image_size is [64, 32]",
    ):  # fmt: skip
        assert part in text, part
