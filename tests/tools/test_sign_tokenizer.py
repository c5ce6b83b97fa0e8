"""A small Show-o whose tokenizer begins as that of the nano Janus: layers, images, files, words."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from corl_jax.assets import NANO_JANUS
from corl_jax.errors import InputError
from corl_jax.models import modules
from corl_jax.models.magvit import Magvit
from corl_jax.models.vq import VQModel
from corl_jax.params import flatten, map_with_path, unflatten
from corl_jax.policies import load_policy
from corl_jax.policies.show_o.tokens import CONTROLS, PAD
from tests.support.tolerances import NETWORK
from tests.tools.test_roundtrip import pictures
from tools.small_models import roundtrip, sign_tokenizer
from tools.small_models.__main__ import main
from tools.small_models.show_o_sizes import make_mini_config, make_nano_config

SIZES = make_nano_config(400).magvit


@pytest.fixture(scope="module")
def nano():
    return load_policy(NANO_JANUS, jnp.float32)


def test_all_layers_but_the_signs_do_what_the_janus_does(nano):
    """Without what has no place here: attention beside the middle, a bias under zero padding."""

    def remove(path, leaf):
        is_lost = ("/attn/" in path and "/proj_out/" in path) or path == "post_quant_conv/bias"
        return leaf * 0 if is_lost else leaf

    old = map_with_path(remove, nano.params["vqmodel"])
    vq = modules.bind(VQModel, nano.sizes.vq, old)
    rng = np.random.default_rng(0)
    matrix = np.linalg.qr(rng.normal(size=(8, 8)))[0]
    rotation = sign_tokenizer.Rotation(rng.normal(size=8), matrix, 0.3)
    flat = {path: np.asarray(leaf) for path, leaf in flatten(old).items()}
    new = unflatten(sign_tokenizer.convert(flat, SIZES, rotation, 2.0))
    magvit = modules.bind(Magvit, SIZES, jax.tree.map(jnp.asarray, new))
    pixels = jnp.asarray(pictures(2), jnp.float32) / 127.5 - 1
    raw = np.asarray(vq.quant_conv(vq.encoder(pixels)))
    expected = (raw / 2.0 - rotation.mean) @ matrix / 0.3
    np.testing.assert_allclose(magvit.latents(pixels), expected, rtol=1e-3, atol=1e-3)
    codes = rng.choice([-1.0, 1.0], size=(2, 4, 4, 8))
    before = vq.decode_latents(jnp.asarray(codes * 0.3 @ matrix.T + rotation.mean, jnp.float32))
    after = magvit.decode_latents(jnp.asarray(codes, jnp.float32))
    np.testing.assert_allclose(after, before, rtol=NETWORK, atol=1e-4)


def test_the_rotation_is_one_and_finds_signs_that_were_rotated():
    rng = np.random.default_rng(1)
    hidden = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    signs = np.tile([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], (8, 1))
    found = sign_tokenizer.find_rotation(0.5 * signs @ hidden + 0.1, seed=0)
    np.testing.assert_allclose(found.matrix @ found.matrix.T, np.eye(3), atol=1e-6)
    np.testing.assert_allclose(found.mean, 0.1, atol=1e-6)
    np.testing.assert_allclose(np.abs(0.5 * signs @ hidden @ found.matrix), 0.5, atol=1e-4)
    assert found.size == pytest.approx(0.5, abs=1e-4)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    out = tmp_path_factory.mktemp("models") / "start"
    main(["--family", "show-o", "--size", "nano", "--image-tokenizer", "nano", "--out", str(out)])
    return load_policy(out)


def test_the_start_of_a_show_o_draws_pictures_from_signs(start):
    before = pictures(8)
    after = roundtrip.reconstruct(start, before)
    # A white image has 0.28.
    assert np.sqrt(((after.astype(float) - before) ** 2).mean()) / 255 < 0.13


def test_the_start_of_a_show_o_has_its_sizes_and_its_tokens(start):
    # Sizes that no file states follow from the shapes.
    assert start.family.name == "show_o"
    assert start.sizes == make_nano_config(start.sizes.llm_vocab_size)
    tokenizer, special = start.processor.tokenizer, start.processor.special
    assert [tokenizer.token_to_id(name) for name in (PAD, *CONTROLS)] == [
        special.pad + place for place in range(10)
    ]
    assert special.eos == special.pad - 1 == start.sizes.llm_vocab_size - 1
    text = "a red circle left of a blue cross"
    ids = start.processor.t2i_ids(text)
    assert len(ids) == 3 + len(text.split()), "each word is one token"
    assert start.processor.decode(ids) == f"<|t2i|>{text}"


def test_tokenizers_of_other_sizes_and_families_are_refused(nano, capsys):
    with pytest.raises(InputError, match="its image tokenizer fits"):
        sign_tokenizer.make_start(nano, make_mini_config(400).magvit, 0, "small")
    with pytest.raises(SystemExit):
        main(["--out", "x", "--image-tokenizer", "nano"])
    assert "--family janus-flow or show-o" in capsys.readouterr().err
