"""Captions by BLIP: decoding, image settings, text, and what is refused."""

from __future__ import annotations

import dataclasses
import json

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from corl_jax.devices.mesh import network_shardings
from corl_jax.errors import InputError
from corl_jax.models import modules
from corl_jax.models.blip import Blip, BlipConfig, BlipTextConfig, BlipVisionConfig, DecoderCache
from corl_jax.params import map_with_path
from corl_jax.rewards import captions
from corl_jax.rewards.samples import Network
from corl_jax.weights.layouts import KINDS
from tests.support.tolerances import NETWORK

SEP, BOS = 3, 40
SIZE, POSITIONS = 16, 10
CONFIG = BlipConfig(
    BlipVisionConfig(
        image_size=SIZE, patch_size=4, hidden_size=16, intermediate_size=24, num_layers=2,
        num_heads=2,
    ),
    BlipTextConfig(
        vocab_size=42, hidden_size=24, intermediate_size=32, num_layers=2, num_heads=3,
        max_position_embeddings=POSITIONS, bos_token_id=BOS, sep_token_id=SEP,
        tie_word_embeddings=False,
    ),
)  # fmt: skip
CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
SETTINGS = {"do_normalize": True, "do_resize": True, "resample": 3, **CLIP}
VOCABULARY = [
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "##s", "on", "mat", ".", "'", "s"),
    *(f"word{i}" for i in range(27)),
]
assert len(VOCABULARY) == BOS  # as published: the tokenizer does not know what BLIP added


def write_files(folder, settings=None):
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    settings = SETTINGS | {"size": {"height": SIZE, "width": SIZE}} | (settings or {})
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """Random weights: small words, large image features, and a separator that is drawn at times."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        if path.endswith("/scale"):
            return jnp.asarray((3 if "post_layernorm" in path else 1) + 0.1 * noise)
        if path.endswith("/kernel"):
            return jnp.asarray(noise / np.prod(leaf.shape[-4:-1] or leaf.shape[:1]) ** 0.5)
        return jnp.asarray(0.3 * noise)

    params = map_with_path(draw, modules.make_abstract(Blip, CONFIG))
    bias = params["text_decoder"]["head"]["bias"]
    params["text_decoder"]["head"]["bias"] = bias.at[SEP].set(1.2)
    return Network(CONFIG, params, write_files(tmp_path_factory.mktemp("blip")), jnp.float32)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(1).integers(0, 256, (13, SIZE, SIZE, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def tokens(network, images):
    found = np.asarray(captions.generate_caption_tokens(network, images, max_new_tokens=POSITIONS))
    lengths = (found != SEP).sum(axis=1)
    assert lengths.min() < 4 and lengths.max() == POSITIONS, f"choose another bias: {lengths}"
    return found


# ---- decoding


def test_decoding_with_a_cache_is_the_full_forward(network, images):
    """Logits at every position, of tokens that decoding would not have chosen too."""
    length = 4
    ids = np.random.default_rng(2).integers(0, CONFIG.text.vocab_size, (3, length))

    @jax.jit
    def both(params, pixels, ids):
        model = modules.bind(Blip, CONFIG, params)
        features = model.vision_model(pixels)
        blocks, cache = model.text_decoder.start(features, POSITIONS)
        stepwise = []
        for step in range(length):
            logits, cache = model.text_decoder.decode(blocks, ids[:, step], jnp.int32(step), cache)
            stepwise.append(logits)
        return jnp.stack(stepwise, axis=1), model(pixels, ids)

    stepwise, whole = both(network.params, images[:3].astype(np.float32) / 128 - 1, ids)
    np.testing.assert_allclose(stepwise, whole, atol=NETWORK)
    assert np.std(whole) > 0.3


def test_a_caption_is_greedy(network, images, tokens):
    """Each token is the most likely one after those before it, by the full forward."""
    settings = captions.read_image_settings(network.folder, SIZE)
    ids = np.concatenate([np.full((len(images), 1), BOS), tokens[:, :-1]], axis=1)
    forward = jax.jit(lambda params, *x: modules.bind(Blip, CONFIG, params)(*x))
    logits = forward(network.params, captions.normalise_images(images, settings), ids)
    second, first = np.moveaxis(np.sort(logits, axis=-1)[..., -2:], -1, 0)
    read = np.cumsum(ids == SEP, axis=1) == 0  # what follows the end is not drawn
    assert (first - second)[read].min() > NETWORK, "a tie decides nothing: choose another seed"
    assert (np.asarray(logits).argmax(axis=-1) == tokens)[read].all()


def test_the_separator_ends_a_caption_and_fills_its_row(tokens):
    ended = np.cumsum(tokens == SEP, axis=1) > 0
    assert (tokens[ended] == SEP).all() and 0 < ended.mean() < 1
    assert tokens.dtype == np.int32


@pytest.mark.parametrize("most", [1, 4])
def test_fewer_tokens_are_the_beginning_of_more(network, images, tokens, most):
    found = np.asarray(captions.generate_caption_tokens(network, images, max_new_tokens=most))
    np.testing.assert_array_equal(found, tokens[:, :most])


@dataclasses.dataclass
class Script:
    """A decoder whose most likely tokens are given, [N, T]; it records what it is fed."""

    tokens: np.ndarray
    fed: list[list[int]] = dataclasses.field(default_factory=list)
    config: BlipTextConfig = CONFIG.text

    def start(self, features, length):
        assert length == self.tokens.shape[1]
        return [], DecoderCache([], [])

    def decode(self, blocks, token, step, cache):
        assert int(step) == len(self.fed)
        self.fed.append(token.tolist())
        return jax.nn.one_hot(self.tokens[:, int(step)], self.config.vocab_size), cache


@hypothesis.given(
    arrays(np.int32, st.tuples(st.integers(1, 4), st.integers(1, 6)), elements=st.integers(2, 4))
)
@hypothesis.settings(deadline=None, max_examples=30)
def test_the_loop_of_decoding(tokens):
    """Drawn tokens are fed back, ended rows are filled, and the last end is the end of it."""
    script = Script(tokens)
    with jax.disable_jit():
        found = captions.decode_greedily(script, jnp.zeros((len(tokens), 1, 1)), tokens.shape[1])
    ends = [row.index(SEP) + 1 if SEP in row else len(row) for row in tokens.tolist()]
    expected = [
        [*row[:end], *[SEP] * (len(row) - end)]
        for row, end in zip(tokens.tolist(), ends, strict=True)
    ]
    assert found.tolist() == expected
    assert len(script.fed) == max(ends)
    columns = [list(column) for column in zip(*expected, strict=True)]
    assert script.fed == [[BOS] * len(tokens), *columns][: max(ends)]


def test_pieces_and_devices_change_nothing(network, images, tokens, mesh):
    for chunk in (1, 5):
        found = np.asarray(
            captions.generate_caption_tokens(network, images, max_new_tokens=POSITIONS, chunk=chunk)
        )
        np.testing.assert_array_equal(found, tokens)
    split = jax.device_put(
        network.params, network_shardings(network.params, mesh, KINDS["blip"].rules)
    )
    spread = dataclasses.replace(network, params=split)
    with jax.set_mesh(mesh):
        found = np.asarray(
            captions.generate_caption_tokens(spread, images, max_new_tokens=POSITIONS, chunk=8)
        )
    np.testing.assert_array_equal(found, tokens)


def test_one_program_serves_all_images_of_a_size(network, images):
    program = captions._caption_program.default
    captions.caption_images(network, images[:4], max_new_tokens=3, chunk=2)()
    compiled = program._cache_size()
    captions.caption_images(network, 255 - images[:8], max_new_tokens=3, chunk=2)()
    captions.caption_images(
        dataclasses.replace(network), images[:4, 1:], max_new_tokens=3, chunk=2
    )()
    assert program._cache_size() == compiled


def test_the_parameters_compute_in_the_networks_dtype(network, images):
    half = dataclasses.replace(network, dtype=jnp.bfloat16)
    found = np.asarray(captions.generate_caption_tokens(half, images, max_new_tokens=3))
    cast = jax.tree.map(lambda x: x.astype(jnp.bfloat16), network.params)
    same = np.asarray(
        captions.generate_caption_tokens(
            dataclasses.replace(half, params=cast), images, max_new_tokens=3
        )
    )
    np.testing.assert_array_equal(found, same)


def test_no_images_have_no_captions(network, images):
    assert captions.caption_images(network, images[:0], max_new_tokens=3)() == []


# ---- text


def test_captions_are_the_text_of_their_tokens(network, images, monkeypatch):
    rows = np.full((3, 6), SEP)
    rows[0, :5] = [5, 6, 7, 8, 9]
    rows[1, :3] = [41, 6, 10]  # BLIP's own token is none of the tokenizer's
    monkeypatch.setattr(captions, "generate_caption_tokens", lambda *_, **__: rows)
    assert captions.caption_images(network, images[:3])() == ["a cats on mat", "cat.", ""]


@pytest.mark.parametrize("model_type", ["blip", "corl_jax_network"])
def test_the_tokenizer_does_not_ask_what_the_weights_are(tmp_path, model_type):
    folder = write_files(tmp_path / "model")
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert captions.load_tokenizer(folder, CONFIG.text).decode([5, 6, 7]) == "a cats"


@pytest.mark.parametrize("damage", ["absent", "not JSON", "not a tokenizer"])
def test_a_tokenizer_that_cannot_be_used_is_refused(network, images, tmp_path, damage):
    folder = write_files(tmp_path / "model")
    if damage == "absent":
        (folder / "vocab.txt").unlink()
    else:
        (folder / "tokenizer.json").write_text({"not JSON": "{", "not a tokenizer": "[]"}[damage])
    with pytest.raises(InputError, match=str(folder)):
        captions.caption_images(dataclasses.replace(network, folder=folder), images)()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"bos_token_id": 6},
            r"bos_token_id is 6 in config\.json, by the tokenizer the word 'cat'",
        ),
        ({"sep_token_id": 8}, r"sep_token_id is 8 in config\.json, by the tokenizer the word 'on'"),
        (
            {"sep_token_id": BOS + 1},
            r"sep_token_id is 41 in config\.json, by the tokenizer no token",
        ),
    ],
)
def test_a_caption_starts_and_ends_with_no_word(network, images, changes, expected):
    text = dataclasses.replace(CONFIG.text, **changes)
    other = dataclasses.replace(network, config=dataclasses.replace(CONFIG, text=text))
    with pytest.raises(InputError, match=expected):
        captions.caption_images(other, images)()


def test_a_tokenizer_may_know_the_token_that_starts_a_caption(tmp_path):
    """As BLIP's own code added it; transformers' conversion of the files leaves it out."""
    folder = write_files(tmp_path / "model")
    tokenizer = captions.load_tokenizer(folder, CONFIG.text)
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.save_pretrained(tmp_path / "added")
    added = captions.load_tokenizer(tmp_path / "added", CONFIG.text)
    assert added.convert_tokens_to_ids("[DEC]") == BOS
    first_token = dataclasses.replace(CONFIG.text, bos_token_id=2)  # [CLS], special as well
    captions.load_tokenizer(folder, first_token)


# ---- images


def test_pixels_are_normalised_as_computed_by_hand():
    settings = captions.ImageSettings(2, (0.5, 0.25, 0.2), (0.5, 0.25, 0.4), 1 / 255)
    found = captions.normalise_images(np.array([[0, 255, 51]], np.uint8), settings)
    np.testing.assert_allclose(found, [[-1.0, 3.0, 0.0]], atol=1e-6)


def test_settings_are_those_of_the_file(tmp_path):
    expected = captions.ImageSettings(
        SIZE, tuple(CLIP["image_mean"]), tuple(CLIP["image_std"]), 1 / 255
    )
    assert captions.read_image_settings(write_files(tmp_path / "a"), SIZE) == expected
    folder = write_files(tmp_path / "b", {"size": SIZE, "rescale_factor": 0.5})
    assert captions.read_image_settings(folder, SIZE) == dataclasses.replace(expected, scale=0.5)
    # transformers 5 writes the same object inside another file.
    folder = write_files(tmp_path / "c")
    old = folder / "preprocessor_config.json"
    inner = {"image_processor": json.loads(old.read_text())}
    (folder / "processor_config.json").write_text(json.dumps(inner))
    old.unlink()
    assert captions.read_image_settings(folder, SIZE) == expected


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"size": {"height": 384, "width": 384}}, "size"),
        ({"size": {"shortest_edge": 24}}, "size"),
        ({"size": None}, "size"),
        ({"image_mean": None}, "image_mean"),
        ({"image_std": [0.5, 0.5]}, "image_std"),
        ({"image_std": [0.5, 0.5, 0.0]}, "image_std"),
        ({"resample": 2}, "resample"),
        ({"do_resize": False}, "do_resize"),
        ({"do_normalize": False}, "do_normalize"),
        ({"do_center_crop": True}, "do_center_crop"),
        ({"rescale_factor": "1/255"}, "rescale_factor"),
    ],
    ids=str,
)
def test_settings_that_are_not_implemented_are_refused(tmp_path, changes, named):
    folder = write_files(tmp_path / "model", changes)
    with pytest.raises(InputError) as error:
        captions.read_image_settings(folder, SIZE)
    (problem,) = error.value.problems
    assert problem.startswith(f"{folder / 'preprocessor_config.json'}: {named} is ")


def test_absent_settings_are_refused_by_the_name_of_the_file(network, images, tmp_path):
    folder = write_files(tmp_path / "model")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match=r"preprocessor_config\.json: cannot be read"):
        captions.caption_images(
            dataclasses.replace(network, folder=folder), images, max_new_tokens=3
        )()


@pytest.mark.parametrize("most", [0, POSITIONS + 1])
def test_lengths_that_the_decoder_does_not_have_are_refused(network, images, most):
    with pytest.raises(InputError, match=f"max_new_tokens: found {most}; expected 1 to 10"):
        captions.caption_images(network, images, max_new_tokens=most)()
