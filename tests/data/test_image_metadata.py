"""Metadata of pictures: ignored but for the orientation, and never a way to fill the memory."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from corl_jax.data.images import decode_image
from tests.support.tiny_models import encode, tiny_image


def png_chunk(kind: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


BOMB = zlib.compress(bytes(2**26))
ROTATED = b'<x tiff:Orientation="6"/>'
METADATA = {
    "long text": [png_chunk(b"tEXt", b"workflow\0" + b"x" * 3_000_000)] * 25,
    "bomb": [png_chunk(b"zTXt", b"workflow\0\0" + BOMB)],
    "international bomb": [png_chunk(b"iTXt", b"workflow\0\1\0\0\0" + BOMB)] * 50,
    "orientation bomb": [png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + BOMB)] * 50,
    "profile bomb": [png_chunk(b"iCCP", b"icc\0\0" + BOMB)],
    "wrong checksum": [png_chunk(b"tEXt", b"a\0b")[:-1] + b"x"],
    "exif with wrong checksum": [png_chunk(b"eXIf", b"MM")[:-1] + b"x"],
    "unreadable exif": [png_chunk(b"eXIf", b"no exif at all")],
    "unreadable raw exif": [png_chunk(b"tEXt", b"Raw profile type exif\0a\nb\nc\nno hex")],
}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("name", METADATA)
@pytest.mark.parametrize("place", [33, -12], ids=["before pixels", "after pixels"])
def test_metadata_of_a_png_is_ignored_and_never_unpacked(monkeypatch, name, place):
    """Unpacked is at most one text, which may tell the orientation, and of that at most 1 MB."""
    unpacked = []
    original = PngImagePlugin._safe_zlib_decompress
    monkeypatch.setattr(
        PngImagePlugin,
        "_safe_zlib_decompress",
        lambda data: (unpacked.append(len(data)), original(data))[1],
    )
    plain = encode(tiny_image(0, (8, 4)))
    data = b"".join([plain[:place], *METADATA[name], plain[place:]])
    assert encode(decode_image(data)) == plain
    assert len(unpacked) <= 1


def test_orientation_in_texts_of_a_png_still_counts():
    plain = encode(tiny_image(0, (8, 4)))
    turned = png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + ROTATED)
    data = b"".join([plain[:33], turned, *METADATA["bomb"], plain[33:]])
    assert decode_image(data).size == (4, 8)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0nothing"]
)
def test_unreadable_exif_is_ignored(exif):
    picture = Image.new("RGB", (8, 4), "red")
    assert decode_image(encode(picture, "JPEG", exif=exif)).size == (8, 4)


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_every_orientation_is_that_of_pillow(image_format):
    for orientation in range(10):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encode(tiny_image(0, (8, 4)), image_format, exif=exif)
        expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        np.testing.assert_array_equal(np.asarray(decode_image(data)), np.asarray(expected))
