"""Decodes untrusted image files to 8-bit RGB."""

from __future__ import annotations

import io
import os
import stat
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

from corl_jax.errors import InputError
from corl_jax.input_files import LFS_PREFIX

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
MAX_PIXELS = 2**25  # 100 MB as RGB; Pillow's own limit lets 535 MB through with a warning
MAX_FILE_BYTES = 2**28  # encoded; a BMP of MAX_PIXELS with alpha has half of it
MAX_SIDE = 2**14  # a line of 100,000 pixels costs as much to resize as a large image
WHITE = (255, 255, 255)
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_KEYWORD_BYTES = 80  # 79 and a NUL; a text begins with it
ORIENTATION_TEXTS = (b"XML:com.adobe.xmp", b"Raw profile type exif")  # may tell how to turn it
ROTATIONS = {  # by the value of EXIF's Orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(InputError):
    """A value that is not a usable image. The message says what was found instead."""


def decode_image(value: Any, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes encoded bytes, a Hugging Face Image struct, a file path or a PIL image to RGB.

    A list with one element stands for this element. The EXIF rotation is applied and other
    metadata ignored. Transparency is put over white. An animation gives its first frame.

    Raises:
        BadImage: nothing there, a format outside `FORMATS`, too large, truncated or corrupt.
    """
    value = take_single_image(value)
    if isinstance(value, Image.Image):
        _check_size(value.size, max_pixels)
        return _decode(value)
    data = remove_png_metadata(_read_encoded_bytes(value))
    try:
        return _decode_bytes(data, max_pixels)
    except BadImage:
        # A wrong checksum in the metadata spoils no pixel: try again with the pixels alone.
        pixels = keep_png_pixels(data)
        if len(pixels) == len(data):
            raise
    return _decode_bytes(pixels, max_pixels)


def fit_pixels(images: Sequence[Image.Image], side: int) -> np.ndarray:
    """Returns the centre squares of images as float32 [N, side, side, 3] in [-1, 1]."""
    levels = np.stack([np.asarray(_fit_square(image, side)) for image in images])
    # All at once: an array for each image would take longer than these numbers do.
    pixels = levels.astype(np.float32)
    pixels /= 127.5
    pixels -= 1.0
    return pixels


def _fit_square(image: Image.Image, side: int) -> Image.Image:
    if image.size == (side, side):
        return image
    return ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC)


def take_single_image(value: Any) -> Any:
    """Returns the only image of a list, None for an empty list, and other values unchanged.

    Raises:
        BadImage: a list of several.
    """
    if not isinstance(value, list | tuple):
        return value
    if len(value) > 1:
        raise BadImage(f"image: found a list of {len(value)} images; expected one image per row")
    return value[0] if value else None


def remove_png_metadata(data: bytes) -> bytes:
    """Returns a PNG without its texts and colour profile; returns other data unchanged.

    The first text of each kind that may state the orientation stays.
    """
    # Pillow decompresses these chunks, refuses a PNG for their size, and holds up to 64 MB of them.
    # Here nothing is decompressed.
    orientation = set(ORIENTATION_TEXTS)

    def is_kept(kind: bytes, content: bytes) -> bool:
        keyword = content[:PNG_KEYWORD_BYTES].partition(b"\0")[0]
        is_needed = kind not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP") or keyword in orientation
        orientation.discard(keyword)
        return is_needed

    return _filter_png_chunks(data, is_kept)


def keep_png_pixels(data: bytes) -> bytes:
    """Returns a PNG with the chunks that its pixels need: critical chunks and transparency."""
    # The PNG standard marks critical chunks by an upper-case first letter: IHDR, PLTE, IDAT, IEND.
    return _filter_png_chunks(data, lambda kind, _: kind[:1].isupper() or kind == b"tRNS")


def _filter_png_chunks(data: bytes, is_kept: Callable[[bytes, bytes], bool]) -> bytes:
    if not data.startswith(PNG_SIGNATURE):
        return data
    place, parts = len(PNG_SIGNATURE), [PNG_SIGNATURE]
    while place + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        end = place + 8 + length + 4  # length, type, content, checksum
        if is_kept(kind, data[place + 8 : min(end, place + 8 + PNG_KEYWORD_BYTES)]):
            parts.append(data[place:end])
        place = end
    # A truncated chunk at the end stays, so that Pillow reports the file as truncated.
    return b"".join([*parts, data[place:]])


def convert_to_rgb(image: Image.Image) -> Image.Image:
    """Converts any mode to 8-bit RGB: alpha over white, 16-bit scaled to 8.

    Raises:
        BadImage: a mode without a fixed range (float, or integers above 16 bits).
    """
    if image.mode == "RGB":
        return image
    if image.mode == "F":
        raise BadImage("image: found 32-bit float pixels; expected 8 or 16 bits a channel")
    if image.mode.startswith("I"):
        return _convert_grey(np.asarray(image).astype(np.int64))
    # Pillow's own conversion drops alpha: transparent pixels would show arbitrary colours.
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        background = Image.new("RGBA", rgba.size, (*WHITE, 255))
        return Image.alpha_composite(background, rgba).convert("RGB")
    return image.convert("RGB")


def _read_encoded_bytes(value: Any) -> bytes:
    """Returns the encoded file of a bytes value, an Image struct or a path."""
    if isinstance(value, Mapping):
        data = value.get("bytes")
        if data is None and value.get("path"):
            raise BadImage(
                f"image: bytes is null and only the path {value['path']!r} is given; expected "
                "the encoded file in bytes (write the data set with embedded files)"
            )
        value = data
    if isinstance(value, str | os.PathLike):
        value = _read_file(value)
    if value is None:
        raise BadImage("image: found null; expected encoded bytes")
    if not isinstance(value, bytes | bytearray | memoryview):
        raise BadImage(f"image: found {type(value).__name__}; expected encoded bytes")
    return bytes(value)


def _read_file(path: str | os.PathLike) -> bytes:
    try:
        # Not a device, whose data never ends, and not a pipe, whose data may never begin.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise BadImage(f"image: cannot read {path}: not a file")
        with open(path, "rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise BadImage(f"image: cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise BadImage(f"image: cannot read {os.fspath(path)!r}: {error}") from error
    if len(data) > MAX_FILE_BYTES:
        raise BadImage(f"image: {path} has more than {MAX_FILE_BYTES:,} bytes")
    return data


def _describe_bytes(data: bytes) -> str:
    """Returns a description of bytes that cannot be decoded, for an error message."""
    if not data:
        return "0 bytes"
    return f"{len(data)} bytes starting with {data[:12]!r}"


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if min(size) < 1:
        raise BadImage(f"image: found {width}x{height} pixels; expected at least 1x1")
    if width * height > max_pixels or max(size) > MAX_SIDE:
        raise BadImage(
            f"image: found {width}x{height} pixels; expected at most {max_pixels:,} in all and "
            f"{MAX_SIDE:,} a side"
        )


def _decode_bytes(data: bytes, max_pixels: int) -> Image.Image:
    if data.startswith(LFS_PREFIX):
        raise BadImage(
            "image: found a Git LFS pointer, not the image; run `git lfs pull` in its clone"
        )
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception as error:  # Pillow's parsers raise a dozen types on hostile bytes
        raise BadImage(
            f"image: found {_describe_bytes(data)}, which does not open ({type(error).__name__}): "
            f"truncated, corrupt, or not one of {', '.join(FORMATS)}"
        ) from error
    with image:
        _check_size(image.size, max_pixels)
        decoded = _decode(image)
    _check_size(decoded.size, max_pixels)  # a damaged file may have said otherwise before
    return decoded


def _read_rotation(image: Image.Image) -> Image.Transpose | None:
    """Returns the rotation that the metadata state; None without readable metadata."""
    try:
        return ROTATIONS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # cameras and editors write metadata that Pillow's parser cannot read
        return None


def _decode(image: Image.Image) -> Image.Image:
    try:
        image.load()
        rotation = _read_rotation(image)
        return convert_to_rgb(image if rotation is None else image.transpose(rotation))
    except BadImage:
        raise
    except Exception as error:
        width, height = image.size
        raise BadImage(
            f"image: the {width}x{height} {image.format or image.mode} file is truncated or "
            f"corrupt ({type(error).__name__}: {error})"
        ) from error


def _convert_grey(values: np.ndarray) -> Image.Image:
    """Converts integer grey values [H, W] to RGB."""
    # Pillow's own conversion clips 16 bits instead of scaling them: 65535 -> 255, 32768 -> 255.
    # Here 65535 / 257 = 255; adding 128 rounds to the nearest.
    top = int(values.max(initial=0))
    if top > 65535 or int(values.min(initial=0)) < 0:
        raise BadImage(f"image: found grey values up to {top}; expected 8 or 16 bits a channel")
    eight_bits = (values + 128) // 257
    return Image.fromarray(eight_bits.astype(np.uint8)).convert("RGB")
