"""Every part of Show-o against PyTorch, on tiny random float32 weights.

The promise is 1e-4 for features and pixels, 1e-3 for logits, and equality for codes. Measured
differences are some 1e-6, so the tests ask for less.
"""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from corl_jax.models import magvit
from corl_jax.models.magvit import Magvit, MagvitConfig
from corl_jax.models.modules import bind, make_abstract
from corl_jax.params import flatten
from corl_jax.policies.family import LogprobOptions
from corl_jax.policies.show_o import network
from corl_jax.policies.show_o.logprobs import text_logprobs
from corl_jax.policies.show_o.tokens import make_special_tokens
from corl_jax.types import EncodedPrompts
from tests.parity import torch_show_o
from tests.parity.torch_show_o import MAGVIT, TEXT, Z_CHANNELS
from tests.support.tolerances import NETWORK

ROWS, TEXT_LENGTH, IMAGE = 3, 7, 6
PADS = (0, 2, 5)


def omni_mask(kind: str, pads: int, length: int, image: int) -> np.ndarray:
    """One row's mask [L, L], place by place; `length` tokens of text, `image` of an image."""
    size = length + image
    seen = np.zeros((size, size), bool)
    for i in range(size):
        for j in range(size):
            if kind == "mmu":  # the image first
                seen[i, j] = j <= i or j < image
            elif i < pads:
                seen[i, j] = j <= i
            elif i < length:
                seen[i, j] = pads <= j <= i
            else:
                seen[i, j] = j >= pads
    return seen


@pytest.fixture(scope="module", params=["plain", "varied"])
def pair(request):
    sizes = {"num_key_value_heads": 2, "num_hidden_layers": 2} if request.param == "varied" else {}
    model = torch_show_o.tiny_phi(seed=len(sizes), **sizes)
    config = torch_show_o.jax_config(model.config)
    params = torch_show_o.phi_params(model)
    abstract = flatten(network.abstract(config)["vqmodel"])
    params["vqmodel"] = make_zeros(abstract)
    return SimpleNamespace(torch=model, config=config, params=params)


def make_zeros(flat: dict) -> dict:
    from corl_jax.params import unflatten

    return unflatten({path: np.zeros(leaf.shape, np.float32) for path, leaf in flat.items()})


def ours(pair, function, *arguments):
    with jax.default_matmul_precision("highest"):
        compiled = jax.jit(lambda params, *rest: function(network.bind(pair.config, params), *rest))
        return jax.tree.map(np.asarray, compiled(pair.params, *arguments))


def assert_close(what: str, found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    assert expected.std() > 0.1, f"{what}: values so small that any output would pass"
    error = np.abs(found - expected).max()
    print(f"parity {what}: largest difference {error:.1e} (std {expected.std():.2f})")
    assert error <= NETWORK, f"{what}: {error:.2e} > {NETWORK:.0e}"


def make_rows(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """(ids [B, L], masks [B, L, L]) of rows with other numbers of pads in drawing prompts."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, torch_show_o.SIZES["vocab_size"], (ROWS, TEXT_LENGTH + IMAGE))
    masks = [omni_mask(kind, pads, TEXT_LENGTH, IMAGE) for pads in PADS]
    return ids, np.stack(masks)


def compute_theirs(pair, ids, masks) -> tuple[np.ndarray, np.ndarray]:
    with torch.no_grad():
        out = pair.torch(
            torch.from_numpy(ids), attention_mask=torch_show_o.additive(masks),
            output_hidden_states=True,
        )  # fmt: skip
    # The last of `hidden_states` is behind the final norm.
    return out.hidden_states[-1].numpy(), out.logits.numpy()


@pytest.mark.parametrize("kind", ["t2i", "mmu"])
def test_states_and_logits_under_omni_masks(pair, kind):
    ids, masks = make_rows(kind)
    states, logits = compute_theirs(pair, ids, masks)

    def run(model, ids, masks):
        hidden = model.language_model(model.embed_text(ids), masks)
        return hidden, model.text_logits(hidden), model.image_logits(hidden)

    hidden, text, image = ours(pair, run, ids, masks)
    assert_close(f"states {kind}", hidden, states)
    assert_close(f"logits {kind}", text, logits)
    first = TEXT + 10
    np.testing.assert_array_equal(image, text[..., first : first + 2**Z_CHANNELS])
    assert text.dtype == image.dtype == np.float32


def test_a_mask_matters(pair):
    """Without it, and with the original's silent mistake, states are far off."""
    ids, masks = make_rows("t2i")
    states, _ = compute_theirs(pair, ids, masks)
    causal, _ = compute_theirs(pair, ids, np.tril(np.ones_like(masks)))
    assert np.abs(states - causal).max() > 0.5


@pytest.mark.parametrize("kind", ["t2i", "mmu"])
def test_parts_equal_the_whole_under_its_mask(pair, kind):
    """The same states from two parts: text and image, without pads, or image and text."""
    ids, masks = make_rows(kind)
    states, _ = compute_theirs(pair, ids, masks)
    if kind == "mmu":
        lengths, orders, split = np.full(ROWS, IMAGE), ("full", "causal"), IMAGE
        first, second = ids[:, :IMAGE], ids[:, IMAGE:]
    else:
        lengths, orders, split = TEXT_LENGTH - np.asarray(PADS), ("causal", "full"), TEXT_LENGTH
        # The pads of the left side stand on the right.
        first = np.stack([np.roll(row, -n) for row, n in zip(ids[:, :split], PADS, strict=True)])
        second = ids[:, split:]

    def whole(model, first, second, lengths):
        first, second = model.embed_text(first), model.embed_text(second)
        return model.language_model.read_parts(first, lengths, second, orders)

    def cached(model, first, second, lengths):
        first, second = model.embed_text(first), model.embed_text(second)
        hidden, caches = model.language_model.read_first(first, lengths, orders[0])
        return hidden, model.language_model.read_second(second, caches, lengths, orders[1])

    for function in (whole, cached):
        before, behind = ours(pair, function, first, second, lengths)
        assert_close(f"second part {kind}", behind, states[:, split:])
        for row, (length, pads) in enumerate(zip(lengths, PADS, strict=True)):
            expected = states[row, split - length : split]
            assert_close(f"first part {kind} {pads}", before[row, :length], expected)


def test_texts_without_an_image_are_scored_as_a_causal_model_does(pair):
    """Every token behind the first, which begins any text."""
    ids = np.random.default_rng(3).integers(0, TEXT, (ROWS, 8)).astype(np.int32)
    with torch.no_grad():
        logits = pair.torch(torch.from_numpy(ids)).logits[:, :-1]
    expected = torch.log_softmax(logits, -1).gather(-1, torch.from_numpy(ids[:, 1:, None]).long())
    special = make_special_tokens(TEXT, 2**Z_CHANNELS)

    def score(model, ids):
        prompts = EncodedPrompts(ids[:, :1], jnp.ones((ROWS, 1), bool))
        return text_logprobs(model, prompts, ids[:, 1:], LogprobOptions(special))[0]

    assert_close("log-probs of texts", ours(pair, score, ids), expected[..., 0].numpy())


# ---- MAGVIT-v2


@pytest.fixture(scope="module")
def tokenizer():
    model = torch_show_o.tiny_tokenizer()
    return SimpleNamespace(torch=model, params=torch_show_o.tokenizer_params(model))


def run_tokenizer(tokenizer, function, *arguments):
    with jax.default_matmul_precision("highest"):
        compiled = jax.jit(lambda params, *rest: function(bind(Magvit, MAGVIT, params), *rest))
        return jax.tree.map(np.asarray, compiled(tokenizer.params, *arguments))


def test_encoder_and_codes(tokenizer):
    """An image that is not square, so that rows and columns cannot be mixed up."""
    pixels = np.random.default_rng(1).uniform(-1, 1, (2, 24, 16, 3)).astype(np.float32)
    theirs = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        latents = tokenizer.torch.encoder(theirs).numpy().transpose(0, 2, 3, 1)
        codes = tokenizer.torch.encode(theirs).numpy()
    found, codes_found = run_tokenizer(
        tokenizer, lambda model, x: (model.latents(x), model.encode(x)), pixels
    )
    assert found.shape == (2, 6, 4, Z_CHANNELS)
    assert_close("latents", found, latents)
    assert len(np.unique(codes)) > 5
    np.testing.assert_array_equal(codes_found, codes)


def test_decoder_of_codes_and_of_weights(tokenizer):
    codes = np.random.default_rng(2).integers(0, 2**Z_CHANNELS, (2, 16)).astype(np.int32)
    with torch.no_grad():
        expected = tokenizer.torch.decode(torch.from_numpy(codes.reshape(2, 4, 4)).long()).numpy()
    pixels, soft = run_tokenizer(
        tokenizer,
        lambda model, x: (model.decode(x), model.decode_soft(jax.nn.one_hot(x, 2**Z_CHANNELS))),
        codes,
    )
    assert_close("pixels", pixels, expected.transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(soft, pixels)


def test_released_sizes_are_those_of_the_table():
    """Parameters of every module of the released tokenizer, and their number."""
    with torch.device("meta"):
        model = torch_show_o.Tokenizer(**torch_show_o.RELEASED)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    found = flatten(make_abstract(Magvit, MagvitConfig()))
    assert len(found) == len(expected)
    assert sum(leaf.size for leaf in found.values()) == 95_387_004
    # The published number counts the table of signs.
    assert 95_387_004 + 8192 * 13 == 95_493_500
    for path, leaf in found.items():
        name = path.replace("/", ".").replace(".kernel", ".weight").replace(".scale", ".weight")
        order = (3, 2, 0, 1) if leaf.ndim == 4 else (0,)
        assert tuple(leaf.shape[i] for i in order) == expected[name], path


def test_bits_are_the_first_channel_first():
    assert magvit.quantise(jnp.asarray([[0.3, -2, 0.1], [-1, -1, 1e-9], [0, 0, 0]])).tolist() == [
        5, 1, 0,
    ]  # fmt: skip
    table = magvit.make_codebook(13)
    assert table.shape == (8192, 13) and set(table.flat) == {-1.0, 1.0}
    assert table[4096].tolist() == [1.0] + [-1.0] * 12
    np.testing.assert_array_equal(magvit.quantise(jnp.asarray(table)), np.arange(8192))
    np.testing.assert_array_equal(magvit.look_up(jnp.arange(8192), 13), table)


def test_pixels_are_cut_off():
    pixels = jnp.asarray([-1.5, -1, 0, 0.999, 1, 2])
    # 0 is 127.5 and 0.999 is 254.87
    assert magvit.to_uint8(pixels).tolist() == [0, 0, 127, 254, 255, 255]


def test_released_parameter_counts():
    config = network.PRESETS["show-o-w-clip-vit-512x512"]
    flat = flatten(network.abstract(config))
    sizes = {path: leaf.size for path, leaf in flat.items() if not path.startswith("vqmodel")}
    projector = sum(size for path, size in sizes.items() if path.startswith("mm_projector"))
    assert sum(sizes.values()) == 1_454_472_322
    assert sum(sizes.values()) - projector == 1_448_176_770
    assert config.phi.vocab_size == config.vocab_size == 58498
    assert (config.image_offset, config.mask_token) == (50305, 58497)
