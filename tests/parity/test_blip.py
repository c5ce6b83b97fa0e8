"""BLIP's captioner against transformers' PyTorch, on tiny random float32 weights.

The weights travel as files: `save_pretrained`, then our table and config parser. The promise is
1e-4 for features and 1e-3 for logits; measured differences are some 1e-6, and the tests ask for
NETWORK. Token sequences must be equal.
"""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import BertTokenizerFast, BlipForConditionalGeneration, BlipProcessor
from transformers import BlipConfig as TorchConfig
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from corl_jax.errors import InputError, Problems
from corl_jax.models import modules
from corl_jax.models.blip import Blip, BlipConfig, BlipTextConfig
from corl_jax.models.pillow_resize import resize_levels
from corl_jax.params import flatten
from corl_jax.rewards import captions
from corl_jax.rewards.image import resize_on_host
from corl_jax.rewards.samples import Network
from corl_jax.weights.export import convert
from corl_jax.weights.layouts import KINDS
from corl_jax.weights.layouts.blip import TABLES, parse
from tests.parity import torch_janus
from tests.support.tiny_networks import load_network
from tests.support.tolerances import NETWORK

torch.set_num_threads(1)

TOLERANCE = NETWORK
BOS, SEP = 57, 3
TEXT = {
    "vocab_size": 59, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 3, "max_position_embeddings": 16, "bos_token_id": BOS,
    "sep_token_id": SEP,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 3,
    "num_attention_heads": 4, "image_size": 24, "patch_size": 8,
}  # fmt: skip
VARIANTS = {
    # As transformers 5 saves it: the head's kernel is the word embeddings.
    "tied": {"seed": 0},
    # As it is published: the head has a kernel of its own, and its bias stands there twice.
    "published": {"seed": 1, "tied": False},
    # Other sizes throughout, and epsilons that show.
    "varied": {
        "seed": 2,
        "text": {"num_hidden_layers": 3, "num_attention_heads": 4, "layer_norm_eps": 1e-3},
        "vision": {"patch_size": 4, "num_hidden_layers": 1, "layer_norm_eps": 1e-2},
    },
}
# Random weights hardly ever end a caption, or at once: with this bias of the separator some rows
# end early and some are cut.
ENDING = {"tied": 3.5, "published": 1.0, "varied": 0.25}


def torch_model(*, seed: int, tied: bool = True, text=None, vision=None):
    """A captioner of transformers, in evaluation mode; arguments override the sizes above."""
    config = TorchConfig(
        text_config=TEXT | {"tie_word_embeddings": tied} | (text or {}),
        vision_config=VISION | (vision or {}),
        tie_word_embeddings=tied,
    )
    model = BlipForConditionalGeneration(config).float().eval()
    torch_janus.randomise(model, seed)
    # Small words and large image features, so that captions depend on the image.
    model.text_decoder.get_input_embeddings().weight.data *= 0.3
    model.vision_model.post_layernorm.weight.data *= 3
    return model


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, tmp_path_factory):
    """One model twice: `torch`, and our `config` and `params`, with the `folder` between them."""
    model = torch_model(**VARIANTS[request.param])
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    config, params = load_network(folder, "blip")
    return SimpleNamespace(
        torch=model, config=config, params=params, folder=folder, ending=ENDING[request.param]
    )


def ours(pair, function, *arguments) -> np.ndarray:
    """function(bound Blip, *arguments), compiled, with exact float32 products."""
    with jax.default_matmul_precision("highest"):
        compiled = jax.jit(
            lambda params, *rest: function(modules.bind(Blip, pair.config, params), *rest)
        )
        return np.asarray(compiled(pair.params, *arguments))


def assert_close(what: str, found: np.ndarray, expected: torch.Tensor) -> None:
    """Largest difference at most TOLERANCE, of values that are much larger than that."""
    expected = expected.detach().numpy()
    assert found.shape == expected.shape
    assert expected.std() > 0.1, f"{what}: values so small that any output would pass"
    error = np.abs(found - expected).max()
    print(f"parity {what}: largest difference {error:.1e} (std {expected.std():.2f})")
    assert error <= TOLERANCE, f"{what}: {error:.2e} > {TOLERANCE:.0e}"


def pixels(pair, rows: int, seed: int = 7) -> np.ndarray:
    size = pair.config.vision.image_size
    return np.random.default_rng(seed).standard_normal((rows, size, size, 3)).astype(np.float32)


def nchw(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


@torch.no_grad()
def test_image_tower(pair):
    images = pixels(pair, 3)
    expected = pair.torch.vision_model(nchw(images)).last_hidden_state
    assert_close("BLIP features", ours(pair, lambda m, x: m.vision_model(x), images), expected)


@torch.no_grad()
def test_logits_of_a_text_about_an_image(pair):
    images = pixels(pair, 2)
    ids = np.random.default_rng(3).integers(0, pair.config.text.vocab_size, (2, 11))
    expected = pair.torch(pixel_values=nchw(images), input_ids=torch.from_numpy(ids)).logits
    assert_close("BLIP logits", ours(pair, lambda m, x, t: m(x, t), images, ids), expected)


@torch.no_grad()
@pytest.mark.parametrize("max_new_tokens", [1, 7, 16])
def test_greedy_captions_token_by_token(pair, max_new_tokens):
    """Rows that end early, later and not at all, of the same batch."""
    rows = 24
    images = pixels(pair, rows)
    bias = pair.torch.text_decoder.cls.predictions.decoder.bias
    usual = bias[SEP].item()
    bias[SEP] = pair.ending
    answer = pair.torch.generate(
        nchw(images), do_sample=False, max_new_tokens=max_new_tokens, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    first, second = torch.stack(answer.logits).topk(2).values.unbind(-1)
    assert (first - second).min() > NETWORK, "a tie decides nothing: choose another seed"
    theirs = answer.sequences.numpy()
    bias[SEP] = usual

    params = jax.tree.map(np.copy, pair.params)
    params["text_decoder"]["head"]["bias"][SEP] = pair.ending
    found = ours(SimpleNamespace(config=pair.config, params=params), greedy(max_new_tokens), images)

    # transformers puts the first token in front and fills up with padding, as far as it went.
    assert (theirs[:, 0] == BOS).all()
    expected = np.full((rows, max_new_tokens), SEP)
    expected[:, : theirs.shape[1] - 1] = theirs[:, 1:]
    expected[np.cumsum(expected == SEP, axis=1) > 0] = SEP
    np.testing.assert_array_equal(found, expected)
    lengths = (expected != SEP).sum(axis=1)
    print(f"parity BLIP captions of at most {max_new_tokens}: lengths {np.bincount(lengths)}")
    if max_new_tokens == 16:
        assert lengths.min() < 4 and lengths.max() == 16 and len(set(lengths)) > 3
        assert len(np.unique(expected, axis=0)) > rows // 2, "captions hardly depend on images"


def greedy(max_new_tokens: int):
    def run(model, images):
        return captions.decode_greedily(
            model.text_decoder, model.vision_model(images), max_new_tokens
        )

    return run


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "'", "s", "##s", "##ed", "cat"]


@torch.no_grad()
@pytest.mark.parametrize("shape", [(31, 50), (24, 24)], ids=str)
def test_captions_of_pictures(pair, shape, tmp_path):
    """From pictures to text, with every file that is read on the way."""
    vocabulary = WORDS + [f"word{i}" for i in range(BOS - len(WORDS))]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    tokenizer = BertTokenizerFast(str(tmp_path / "vocab.txt"))
    processor = BlipProcessor(BlipImageProcessorPil(size={"height": 24, "width": 24}), tokenizer)
    processor.save_pretrained(tmp_path)
    images = np.random.default_rng(1).integers(0, 256, (5, *shape, 3), dtype=np.uint8)
    pixels = processor(images=[Image.fromarray(one) for one in images], return_tensors="pt")
    theirs = pair.torch.generate(**pixels, do_sample=False, max_new_tokens=12)
    expected = [processor.decode(row, skip_special_tokens=True).strip() for row in theirs]

    network = Network(pair.config, jax.tree.map(jnp.asarray, pair.params), tmp_path, jnp.float32)
    found = captions.caption_images(network, images, max_new_tokens=12, chunk=2)()
    assert found == expected
    assert len(set(found)) > 1


@pytest.mark.parametrize("shape", [(31, 50), (53, 17), (24, 24), (7, 9)], ids=str)
def test_preprocessing(shape):
    rng = np.random.default_rng(sum(shape))
    images = rng.integers(0, 256, (3, *shape, 3), dtype=np.uint8)
    processor = BlipImageProcessorPil(size={"height": 24, "width": 24})
    expected = processor(list(images), return_tensors="np").pixel_values.transpose(0, 2, 3, 1)
    settings = captions.ImageSettings(
        24, tuple(processor.image_mean), tuple(processor.image_std), processor.rescale_factor
    )
    resized = resize_levels(jnp.asarray(resize_on_host(images, 24, "bicubic")), 24)
    found = np.asarray(captions.normalise_images(resized, settings))
    assert found.shape == expected.shape == (3, 24, 24, 3)
    error = np.abs(found - expected).max()
    print(f"parity BLIP pixels {shape}: largest difference {error:.1e}")
    assert error <= NETWORK


# ---- weights


def test_the_fixtures_hold_the_head_in_both_ways(pair):
    keys = load_file(pair.folder / "model.safetensors").keys()
    head = "text_decoder.cls.predictions"
    assert (f"{head}.decoder.weight" in keys) is not pair.config.text.tie_word_embeddings
    assert (f"{head}.decoder.bias" in keys) is not pair.config.text.tie_word_embeddings
    assert f"{head}.bias" in keys


def test_sizes_are_read_from_the_config(pair):
    text, vision = pair.torch.config.text_config, pair.torch.config.vision_config
    config = pair.config
    assert config.text.num_heads == text.num_attention_heads
    assert config.text.layer_norm_eps == text.layer_norm_eps
    assert (config.text.bos_token_id, config.text.sep_token_id) == (BOS, SEP)
    assert config.vision.num_heads == vision.num_attention_heads
    assert config.vision.layer_norm_eps == vision.layer_norm_eps
    assert config.vision.num_tokens == (24 // vision.patch_size) ** 2 + 1


def test_the_bias_that_computes_is_read(tmp_path):
    """Where the two names of the head's bias differ, as after a training that untied them."""
    model = torch_model(seed=1, tied=False)
    head = model.text_decoder.cls.predictions
    assert not torch.equal(head.bias, head.decoder.bias)
    model.save_pretrained(tmp_path)
    _, params = load_network(tmp_path, "blip")
    found = params["text_decoder"]["head"]["bias"]
    np.testing.assert_array_equal(found, head.decoder.bias.detach().numpy())


def test_files_of_older_versions(tmp_path):
    """transformers 4 saved the head's kernel but one name of its bias, and a buffer."""
    torch_model(seed=1, tied=False).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    _, expected = load_network(tmp_path, "blip")
    head = "text_decoder.cls.predictions"
    tensors[f"{head}.bias"] = tensors.pop(f"{head}.decoder.bias")
    tensors["text_decoder.bert.embeddings.position_ids"] = torch.arange(16)[None]
    save_file(tensors, file)
    jax.tree.map(np.testing.assert_array_equal, load_network(tmp_path, "blip")[1], expected)


@pytest.mark.parametrize("layout", ["published", "transformers"])
def test_the_published_size(layout, tmp_path):
    """Every key of the full captioner has its leaves, and the counts agree."""
    config = TorchConfig(text_config={"num_attention_heads": 12})
    with torch.device("meta"):
        model = BlipForConditionalGeneration(config)
    found = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    tied = {f"text_decoder.cls.predictions.decoder.{name}" for name in ("weight", "bias")}
    assert tied < found.keys()
    if layout == "transformers":
        found = {key: shape for key, shape in found.items() if key not in tied}
    else:
        found["text_decoder.bert.embeddings.position_ids"] = (1, 512)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    problems = Problems()
    ours = parse(tmp_path, layout, found, problems)
    assert ours == BlipConfig(text=BlipTextConfig(tie_word_embeddings=layout == "transformers"))

    table, shapes = TABLES[layout], KINDS["blip"].shapes(ours)
    slots = table.make_slots(shapes)
    assert [*problems, *table.find_problems(slots, found, "file")] == []
    unused = {key for key in found if key not in {slot.key for slot in slots}}
    assert all(table.is_dropped(key) for key in unused)
    assert len(unused) == (2 if layout == "published" else 0)

    count = sum(math.prod(shape) for shape in shapes.values())
    expected = sum(parameter.numel() for parameter in model.parameters())
    if layout == "published":
        expected += 30524 * 768  # the head's own kernel
    assert count == expected
    print(f"BLIP {layout}: {count:,} parameters")


def test_a_converted_directory_is_the_same_network(pair, tmp_path):
    convert(pair.folder, tmp_path / "converted", KINDS["blip"])
    config, params = load_network(tmp_path / "converted", "blip")
    assert config == pair.config
    jax.tree.map(np.testing.assert_array_equal, params, pair.params)


def test_our_parameters_are_exactly_those_of_the_network(pair):
    shapes = {path: leaf.shape for path, leaf in flatten(pair.params).items()}
    assert shapes == KINDS["blip"].shapes(pair.config)


# ---- settings that are refused


def config_file(folder, **changes):
    """`folder` with the tiny config.json, changed by field or by fields of a section."""
    data = TorchConfig(text_config=TEXT, vision_config=VISION).to_dict()
    for name, value in changes.items():
        data[name] = data[name] | value if isinstance(value, dict) else value
    (folder / "config.json").write_text(json.dumps(data))
    return folder


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "blip-2"}, "model_type"),
        ({"text_config": {"hidden_act": "relu"}}, "hidden_act"),
        ({"vision_config": {"hidden_act": "quick_gelu"}}, "hidden_act"),
        ({"text_config": {"num_attention_heads": 7}}, "num_attention_heads"),
        ({"vision_config": {"num_attention_heads": 7}}, "num_attention_heads"),
        ({"vision_config": {"image_size": 25}}, "image_size"),
        ({"text_config": {"sep_token_id": 59}}, "sep_token_id"),
        ({"text_config": {"is_decoder": False}}, "is_decoder"),
    ],
    ids=str,
)
def test_a_config_that_is_not_implemented_is_refused(tmp_path, changes, named):
    parse(config_file(tmp_path), "transformers", {}, problems := Problems())
    assert not problems
    parse(config_file(tmp_path, **changes), "transformers", {}, problems)
    assert (
        len(problems) == 1
        and named in next(iter(problems))
        and "config.json" in next(iter(problems))
    )


def test_an_untied_head_without_its_kernel_is_refused(tmp_path):
    untied = {"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": False}}
    parse(config_file(tmp_path, **untied), "transformers", {}, problems := Problems())
    (problem,) = problems
    assert "decoder.weight" in problem


def test_another_blip_is_refused(pair, tmp_path):
    tensors = load_file(pair.folder / "model.safetensors")
    tensors["text_encoder.embeddings.LayerNorm.bias"] = torch.zeros(24)
    save_file(tensors, config_file(tmp_path) / "model.safetensors")
    with pytest.raises(InputError, match="text encoder"):
        load_network(tmp_path, "blip")


def test_absent_sizes_mean_what_transformers_means_by_them(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "blip"}')
    theirs = TorchConfig()
    found = parse(tmp_path, "transformers", {}, problems := Problems())
    assert not problems
    assert found.text.num_heads == theirs.text_config.num_attention_heads == 8
    assert found.text.sep_token_id == theirs.text_config.sep_token_id
    assert found.text.bos_token_id == theirs.text_config.bos_token_id
    assert found.vision == BlipConfig().vision
