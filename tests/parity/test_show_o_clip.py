"""A Show-o that reads CLIP's features, against transformers' CLIP and Phi, as a user opens it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import corl_jax
from corl_jax import generate
from corl_jax.errors import InputError
from corl_jax.models.clip import ClipVisionConfig, TowerConfig
from corl_jax.params import flatten
from corl_jax.policies.family import LogprobOptions
from corl_jax.policies.show_o import logprobs, network, sampling
from corl_jax.policies.show_o.checkpoint import KIND
from corl_jax.policies.show_o.checkpoint.show_o_keys import CLIP_FOLDER
from corl_jax.policies.show_o.prompts import SYSTEM_PROMPT
from corl_jax.tasks import TASKS, TEXT
from corl_jax.types import Segment
from corl_jax.weights.checkpoint import load_config, load_params
from corl_jax.weights.export import convert, save_checkpoint
from tests.parity import show_o_reference as reference
from tests.parity import torch_show_o
from tests.parity.torch_janus import randomise
from tests.support import show_o_files
from tests.support.tiny_models import tiny_image

pytestmark = pytest.mark.usefixtures("exact_products")

WIDTH, SIDE, PATCHES = 36, 24, 16
TOWER = {
    "hidden_size": WIDTH, "intermediate_size": 52, "num_hidden_layers": 3,
    "num_attention_heads": 3, "image_size": SIDE, "patch_size": 6, "hidden_act": "quick_gelu",
}  # fmt: skip
PIXELS = {
    "crop_size": SIDE, "do_center_crop": True, "do_normalize": True, "do_resize": True,
    "image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28], "resample": 3, "size": SIDE,
}  # fmt: skip
QUESTIONS = ("how many circles?", "what is it? and where is the red one?", "two")
SIZES = ((24, 24), (41, 30), (30, 37))


def make_projector():
    torch.manual_seed(2)
    width = torch_show_o.SIZES["hidden_size"]
    return nn.Sequential(nn.Linear(WIDTH, width), nn.GELU(), nn.Linear(width, width))


def add_projector(folder) -> None:
    state = load_file(folder / "pytorch_model.safetensors")
    for name, tensor in make_projector().state_dict().items():
        state[f"mm_projector.{name}"] = tensor
    # Larger, so that answers depend on the image among many other tokens.
    factors = {"self_attn.dense.weight": 4, "q_layernorm.weight": 10}
    for name, tensor in state.items():
        factor = next((x for end, x in factors.items() if name.endswith(end)), 1)
        state[name] = factor * tensor
    save_file(state, folder / "pytorch_model.safetensors", metadata={"format": "pt"})
    show_o_files.write_json(folder / "config.json", {**show_o_files.CONFIG, "w_clip_vit": True})


def make_tower():
    tower = CLIPVisionModel(CLIPVisionConfig(**TOWER)).float().eval()
    randomise(tower, 1)
    return tower


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = show_o_files.original_folder(tmp_path_factory.mktemp("models") / "show-o")
    add_projector(folder)
    make_tower().save_pretrained(folder / CLIP_FOLDER)
    show_o_files.write_json(folder / CLIP_FOLDER / "preprocessor_config.json", PIXELS)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return corl_jax.load(folder, dtype="float32")


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "show-o")


@pytest.fixture(scope="module")
def theirs(folder, tmp_path_factory):
    """The reference has no projector."""
    plain = shutil.copytree(folder, tmp_path_factory.mktemp("plain") / "show-o")
    state = load_file(plain / "pytorch_model.safetensors")
    phi = {key: x for key, x in state.items() if not key.startswith("mm_projector")}
    save_file(phi, plain / "pytorch_model.safetensors")
    return SimpleNamespace(
        whole=reference.open_reference(plain), tower=make_tower(), projector=make_projector(),
        processor=CLIPImageProcessorPil.from_pretrained(folder / CLIP_FOLDER),
    )  # fmt: skip


def compute_features(theirs, image):
    pixels = theirs.processor(image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        return theirs.tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]


def answer(theirs, image, question, given=None, most=6):
    """The greedy answer, or the log-probs of a given one, by whole forwards from embeddings."""
    tokens, phi = theirs.whole.tokens, theirs.whole.phi
    system = tokens.encode(SYSTEM_PROMPT)
    ids = [tokens.ids["mmu"], *system, tokens.ids["soi"], tokens.ids["eoi"],
           *tokens.encode(f"USER: {question} ASSISTANT:")]  # fmt: skip
    first = 2 + len(system)
    answered, logps = [], []
    for step in range(most if given is None else len(given)):
        with torch.no_grad():
            embeds = phi.model.embed_tokens(torch.tensor([ids + answered]))
            features = theirs.projector(compute_features(theirs, image))
            embeds = torch.cat([embeds[:, :first], features, embeds[:, first:]], 1)
            size = embeds.shape[1]
            seen = torch.ones(size, size).tril().bool()
            seen[:, first : first + PATCHES] = True
            added = torch.zeros(seen.shape).masked_fill(~seen, reference.HIDDEN)
            logits = phi(inputs_embeds=embeds, attention_mask=added[None, None]).logits[0, -1]
        token = int(logits.argmax()) if given is None else given[step]
        answered.append(token)
        logps.append(float(logits.log_softmax(-1)[token]))
        if given is None and token == tokens.end:
            break
    return answered, logps


def list_images():
    return [tiny_image(i, size) for i, size in enumerate(SIZES)]


def encode(model, questions=QUESTIONS):
    processor = model.policy.processor
    ids = [processor.prompt_ids("question", {"qa_problem": x}) for x in questions]
    return processor.encode("question", ids, list_images()[: len(ids)])


def test_features_are_those_of_the_layer_before_the_last(model, theirs):
    pixels = encode(model).pixel_values
    expected = torch.cat([
        theirs.processor(image, return_tensors="pt")["pixel_values"] for image in list_images()
    ])  # fmt: skip
    np.testing.assert_allclose(pixels, expected.permute(0, 2, 3, 1), atol=1e-6)
    ours = network.bind(model.policy.sizes, model.policy.params)
    features = torch.cat([compute_features(theirs, image) for image in list_images()])
    found = ours.vision_tower.compute_patches(jnp.asarray(pixels))
    assert found.shape == (3, PATCHES, WIDTH)
    np.testing.assert_allclose(found, features, atol=1e-4)
    with torch.no_grad():
        projected = theirs.projector(features)
    np.testing.assert_allclose(ours.embed_pixels(jnp.asarray(pixels)), projected, atol=1e-4)


def test_every_level_has_the_value_of_clips_processor(model):
    """Also of pixels that a reward normalises on the device."""
    policy = model.policy
    levels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    found = policy.family.normalise_pixels(policy.processor, jnp.asarray(levels))
    mean, std = (np.array(PIXELS[name], np.float32) for name in ("image_mean", "image_std"))
    expected = ((levels * (1 / 255)).astype(np.float32) - mean) / std
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_answers_are_those_of_whole_forwards(model, theirs):
    """Prompts of several lengths in one batch; answers that depend on the image."""
    policy = model.policy
    images, questions = list_images() * 2, (*QUESTIONS, *QUESTIONS[1:], QUESTIONS[0])
    ids = [policy.processor.prompt_ids("question", {"qa_problem": x}) for x in questions]
    options = sampling.SamplingOptions(
        policy.processor.special, greedy=True, max_new_tokens=5, dtype=jnp.float32, attention="xla"
    )
    (text,) = sampling.sample_answers(
        policy.sizes, policy.params, policy.processor.encode("question", ids, images),
        jax.random.split(jax.random.key(0), 6), options,
    )  # fmt: skip
    expected = [answer(theirs, *pair, most=5)[0] for pair in zip(images, questions, strict=True)]
    values, mask = np.asarray(text.values), np.asarray(text.mask)
    assert [row[counts].tolist() for row, counts in zip(values, mask, strict=True)] == expected
    assert len({tuple(tokens) for tokens in expected}) > 2
    said = model.answer(images[0], questions[0], greedy=True, max_new_tokens=5)
    assert said == policy.processor.decode(expected[0])


def test_log_probs_of_answers(model, theirs):
    """Two answers of each question, of different lengths."""
    policy = model.policy
    given = [[3, 5, 7], [9, 1, 0], [12, 30, 2], [2, 2, 2]]
    options = LogprobOptions(policy.processor.special, image=policy.processor.image, remat="none")
    segment = Segment(TEXT, jnp.asarray(given), jnp.ones((4, 3), bool))
    ((found, _),) = logprobs.score_answers(
        policy.sizes, policy.params, encode(model, QUESTIONS[:2]), (segment,), options
    )
    images = list_images()
    for row, tokens in enumerate(given):
        _, expected = answer(theirs, images[row // 2], QUESTIONS[row // 2], tokens)
        np.testing.assert_allclose(found[row], expected, atol=1e-3)


def test_scores_of_sampled_answers_are_those_of_the_sampler(model):
    policy, prompts = model.policy, encode(model)
    options = sampling.SamplingOptions(
        policy.processor.special, max_new_tokens=4, dtype=jnp.float32, attention="xla"
    )
    segments = sampling.sample_answers(
        policy.sizes, policy.params, prompts, jax.random.split(jax.random.key(0), 6), options
    )
    scoring = LogprobOptions(policy.processor.special, image=policy.processor.image)
    ((found, _),) = logprobs.score_answers(policy.sizes, policy.params, prompts, segments, scoring)
    mask = np.asarray(segments[0].mask)
    np.testing.assert_allclose(
        np.asarray(found)[mask], np.asarray(segments[0].logprobs)[mask], atol=1e-4
    )


def test_a_whole_clip_beside_the_model(folder, model, copy):
    """OpenAI's folder also has the text model, in a .bin."""
    shutil.rmtree(copy / CLIP_FOLDER)
    place = copy.parent / CLIP_FOLDER
    place.mkdir()
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
            "num_attention_heads": 1, "vocab_size": 9}  # fmt: skip
    whole = CLIPModel(CLIPConfig(text_config=text, vision_config=TOWER, projection_dim=4))
    tower = {f"vision_model.{name}": x for name, x in make_tower().state_dict().items()}
    state = {**whole.state_dict(), **tower}
    state["vision_model.embeddings.position_ids"] = torch.arange(PATCHES + 1)[None]
    torch.save(state, place / "pytorch_model.bin")
    config = {"model_type": "clip", "vision_config": TOWER, "text_config": text}
    show_o_files.write_json(place / "config.json", config)
    show_o_files.write_json(place / "preprocessor_config.json", PIXELS)
    assert load_config(copy, KIND) == model.policy.sizes
    first, second = (flatten(load_params(path, KIND)) for path in (folder, copy))
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[path], second[path]) for path in first)


def test_without_a_tower_images_are_drawn_and_questions_refused(copy, tmp_path, capsys):
    shutil.rmtree(copy / CLIP_FOLDER)
    model = corl_jax.load(copy, dtype="float32")
    (drawn,) = model.generate_images("a red circle", image_steps=2)
    assert drawn.size == (16, 16)
    with pytest.raises(InputError, match=f"hf download openai/{CLIP_FOLDER} config.json"):
        model.answer(tiny_image(0, (24, 24)), "how many?", max_new_tokens=4)
    tiny_image(0, (24, 24)).save(tmp_path / "image.png")
    with pytest.raises(SystemExit) as error:
        generate.main(["text", "--model", str(copy), "--image", str(tmp_path / "image.png"),
                       "--question", "how many?", "--max-new-tokens", "4"])  # fmt: skip
    assert error.value.code == 2
    assert f"{CLIP_FOLDER}/config.json: not found" in capsys.readouterr().err
    policy = model.policy
    lack = policy.family.find_lack(TASKS["mm2t"], policy.sizes)
    assert lack is not None and f"put openai/{CLIP_FOLDER} there" in lack
    assert policy.family.find_lack(TASKS["t2i"], policy.sizes) is None


def test_own_images_are_not_read_as_codes(model):
    family, sizes = model.policy.family, model.policy.sizes
    lack = family.find_lack(TASKS["self_qa"], sizes)
    assert lack is not None and "reads CLIP's features" in lack
    assert family.find_lack(TASKS["mm2t"], sizes) is None


def test_wrong_towers_are_refused(copy):
    file = copy / CLIP_FOLDER / "config.json"
    data = json.loads(file.read_text())
    show_o_files.write_json(file, {**data, "hidden_act": "relu"})
    with pytest.raises(InputError, match="hidden_act is 'relu'"):
        load_config(copy, KIND)
    show_o_files.write_json(file, {**data, "hidden_size": 48})
    with pytest.raises(InputError, match="found 48 channels of the tower's features"):
        load_config(copy, KIND)


def test_conversion_changes_no_byte(folder, tmp_path):
    """The original's sizes of the projector, in a network that is small elsewhere."""
    tiny = load_config(folder, KIND)
    config = dataclasses.replace(
        tiny, clip_width=1024, projector_width=2048,
        phi=dataclasses.replace(tiny.phi, hidden_size=2048, num_layers=1),
        clip=ClipVisionConfig(TowerConfig(1024, 8, 1, 1, "quick_gelu"), SIDE, 6),
    )  # fmt: skip
    params = network.init(config, jax.random.key(0))
    save_checkpoint(tmp_path / "first", KIND, config, params, layout="original")
    assert load_config(tmp_path / "first", KIND) == config
    tower = CLIPVisionModel.from_pretrained(tmp_path / "first" / CLIP_FOLDER)
    assert tower.config.num_hidden_layers == 1
    bias = params["vision_tower"]["pre_layernorm"]["bias"]
    np.testing.assert_array_equal(tower.pre_layrnorm.bias.detach().numpy(), bias)
    convert(tmp_path / "first", tmp_path / "jax", KIND)
    assert load_config(tmp_path / "jax", KIND) == config
    convert(tmp_path / "jax", tmp_path / "back", KIND, layout="original")
    files = [file for file in (tmp_path / "first").rglob("*") if file.is_file()]
    assert len(files) == 8
    for file in files:
        other = tmp_path / "back" / file.relative_to(tmp_path / "first")
        assert other.read_bytes() == file.read_bytes(), file


def test_a_tower_beside_a_model_without_a_projector_is_not_read(folder, tmp_path):
    plain = show_o_files.original_folder(tmp_path / "show-o")
    shutil.copytree(folder / CLIP_FOLDER, tmp_path / CLIP_FOLDER)
    assert load_config(plain, KIND).clip is None


def test_squares_are_cut_as_clip_cuts_them(model):
    """An odd number of pixels too many, on each side."""
    processor = model.policy.processor
    for size in ((24, 27), (31, 24), (24, 29)):
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8))
        theirs = CLIPImageProcessorPil(**PIXELS)(image, return_tensors="np")["pixel_values"][0]
        ours = processor.encode("question", [[1]], [image]).pixel_values[0]
        np.testing.assert_allclose(ours, theirs.transpose(1, 2, 0), atol=1e-6)
