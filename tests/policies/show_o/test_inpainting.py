"""A part of a given image drawn anew: masks, kept codes, and what is refused."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

import corl_jax
from corl_jax import generate
from corl_jax.errors import InputError
from corl_jax.policies.show_o.images import decode_images
from corl_jax.policies.show_o.inpainting import choose_drawn, cut_given_image
from tests.support import show_o_files
from tests.support.tiny_models import tiny_image

SIDE = 16  # of an image of 4 x 4 codes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return show_o_files.original_folder(tmp_path_factory.mktemp("models") / "show-o")


@pytest.fixture(scope="module")
def model(folder):
    return corl_jax.load(folder, dtype="float32")


@pytest.fixture
def picture(tmp_path):
    tiny_image(0, (SIDE, SIDE)).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


@pytest.fixture
def mask(tmp_path):
    """The right half is white."""
    levels = np.zeros((SIDE, SIDE), np.uint8)
    levels[:, SIDE // 2 :] = 255
    Image.fromarray(levels).save(tmp_path / "mask.png")
    return tmp_path / "mask.png"


@pytest.mark.parametrize(("size", "factor"), [(64, 16), (16, 4), (16, 2), (96, 16)])
def test_masks_are_reduced_as_pytorch_does(size, factor):
    rng = np.random.default_rng(size + factor)
    blobs = rng.integers(0, 2, (size // 4, size // 4)).repeat(4, 0).repeat(4, 1) * 255
    levels = np.where(rng.random((size, size)) < 0.2, rng.integers(0, 256, (size, size)), blobs)
    shares = torch.from_numpy(levels.astype(np.float32) / 255)[None, None]
    expected = functional.interpolate(shares, size=size // factor, mode="bicubic") >= 0.5
    found = choose_drawn(levels.astype(np.uint8), factor)
    np.testing.assert_array_equal(found, expected.numpy().reshape(-1))
    assert 0 < found.sum() < found.size


def test_the_centre_of_image_and_mask_is_used(model):
    """Both are cut alike, at the short side of the image."""
    sizes = model.policy.sizes
    wide = tiny_image(1, (40, 2 * SIDE))
    levels = np.zeros((2 * SIDE, 40), np.uint8)
    levels[:, :12] = 255  # 6 of 20 pixels, of which 2 are cut off
    pixels, is_drawn = cut_given_image(sizes, wide, Image.fromarray(levels))
    assert is_drawn.reshape(4, 4).tolist() == [[True, False, False, False]] * 4
    levels = np.asarray(wide.resize((20, SIDE), Image.Resampling.BICUBIC))[:, 2:18]
    np.testing.assert_allclose(pixels, levels / 127.5 - 1, atol=1e-6)


def test_the_command_keeps_what_the_mask_does_not_show(model, folder, picture, mask, tmp_path):
    arguments = ["image", "--model", folder, "--prompt", "a red circle", "--prompt", "two",
                 "--images-per-prompt", 2, "--image-steps", 3, "--dtype", "float32", "--seed", 1,
                 "--batch-size", 3]  # fmt: skip
    given = ["--inpaint", picture, "--mask", mask]
    generate.main([str(x) for x in (*arguments, *given, "--out", tmp_path / "out")])
    lines = [json.loads(x) for x in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    assert [line["inpaint"] for line in lines] == [str(picture)] * 4
    codes = np.array([line["tokens"] for line in lines]).reshape(4, 4, 4)
    policy = model.policy
    pixels, _ = cut_given_image(policy.sizes, Image.open(picture), Image.open(mask))
    kept = policy.family.encode_images(policy.sizes, policy.params, jnp.asarray(pixels)[None])
    kept = np.asarray(kept).reshape(4, 4)
    assert (codes[:, :, :2] == kept[:, :2]).all()
    assert (codes[:, :, 2:] != kept[:, 2:]).any()
    assert len({row.tobytes() for row in codes}) > 1
    decoded = decode_images(policy.sizes, policy.params, jnp.asarray(codes.reshape(4, -1)))
    files = np.array([np.asarray(Image.open(tmp_path / "out" / x["file"])) for x in lines], int)
    # Three images at a time may round to another level than four, on some processors.
    np.testing.assert_allclose(files, decoded, atol=1, rtol=0)
    drawn = model.generate_images(
        ["a red circle", "two"], 2, image_steps=3, seed=1, inpaint=Image.open(picture), mask=mask
    )
    redrawn = np.array([np.asarray(x) for row in drawn for x in row], int)
    np.testing.assert_allclose(redrawn, files, atol=1, rtol=0)
    spread = model.generate_images(
        ["a red circle", "two"], 2, image_steps=3, seed=1, inpaint=Image.open(picture), mask=mask,
        spread_steps=True,
    )  # fmt: skip
    assert (np.array([np.asarray(x) for row in spread for x in row]) != np.array(files)).any()


def refuse(capsys, model, tmp_path, *arguments) -> str:
    with pytest.raises(SystemExit) as error:
        generate.main([str(x) for x in ("image", "--model", model, "--prompt", "a", *arguments,
                                        "--out", tmp_path / "out")])  # fmt: skip
    assert error.value.code == 2
    return capsys.readouterr().err


def test_images_and_masks_that_cannot_be_used(folder, picture, mask, tmp_path, capsys):
    said = refuse(capsys, folder, tmp_path, "--inpaint", picture)
    assert "--mask: not given; expected --inpaint with --mask" in said
    said = refuse(capsys, folder, tmp_path, "--mask", mask)
    assert "--inpaint: not given; expected --inpaint with --mask" in said
    said = refuse(capsys, folder, tmp_path, "--spread-steps")
    assert "--spread-steps: has an effect with --inpaint alone" in said
    (tmp_path / "text.png").write_text("no image")
    bad = ("--inpaint", tmp_path / "text.png", "--mask", tmp_path / "none.png")
    said = refuse(capsys, folder, tmp_path, *bad)
    assert "--inpaint: " in said and "--mask: " in said and "none.png" in said
    small = tmp_path / "small.png"
    Image.new("L", (SIDE, 8), 255).save(small)
    said = refuse(capsys, folder, tmp_path, "--inpaint", picture, "--mask", small)
    assert "--mask: found a mask of 16 x 8 pixels, expected 16 x 16" in said
    Image.new("L", (SIDE, SIDE)).save(small)
    said = refuse(capsys, folder, tmp_path, "--inpaint", picture, "--mask", small)
    assert "--mask: found a mask without a code to draw; expected white" in said


def test_other_families_refuse(picture, mask, tmp_path, capsys):
    said = refuse(capsys, "nano", tmp_path, "--inpaint", picture, "--mask", mask)
    assert "--inpaint: a janus draws no part of a given image; leave --inpaint and --mask" in said
    with pytest.raises(InputError, match="inpaint: a janus draws no part"):
        corl_jax.load("nano", dtype="float32").generate_images("a", inpaint=picture, mask=mask)
