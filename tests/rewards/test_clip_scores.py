"""Rewards by a CLIP: its inputs, its scores, and what is refused."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizerFast

from corl_jax.devices.mesh import network_shardings
from corl_jax.errors import InputError, Problems
from corl_jax.models import modules, pillow_resize
from corl_jax.models.aesthetic import AestheticConfig, AestheticHead
from corl_jax.models.clip import Clip, ClipConfig, TowerConfig
from corl_jax.params import map_with_path
from corl_jax.rewards import clip_scores
from corl_jax.rewards.samples import Context, FrozenNetwork, Network, Samples
from corl_jax.weights.layouts import KINDS, clip
from corl_jax.weights.own_config import build_config
from tests.support.tiny_models import tiny_image
from tests.support.tolerances import NETWORK

ALPHABET = sorted(ByteLevel.alphabet())
WORDS = ["re", "red</w>", "fo", "fox</w>"]
VOCAB = {
    token: i
    for i, token in enumerate(
        [*ALPHABET, *(f"{c}</w>" for c in ALPHABET), *WORDS, "<|startoftext|>", "<|endoftext|>"]
    )
}
MERGES = [("r", "e"), ("re", "d</w>"), ("f", "o"), ("fo", "x</w>")]
START, END = len(VOCAB) - 2, len(VOCAB) - 1
TINY = ClipConfig(
    vision=TowerConfig(24, 32, 2, 3),
    text=TowerConfig(16, 28, 2, 2),
    image_size=24,
    patch_size=8,
    vocab_size=len(VOCAB),
    context_length=9,
    eos_token_id=END,
    projection_dim=12,
)
HEAD = AestheticConfig(sizes=(12, 7, 1))
PROMPTS = ["red fox", "a fox", None, "re", "  "]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer of all bytes and two words."""
    path = tmp_path_factory.mktemp("clip")
    CLIPTokenizerFast(vocab=VOCAB, merges=MERGES).save_pretrained(path)
    return path


def drawn(kind, config, seed: int):
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = 0.3 * rng.standard_normal(leaf.shape).astype(np.float32)
        return jnp.asarray(noise + 1 if path.endswith("/scale") else noise)

    params = map_with_path(draw, modules.make_abstract(kind, config))
    return params | ({"logit_scale": jnp.float32(np.log(100))} if kind is Clip else {})


@pytest.fixture(scope="module")
def network(folder):
    return Network(TINY, drawn(Clip, TINY, 0), folder, jnp.float32)


@pytest.fixture(scope="module")
def head():
    return Network(HEAD, drawn(AestheticHead, HEAD, 1), Path("head"), jnp.float32)


@pytest.fixture(scope="module")
def drawings():
    return np.stack([np.asarray(tiny_image(seed, (40, 40))) for seed in range(5)])


@functools.partial(jax.jit, static_argnames=("config", "method"))
def features(config, method, params, x):
    return getattr(modules.bind(Clip, config, params), method)(x)


def expected_cosines(network, drawings, prompts) -> np.ndarray:
    """Row by row: PIL's resize, CLIP's mean and std, ids by hand."""
    mean, std = np.array(TINY.image_mean), np.array(TINY.image_std)
    out = []
    for drawing, prompt in zip(drawings, prompts, strict=True):
        picture = Image.fromarray(drawing).resize((24, 24), Image.Resampling.BICUBIC)
        pixels = ((np.asarray(picture) / 255 - mean) / std).astype(np.float32)[None]
        ids = np.array([[START, *(VOCAB[token] for token in prompt), END]])
        image = np.asarray(features(TINY, "image_features", network.params, pixels))[0]
        text = np.asarray(features(TINY, "text_features", network.params, ids))[0]
        out.append(image @ text / np.linalg.norm(image) / np.linalg.norm(text))
    return np.array(out)


# ---- inputs


def test_ids_by_hand(network):
    found = clip_scores.tokenize_prompts(network, ["Red  FOX", "re", ""])
    red, fox = VOCAB["red</w>"], VOCAB["fox</w>"]
    assert found.dtype == np.int32
    assert found.tolist() == [
        [START, red, fox, END, 0, 0, 0, 0, 0],
        [START, VOCAB["r"], VOCAB["e</w>"], END, 0, 0, 0, 0, 0],
        [START, END, 0, 0, 0, 0, 0, 0, 0],
    ]


def test_a_long_prompt_is_cut_and_still_ends(network):
    found = clip_scores.tokenize_prompts(network, ["fox " * 50])
    assert found.tolist() == [[START, *[VOCAB["fox</w>"]] * 7, END]]


def test_the_older_tokenizer_files_do_as_well(network, folder, tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps(VOCAB))
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in MERGES)])
    (tmp_path / "merges.txt").write_text(merges + "\n")
    other = dataclasses.replace(network, folder=tmp_path)
    found = (clip_scores.tokenize_prompts(x, ["a red fox", "b"]) for x in (network, other))
    assert np.array_equal(*found)


def test_a_folder_without_a_tokenizer_says_where_to_get_one(network, tmp_path):
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(InputError, match=r"expected tokenizer.json, or .* copy them from openai"):
        clip_scores.tokenize_prompts(dataclasses.replace(network, folder=tmp_path), ["a"])


def test_a_damaged_tokenizer_is_named(network, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=f"{tmp_path}: its tokenizer cannot be read"):
        clip_scores.tokenize_prompts(dataclasses.replace(network, folder=tmp_path), ["a"])


@pytest.mark.parametrize("change", [{"eos_token_id": 5}, {"vocab_size": 300}])
def test_a_foreign_tokenizer_is_refused(network, change):
    config = dataclasses.replace(TINY, **change)
    with pytest.raises(InputError, match="put the tokenizer files of this CLIP there"):
        clip_scores.tokenize_prompts(dataclasses.replace(network, config=config), ["a"])


def test_pixels_by_hand():
    pixels = jnp.array([[[[0, 255, 51]]]], jnp.uint8)
    found = clip_scores.normalise_pixels(ClipConfig(), pixels)[0, 0, 0]
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    by_hand = [(0 - mean[0]) / std[0], (1 - mean[1]) / std[1], (0.2 - mean[2]) / std[2]]
    assert found.tolist() == pytest.approx(by_hand, abs=NETWORK)


# ---- scores


def test_similarity_is_the_cosine(network, drawings):
    prompts = ["red fox", "fox", "red red red", "re", "a"]
    found = np.asarray(clip_scores.clip_similarity(network, drawings, prompts))
    tokens = [["red</w>", "fox</w>"], ["fox</w>"], ["red</w>"] * 3, ["r", "e</w>"], ["a</w>"]]
    assert found == pytest.approx(expected_cosines(network, drawings, tokens), abs=NETWORK)
    assert found.std() > 0.01


def test_without_a_prompt_there_is_no_similarity(network, drawings):
    found = np.asarray(clip_scores.clip_similarity(network, drawings, PROMPTS))
    assert np.isnan(found).tolist() == [False, False, True, False, True]


def test_pieces_and_devices_change_nothing(network, head, drawings, mesh, monkeypatch):
    prompts = ["red fox", "fox", "red red red", "re", "a"]
    expected = np.asarray(clip_scores.clip_similarity(network, drawings, prompts))
    ratings = np.asarray(clip_scores.aesthetic_rating(network, head, drawings))
    monkeypatch.setattr(clip_scores, "IMAGES_AT_ONCE", 2)
    found = np.asarray(clip_scores.clip_similarity(network, drawings, prompts))
    assert found == pytest.approx(expected, abs=NETWORK)
    network, head = (
        dataclasses.replace(
            x, params=jax.device_put(x.params, network_shardings(x.params, mesh, KINDS[kind].rules))
        )
        for x, kind in ((network, "clip"), (head, "aesthetic"))
    )
    with jax.set_mesh(mesh):  # which does not divide the three heads of its pictures' tower
        found = np.asarray(clip_scores.clip_similarity(network, drawings, prompts))
        assert found == pytest.approx(expected, abs=NETWORK)
        found = np.asarray(clip_scores.aesthetic_rating(network, head, drawings))
        assert found == pytest.approx(ratings, abs=NETWORK)


def test_ratings_are_the_heads(network, head, drawings):
    found = np.asarray(clip_scores.aesthetic_rating(network, head, drawings))
    pixels = clip_scores.normalise_pixels(
        TINY, pillow_resize.resize_levels(jnp.asarray(drawings), 24)
    )
    x = np.asarray(features(TINY, "image_features", network.params, pixels))
    x = x / np.linalg.norm(x, axis=-1, keepdims=True)
    for layer in ("0", "1"):
        weights = head.params["layers"][layer]
        x = x @ np.asarray(weights["kernel"]) + np.asarray(weights["bias"])
    assert found == pytest.approx(x[:, 0], abs=NETWORK)
    assert found.std() > 0.01


def test_a_head_for_another_clip_is_refused(network, head, drawings):
    other = dataclasses.replace(head, config=AestheticConfig())
    with pytest.raises(InputError, match=r"reads vectors of 768, but the CLIP in .* gives 12"):
        np.asarray(clip_scores.aesthetic_rating(network, other, drawings))


def test_a_bfloat16_network_scores_in_float32(network, drawings):
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), network.params)
    half = dataclasses.replace(network, params=params, dtype=jnp.bfloat16)
    prompts = ["red fox"] * 5
    found = np.asarray(clip_scores.clip_similarity(half, drawings, prompts))
    assert found.dtype == np.float32
    exact = np.asarray(clip_scores.clip_similarity(network, drawings, prompts))
    assert 0 < np.abs(found - exact).max() < 0.05


# ---- rewards


def test_rewards_are_multiples_of_the_scores(network, head, drawings):
    place = SingleDeviceSharding(jax.devices()[0])
    names = {"clip": network, "pickscore": network, "hpsv2": network, "clip_l14": network}
    holders = {**names, "aesthetic": head}
    networks = {name: FrozenNetwork(holder, place) for name, holder in holders.items()}
    context = Context(None, None, None, None, None, 0, 0, networks)
    samples = Samples({"prompt": PROMPTS}, images=drawings)
    cosine = np.asarray(clip_scores.clip_similarity(network, drawings, PROMPTS))
    rating = np.asarray(clip_scores.aesthetic_rating(network, head, drawings))
    for found, expected in (
        (clip_scores.score_clip(samples, context), 2 * cosine),
        (clip_scores.score_hpsv2(samples, context), cosine),
        (clip_scores.score_pickscore(samples, context), 100 * cosine),
        (clip_scores.score_pickscore(samples, context, divisor=26.0), 100 / 26 * cosine),
        (clip_scores.score_aesthetic(samples, context), rating),
        (clip_scores.score_aesthetic(samples, context, divisor=10.0), rating / 10),
    ):
        assert np.asarray(found).dtype == np.float32
        assert np.asarray(found) == pytest.approx(expected, rel=NETWORK, nan_ok=True)


# ---- files


def write(folder: Path, name: str, data: dict) -> None:
    (folder / f"{name}.json").write_text(json.dumps(data))


def problems_of(folder: Path, layout: str) -> list[str]:
    problems = Problems()
    clip.parse(folder, layout, {}, problems)
    return list(problems)


def test_unsupported_settings_of_transformers_are_all_listed(tmp_path):
    text = {"hidden_act": "gelu_new", "eos_token_id": "end"}
    vision = {"num_channels": 4, "hidden_size": 0}
    config = {"model_type": "siglip", "text_config": text, "vision_config": vision}
    write(tmp_path, "config", config)
    write(tmp_path, "preprocessor_config", {"resample": 2, "image_mean": [0.5, 0.5]})
    problems = problems_of(tmp_path, "transformers")
    named = ("model_type", "hidden_act", "eos_token_id", "num_channels", "hidden_size", "resample")
    assert len(problems) == 7
    for name in (*named, "image_mean"):
        assert sum(f"{name} is" in problem for problem in problems) == 1, name
    assert all(str(tmp_path) in problem for problem in problems)


def test_sizes_that_do_not_divide_are_refused(tmp_path):
    config = {"text_config": {"num_attention_heads": 7}, "vision_config": {"patch_size": 30}}
    write(tmp_path, "config", config)
    found = clip.parse(tmp_path, "transformers", {}, Problems())
    assert clip.check(found, "there") == [
        "there.image_size is 224, expected a multiple of patch_size, 30",
        "there.text.hidden_size is 512, expected a multiple of num_heads, 7",
    ]


def test_unsupported_settings_of_open_clip_are_all_listed(tmp_path):
    model = {
        "quick_gelu": "yes",
        "vision_cfg": {"timm_model_name": "vit", "pool_type": "avg", "layers": [3, 4, 6, 3]},
        "text_cfg": {"hf_model_name": "roberta", "no_causal_mask": True},
    }
    data = {"model_cfg": model, "preprocess_cfg": {"interpolation": "bilinear", "std": [1, 2]}}
    write(tmp_path, "open_clip_config", data)
    problems = problems_of(tmp_path, "open_clip")
    for name in (
        "quick_gelu", "timm_model_name", "pool_type", "layers", "hf_model_name", "no_causal_mask",
        "interpolation", "std", "embed_dim",
    ):  # fmt: skip
        assert sum(f" {name} is" in problem for problem in problems) == 1, name
    assert len(problems) == 9


def test_repeated_sections_win_as_in_transformers(tmp_path):
    config = {"text_config": {"hidden_size": 64}, "text_config_dict": {"hidden_size": 128}}
    write(tmp_path, "config", config)
    assert clip.parse(tmp_path, "transformers", {}, Problems()).text.hidden_size == 128


@pytest.mark.parametrize("nested", [False, True], ids=["own file", "inside the processor's"])
def test_image_normalisation_is_read(tmp_path, nested):
    write(tmp_path, "config", {"model_type": "clip"})
    norm = {"image_mean": [0.5, 0.4, 0], "image_std": [0.5, 1, 0.25], "resample": 3}
    name, data = ("processor_config", {"image_processor": norm}) if nested else (
        "preprocessor_config", norm)  # fmt: skip
    write(tmp_path, name, data)
    config = clip.parse(tmp_path, "transformers", {}, Problems())
    assert (config.image_mean, config.image_std) == ((0.5, 0.4, 0.0), (0.5, 1.0, 0.25))


@pytest.mark.parametrize("config", [TINY, ClipConfig(), HEAD], ids=["tiny", "usual", "head"])
def test_configs_survive_json(config):
    problems = Problems()
    data = json.loads(json.dumps(dataclasses.asdict(config)))
    assert build_config(type(config), data, "x", problems) == config
    assert not problems


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"do_center_crop": False}, "do_center_crop"),
        ({"do_normalize": False}, "do_normalize"),
        ({"rescale_factor": 1}, "rescale_factor"),
        ({"image_std": [0, 0, 0]}, "image_std"),
    ],
)
def test_image_settings_that_are_not_followed_are_refused(tmp_path, changes, named):
    usual = {"resample": 3, "rescale_factor": 1 / 255, "image_mean": [0.5] * 3}
    problems = Problems()
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(usual))
    assert clip._read_processor_norm(tmp_path, problems)[0] == (0.5, 0.5, 0.5)
    assert not problems
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(usual | changes))
    clip._read_processor_norm(tmp_path, problems)
    (problem,) = problems
    assert named in problem
