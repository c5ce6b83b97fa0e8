"""The VAE against diffusers' AutoencoderKL, and its files against diffusers' loaders."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from corl_jax.models import modules
from corl_jax.models.sd_vae import SdVae, SdVaeConfig
from corl_jax.weights.export import convert
from corl_jax.weights.layouts.sd_vae import KIND, load_vae, make_config
from tests.support import tiny_vae
from tests.support.tiny_vae import CONFIG, SAFE, write_vae
from tests.support.weight_files import assert_same_bits

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("exact_products")

TOLERANCE = 1e-4
# Two levels, more blocks, other groups and more latents than the other one has.
OTHER = SdVaeConfig(
    latent_channels=5, block_channels=(12, 20), num_res_blocks=2, norm_groups=2, scaling_factor=0.7
)


@pytest.fixture(scope="module", params=[CONFIG, OTHER], ids=["four levels", "two levels"])
def pair(request, tmp_path_factory):
    """A folder of ours, its sizes and parameters, and the network that diffusers loads from it."""
    config, folder = request.param, tmp_path_factory.mktemp("vae")
    write_vae(folder, tiny_vae.make_state(config), **make_config(config))
    theirs, info = diffusers.AutoencoderKL.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    loaded, params = load_vae(folder)
    assert loaded == config
    return config, params, theirs.eval()


def to_nchw(x: np.ndarray):
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def to_nhwc(x) -> np.ndarray:
    return x.detach().numpy().transpose(0, 2, 3, 1)


def test_encoding(pair):
    config, params, theirs = pair
    pixels = np.random.default_rng(2).uniform(-1, 1, (2, 24, 16, 3)).astype(np.float32)
    encode = jax.jit(lambda params, x: modules.bind(SdVae, config, params).encode(x))
    mean, logvar = encode(params, pixels)
    with torch.no_grad():
        expected = theirs.encode(to_nchw(pixels)).latent_dist
    assert mean.shape[1:3] == (24 // config.downsample, 16 // config.downsample)
    np.testing.assert_allclose(mean, to_nhwc(expected.mean), atol=TOLERANCE)
    np.testing.assert_allclose(logvar, to_nhwc(expected.logvar), atol=TOLERANCE)
    assert np.std(mean) > 0.1 and np.std(logvar) > 0.1


def test_decoding(pair):
    config, params, theirs = pair
    shape = (2, 3, 2, config.latent_channels)
    latents = np.random.default_rng(3).normal(size=shape).astype(np.float32)
    decode = jax.jit(lambda params, x: modules.bind(SdVae, config, params).decode(x))
    with torch.no_grad():
        expected = to_nhwc(theirs.decode(to_nchw(latents)).sample)
    np.testing.assert_allclose(decode(params, latents), expected, atol=TOLERANCE)
    assert np.std(expected) > 0.1


def test_images_follow_the_released_demo(pair):
    """Its lines on scaled latents; a value at the border of two codes may fall to either side."""
    config, params, theirs = pair
    latents = np.random.default_rng(4).normal(size=(1, 3, 2, config.latent_channels))
    latents = latents.astype(np.float32) * np.float32(config.scaling_factor) * 3
    draw = jax.jit(lambda params, x: modules.bind(SdVae, config, params).draw_pixels(x))
    found = np.asarray(draw(params, latents)).astype(int)
    with torch.no_grad():
        decoded = theirs.decode(to_nchw(latents) / theirs.config.scaling_factor).sample
    expected = ((decoded.clip(-1, 1).permute(0, 2, 3, 1).numpy() + 1) / 2 * 255).astype(np.uint8)
    assert np.abs(found - expected).max() <= 1 and (found == expected).mean() > 0.99
    assert len(np.unique(expected)) > 50


def test_names_and_shapes_of_sdxl():
    """The whole table at the published sizes, against the class on no device."""
    with torch.device("meta"):
        theirs = diffusers.AutoencoderKL.from_config(make_config(SdVaeConfig()))
    expected = {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    slots = KIND.tables["diffusers"].make_slots(KIND.shapes(SdVaeConfig()))
    assert {slot.key: slot.shape for slot in slots} == expected
    assert tiny_vae.list_shapes(SdVaeConfig()) == expected
    assert sum(value.numel() for value in theirs.state_dict().values()) == 83_653_863


@pytest.mark.parametrize("layout", ["diffusers_old", "ldm"])
def test_other_names_mean_what_they_mean_to_diffusers(layout, tmp_path):
    state = tiny_vae.make_state()
    if layout == "ldm":
        from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

        renamed = tiny_vae.to_ldm_names(state)
        tensors = {key: torch.from_numpy(value) for key, value in renamed.items()}
        theirs = convert_ldm_vae_checkpoint(tensors, tiny_vae.make_config())
        save_file(renamed, tmp_path / "sdxl_vae.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(tiny_vae.make_config()))
    else:
        write_vae(tmp_path, tiny_vae.to_old_names(state))
        theirs = diffusers.AutoencoderKL.from_pretrained(tmp_path).state_dict()
    convert(tmp_path, tmp_path / "new", KIND, layout="diffusers")
    found = load_file(tmp_path / "new" / SAFE)
    assert_same_bits(found, {key: value.numpy() for key, value in theirs.items()})
    assert_same_bits(found, state)


@pytest.mark.parametrize("as_bin", [False, True])
def test_diffusers_loads_what_was_written_from_our_layout(as_bin, tmp_path):
    state = tiny_vae.make_state()
    convert(write_vae(tmp_path / "source", state), tmp_path / "ours", KIND)
    (tmp_path / "ours" / "source" / "config.json").unlink()  # so that config.json is written anew
    convert(tmp_path / "ours", tmp_path / "back", KIND, layout="diffusers", as_bin=as_bin)
    theirs, info = diffusers.AutoencoderKL.from_pretrained(
        tmp_path / "back", output_loading_info=True, use_safetensors=not as_bin
    )
    assert not any(info.values()), info
    assert_same_bits({key: x.numpy() for key, x in theirs.state_dict().items()}, state)
    stated = dataclasses.asdict(CONFIG)
    assert theirs.config.scaling_factor == stated["scaling_factor"]
    assert tuple(theirs.config.block_out_channels) == stated["block_channels"]
