"""Captions images with BLIP, greedily.

One device program resizes and normalises images, encodes them and decodes captions.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from PIL import Image

from corl_jax.console import hide_import_advice
from corl_jax.devices.batches import PendingRows, run_in_pieces
from corl_jax.devices.compiling import ExactProgram
from corl_jax.errors import InputError, Problems
from corl_jax.models import modules
from corl_jax.models.blip import Blip, BlipConfig, BlipTextConfig, DecoderCache, TextDecoder
from corl_jax.models.pillow_resize import resize_levels
from corl_jax.rewards.image import resize_on_host
from corl_jax.types import Params
from corl_jax.weights.folders import open_unmarked_folder
from corl_jax.weights.foreign_config import Fields
from corl_jax.weights.storage import read_json

CHUNK = 64
"""Images in one program; bounds the memory of the image features and their keys."""

Triple = tuple[float, float, float]


def caption_images(
    network: Any, images: np.ndarray, *, max_new_tokens: int = 50, chunk: int = CHUNK
) -> Callable[[], list[str]]:
    """Captions images uint8 [N, H, W, 3] with at most `max_new_tokens` tokens, without waiting.

    Returns a function that waits for the captions, one per image. `network` is a BLIP captioner
    (see `samples.Network`) whose folder holds the tokenizer and the image settings. Each process
    captions only the images of its rows.

    Raises: InputError for a folder without those files, settings that are not implemented, or
        more tokens than the decoder has positions.
    """
    tokenizer = load_tokenizer(Path(network.folder), network.config.text)
    tokens = generate_caption_tokens(network, images, max_new_tokens=max_new_tokens, chunk=chunk)
    return lambda: [
        tokenizer.decode(row.tolist(), skip_special_tokens=True).strip()
        for row in np.asarray(tokens)
    ]


def generate_caption_tokens(
    network: Any, images: np.ndarray, *, max_new_tokens: int = 50, chunk: int = CHUNK
) -> PendingRows:
    """Returns token ids int32 [N, max_new_tokens] of captions, without the first token.

    The separator ends a caption and pads its row. A caption without separator was cut.

    Raises: InputError as `caption_images`.
    """
    positions = network.config.text.max_position_embeddings
    if not 0 < max_new_tokens <= positions:
        raise InputError(
            f"max_new_tokens: found {max_new_tokens}; expected 1 to {positions}, the positions "
            f"of the captioner in {network.folder}"
        )
    if not len(images):
        return PendingRows(lambda: np.zeros((0, max_new_tokens), np.int32))
    settings = read_image_settings(Path(network.folder), network.config.vision.image_size)

    def program(pixels: jax.Array) -> jax.Array:
        return _caption_program(
            network.config, network.params, pixels, settings=settings,
            max_new_tokens=max_new_tokens, dtype=jnp.dtype(network.dtype),
        )  # fmt: skip

    def take(index: np.ndarray) -> tuple:
        return (resize_on_host(images[index], settings.size, "bicubic"),)

    return run_in_pieces(program, take, len(images), chunk, network.params)[0]


def check_assets(checkpoint: Any) -> None:
    """Checks the folder's tokenizer and image settings.

    Raises: InputError listing what cannot be used.
    """
    folder, config = Path(checkpoint.folder), checkpoint.config
    problems = Problems()
    problems.attempt(load_tokenizer, folder, config.text)
    problems.attempt(read_image_settings, folder, config.vision.image_size)
    problems.raise_any()


# ---- the device program


@functools.partial(ExactProgram, static_argnames=("config", "settings", "max_new_tokens", "dtype"))
def _caption_program(
    config: BlipConfig,
    params: Params,
    images: jax.Array,
    *,
    settings: ImageSettings,
    max_new_tokens: int,
    dtype: Any,
) -> jax.Array:
    # Products of float32 are exact on every platform: a caption that changes with the rounding of
    # TensorFloat-32 would give the same image another reward.
    with jax.default_matmul_precision("highest"):
        # Parameters may be stored in another dtype than the one to compute in.
        model = modules.bind(Blip, config, jax.tree.map(lambda x: x.astype(dtype), params))
        # Squashed, whatever their aspect ratio, as BlipProcessor does.
        pixels = normalise_images(resize_levels(images, settings.size), settings)
        features = model.vision_model(pixels)
        return decode_greedily(model.text_decoder, features, max_new_tokens)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """What one decode step passes to the next."""

    step: jax.Array  # scalar int32, tokens generated so far
    token: jax.Array  # [N] int32, the newest token, which the decoder reads next
    done: jax.Array  # [N] bool, rows that have ended
    tokens: jax.Array  # [N, T] int32
    cache: DecoderCache


def decode_greedily(decoder: TextDecoder, features: jax.Array, max_new_tokens: int) -> jax.Array:
    """Returns the most likely token at each position, ids [N, T], for features [N, S, D].

    Stops when every row has a separator. The separator pads the rest of a row.
    """
    config, rows = decoder.config, features.shape[0]
    blocks, cache = decoder.start(features, max_new_tokens)

    def step(state: DecodeState) -> DecodeState:
        logits, cache = decoder.decode(blocks, state.token, state.step, state.cache)
        # Finished rows still run, because all rows have one shape; their token is replaced.
        # sep = 9, done [F, T]: best [5, 7] -> token [5, 9]
        best = jnp.argmax(logits.astype(jnp.float32), axis=-1).astype(jnp.int32)
        token = jnp.where(state.done, config.sep_token_id, best)
        return DecodeState(
            step=state.step + 1,
            token=token,
            done=state.done | (token == config.sep_token_id),
            tokens=lax.dynamic_update_slice(state.tokens, token[:, None], (0, state.step)),
            cache=cache,
        )

    first = DecodeState(
        step=jnp.int32(0),
        token=jnp.full(rows, config.bos_token_id, jnp.int32),
        done=jnp.zeros(rows, bool),
        tokens=jnp.full((rows, max_new_tokens), config.sep_token_id, jnp.int32),
        cache=cache,
    )
    # A loop that can stop early: most captions are much shorter than `max_new_tokens`.
    return lax.while_loop(
        lambda state: (state.step < max_new_tokens) & ~state.done.all(), step, first
    ).tokens


# ---- images


@dataclasses.dataclass(frozen=True)
class ImageSettings:
    """How an image becomes pixel values, from the model's folder."""

    size: int  # side of the square, pixels
    mean: Triple
    std: Triple
    scale: float  # of a pixel's 0 to 255, before mean and std


def normalise_images(images: jax.Array, settings: ImageSettings) -> jax.Array:
    """Returns uint8 [..., 3] as the float32 pixel values that the vision tower reads."""
    pixels = images.astype(jnp.float32) * jnp.float32(settings.scale)
    mean, std = (jnp.asarray(three, jnp.float32) for three in (settings.mean, settings.std))
    return (pixels - mean) / std


@functools.lru_cache(maxsize=8)
def read_image_settings(folder: Path, image_size: int) -> ImageSettings:
    """Reads preprocessor_config.json, or else the newer processor_config.json.

    Raises: InputError naming the file that is missing, or listing every setting that is missing,
        not implemented, or different from the network's `image_size`.
    """
    file, newer = folder / "preprocessor_config.json", folder / "processor_config.json"
    problems = Problems()
    if file.is_file() or not newer.is_file():
        fields = Fields(str(file), read_json(file), problems)
    else:
        fields = Fields(str(newer), read_json(newer), problems).section("image_processor")
    for name in ("do_resize", "do_rescale", "do_normalize"):
        fields.expect(name, (True,), "the captioner was trained so")
    for name in ("do_center_crop", "do_pad"):
        fields.expect(name, (False, None), "not implemented")
    # BLIP was trained on images that were resized bicubically, whatever their aspect ratio.
    fields.expect("resample", (int(Image.Resampling.BICUBIC),), "the filter implemented")
    settings = ImageSettings(
        size=_read_side(fields, image_size),
        mean=_read_triple(fields, "image_mean"),
        std=_read_triple(fields, "image_std"),
        scale=fields.number("rescale_factor", 1 / 255),
    )
    problems.raise_any()
    return settings


def _read_side(fields: Fields, expected: int) -> int:
    """Reads 384 or {"height": 384, "width": 384}; any other size than `expected` is a problem."""
    size = fields.data.get("size")
    sides = list(size.values()) if isinstance(size, dict) else [size]
    if not sides or any(type(side) is not int or side != expected for side in sides):
        fields.problems.add(
            f"{fields.where}: size is {size!r}, expected {expected}, the image_size of config.json"
        )
    return expected


def _read_triple(fields: Fields, name: str) -> Triple:
    value = fields.data.get(name)
    numbers = value if isinstance(value, list) else []
    if len(numbers) != 3 or not all(type(x) in (int, float) and 0 < x < 1 for x in numbers):
        fields.problems.add(
            f"{fields.where}: {name} is {value!r}, expected three numbers between 0 and 1"
        )
        return (0.5, 0.5, 0.5)
    return (float(numbers[0]), float(numbers[1]), float(numbers[2]))


# ---- text


@functools.lru_cache(maxsize=8)
def load_tokenizer(folder: Path, config: BlipTextConfig) -> Any:
    """Loads BERT's tokenizer from the folder.

    Raises: InputError for a folder without a tokenizer, or with one that does not fit the model.
    """
    with hide_import_advice():
        from transformers import BertTokenizerFast  # pyright: ignore[reportAttributeAccessIssue]

    files = ("tokenizer.json", "vocab.txt")
    # Without either file transformers makes a tokenizer without words.
    if not any((folder / name).is_file() for name in files):
        raise InputError(
            f"{folder}: no tokenizer found, expected {' or '.join(files)} of the captioner"
        )
    try:
        with open_unmarked_folder(folder) as readable:
            tokenizer = BertTokenizerFast.from_pretrained(str(readable), local_files_only=True)
    except InputError:
        raise
    except Exception as error:  # the Rust parser raises a bare Exception
        raise InputError(f"{folder}: its tokenizer cannot be used ({error})") from error
    problems = []
    # A smaller tokenizer fits: BLIP's embedding has two rows more than the tokenizer has tokens.
    if len(tokenizer) > config.vocab_size:
        problems.append(
            f"{folder}: its tokenizer has {len(tokenizer)} tokens, expected at most the network's "
            f"{config.vocab_size}; use the tokenizer that belongs to the weights"
        )
    # The published tokenizer does not have the token that starts a caption, and the token that
    # ends a caption is special. If the start were a word, transformers would put it in front of
    # every caption; if the end were a word, it would stand at the end. Such files belong to two
    # different models.
    marks = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    words = set(tokenizer.get_vocab().values()) - marks
    for name, verb in (("bos_token_id", "starts"), ("sep_token_id", "ends")):
        token = getattr(config, name)
        if token in words or (name == "sep_token_id" and token not in marks):
            word = tokenizer.convert_ids_to_tokens(token) if token in words else None
            problems.append(
                f"{folder}: {name} is {token} in config.json, by the tokenizer "
                f"{f'the word {word!r}' if word else 'no token'}, expected the special token "
                f"that {verb} a caption; use the tokenizer that belongs to the weights"
            )
    if problems:
        raise InputError(problems)
    return tokenizer
