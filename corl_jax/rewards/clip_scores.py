"""Scores images with CLIP networks: how well they match the prompt, and how good they look.

The scores are the published ones. `divisor` divides scores that are far from 1. Prompts are cut
to the text tower's 77 tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from corl_jax.config.fields import PositiveFloat
from corl_jax.console import hide_import_advice
from corl_jax.devices.batches import PendingRows, run_in_pieces
from corl_jax.errors import InputError
from corl_jax.models import modules
from corl_jax.models.aesthetic import AestheticConfig, AestheticHead
from corl_jax.models.clip import Clip, ClipConfig
from corl_jax.models.pillow_resize import resize_levels
from corl_jax.rewards.image import resize_on_host
from corl_jax.rewards.samples import Context, Samples
from corl_jax.types import Params
from corl_jax.weights.folders import open_unmarked_folder

IMAGES_AT_ONCE = 64

# ---- rewards


def score_clip(samples: Samples, context: Context) -> PendingRows:
    """Returns twice the cosine of image and prompt, in [-2, 2]; NaN without a prompt.

    Source: the released code, with LAION's ViT-H/14.
    """
    with context.network("clip") as network:
        cosine = clip_similarity(network, samples.require_images(), samples.column("prompt"))
    return cosine.then(lambda x: 2.0 * x)


def score_pickscore(
    samples: Samples, context: Context, *, divisor: PositiveFloat = 1.0
) -> PendingRows:
    """Returns PickScore, the scaled cosine, around 20, over `divisor`; NaN without a prompt.

    Flow-GRPO divides by 26, so that scores stay below 1.
    Source: Kirstain et al. 2023 (arXiv 2305.01569).
    """
    with context.network("pickscore") as network:
        # CLIP stores the logarithm of its temperature. It is read before this network's own work.
        scale = np.exp(np.asarray(network.params["logit_scale"], np.float32))
        cosine = clip_similarity(network, samples.require_images(), samples.column("prompt"))
    return cosine.then(lambda x: x * (scale / np.float32(divisor)))


def score_hpsv2(samples: Samples, context: Context) -> PendingRows:
    """Returns the human preference score v2, a cosine around 0.27; NaN without a prompt.

    Source: Wu et al. 2023 (arXiv 2306.09341).
    """
    with context.network("hpsv2") as network:
        return clip_similarity(network, samples.require_images(), samples.column("prompt"))


def score_aesthetic(
    samples: Samples, context: Context, *, divisor: PositiveFloat = 1.0
) -> PendingRows:
    """Computes the predicted rating of an image, about 1 to 10, over `divisor`; ignores the prompt.

    Source: christophschuhmann/improved-aesthetic-predictor, on OpenAI's ViT-L/14.
    """
    with context.network("clip_l14") as network, context.network("aesthetic") as head:
        rating = aesthetic_rating(network, head, samples.require_images())
    return rating.then(lambda x: x / np.float32(divisor))


# ---- scores


def clip_similarity(network: Any, images: np.ndarray, prompts: Sequence[str | None]) -> PendingRows:
    """Computes cosines of images [N, S, S, 3] uint8 and prompts, [N] float32; NaN for an empty one.

    `network` is a Network of a Clip whose folder holds its tokenizer.

    Raises:
        InputError: the folder has no tokenizer, or the tokenizer of another network.
    """
    images = resize_on_host(images, network.config.image_size, "bicubic")
    # An empty prompt runs too, so that the number of rows stays; its cosine is replaced by NaN.
    ids = tokenize_prompts(network, [prompt or "" for prompt in prompts])

    def take(index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return images[index], ids[index]

    program = functools.partial(_compute_cosines, network.config, network.params)
    (cosines,) = run_in_pieces(program, take, len(images), IMAGES_AT_ONCE, network.params)
    has_prompt = [bool((prompt or "").strip()) for prompt in prompts]
    return cosines.then(lambda x: np.where(has_prompt, x, np.float32(np.nan)))


def aesthetic_rating(network: Any, head: Any, images: np.ndarray) -> PendingRows:
    """Computes predicted ratings [N] float32 of images [N, S, S, 3] uint8.

    `network` is a Network of a Clip, `head` a Network of an AestheticHead.

    Raises:
        InputError: the head needs vectors of another size.
    """
    expected_width, width = head.config.sizes[0], network.config.projection_dim
    if expected_width != width:
        raise InputError(
            f"aesthetic: the head in {head.folder} reads vectors of {expected_width}, but the CLIP "
            f"in {network.folder} gives {width}; use the one that it was trained on, such as "
            "ViT-L/14"
        )
    images = resize_on_host(images, network.config.image_size, "bicubic")

    def program(images: jax.Array) -> jax.Array:
        return _compute_ratings(network.config, network.params, head.config, head.params, images)

    def take(index: np.ndarray) -> tuple[np.ndarray]:
        return (images[index],)

    (ratings,) = run_in_pieces(program, take, len(images), IMAGES_AT_ONCE, network.params)
    return ratings


@functools.partial(jax.jit, static_argnames=("config",))
def _compute_cosines(
    config: ClipConfig, params: Params, images: jax.Array, ids: jax.Array
) -> jax.Array:
    model = modules.bind(Clip, config, params)
    image_embeds = model.image_embeds(_prepare_images(config, images))
    # Both are unit vectors [B, D], so the sum of products is the cosine [B].
    return (image_embeds * model.text_embeds(ids)).sum(axis=-1)


@functools.partial(jax.jit, static_argnames=("config", "head_config"))
def _compute_ratings(
    config: ClipConfig,
    params: Params,
    head_config: AestheticConfig,
    head_params: Params,
    images: jax.Array,
) -> jax.Array:
    image_embeds = modules.bind(Clip, config, params).image_embeds(_prepare_images(config, images))
    head = modules.bind(AestheticHead, head_config, head_params)
    # The head's output is the score itself, so it must not change with the device's rounding.
    with jax.default_matmul_precision("highest"):
        return head(image_embeds).astype(jnp.float32)


# ---- checks before a run


def check_assets(checkpoint: Any) -> None:
    """Checks the folder's tokenizer.

    Raises: InputError for a tokenizer that cannot be used.
    """
    tokenize_prompts(checkpoint, ["a"])


def find_aesthetic_problems(options: Mapping[str, Any], sizes: Mapping[str, Any]) -> list[str]:
    """Returns a problem if the aesthetic head does not fit its CLIP (see `RewardRow`)."""
    if not {"clip_l14", "aesthetic"} <= sizes.keys():
        return []
    reads, gives = sizes["aesthetic"].sizes[0], sizes["clip_l14"].projection_dim
    if reads == gives:
        return []
    return [
        f"networks.aesthetic reads vectors of {reads}, but networks.clip_l14 gives {gives}; use "
        "the CLIP that the head was trained on"
    ]


# ---- inputs


def _prepare_images(config: ClipConfig, images: jax.Array) -> jax.Array:
    """Returns squares [N, S, S, 3] uint8 as the vision tower reads them."""
    # CLIP also crops the centre. A square image has nothing to crop.
    return normalise_pixels(config, resize_levels(images, config.image_size))


def normalise_pixels(config: ClipConfig, pixels: jax.Array) -> jax.Array:
    """Returns uint8 pixels as the float32 values that the vision tower reads."""
    x = pixels.astype(jnp.float32) / 255.0
    return (x - jnp.array(config.image_mean)) / jnp.array(config.image_std)


def tokenize_prompts(network: Any, prompts: Sequence[str]) -> np.ndarray:
    """Returns ids [N, context_length] int32: start, first tokens of the prompt, end, zeros.

    Raises:
        InputError: the folder has no tokenizer, or the tokenizer of another network.
    """
    config: ClipConfig = network.config
    try:
        rows = _load_tokenizer(network.folder)(
            list(prompts), truncation=True, max_length=config.context_length
        )["input_ids"]
    except InputError:
        raise
    except Exception as error:  # a vocabulary without the special tokens raises a bare Exception
        raise InputError(
            f"{network.folder}: its tokenizer cannot be used ({error}); put the tokenizer files "
            "of this CLIP there"
        ) from error
    # Zeros after the end token, as CLIP was trained: [start, a, cat, end] -> [.., end, 0, 0, 0].
    ids = np.zeros((len(rows), config.context_length), np.int32)
    for row, tokens in zip(ids, rows, strict=True):
        # The text tower takes its features at the end token; another last id means that the
        # tokenizer belongs to another network.
        if tokens[-1] != config.eos_token_id or max(tokens) >= config.vocab_size:
            raise InputError(
                f"{network.folder}: its tokenizer ends a prompt with id {tokens[-1]} (largest "
                f"{max(tokens)}), but the network expects {config.eos_token_id} of "
                f"{config.vocab_size}; put the tokenizer files of this CLIP there"
            )
        row[: len(tokens)] = tokens
    return ids


@functools.lru_cache(maxsize=8)
def _load_tokenizer(folder: Path) -> Any:
    with hide_import_advice():
        from transformers import CLIPTokenizerFast  # pyright: ignore[reportAttributeAccessIssue]

    names = [["tokenizer.json"], ["vocab.json", "merges.txt"]]
    if not any(all((folder / name).is_file() for name in group) for group in names):
        raise InputError(
            f"{folder}: no tokenizer found, expected tokenizer.json, or vocab.json and merges.txt; "
            "copy them from openai/clip-vit-large-patch14, whose tokenizer all CLIPs share"
        )
    try:
        with open_unmarked_folder(folder) as readable:
            return CLIPTokenizerFast.from_pretrained(str(readable), local_files_only=True)
    except InputError:
        raise
    except Exception as error:  # transformers and tokenizers raise many kinds
        raise InputError(
            f"{folder}: its tokenizer cannot be read ({error}); copy it again"
        ) from error
