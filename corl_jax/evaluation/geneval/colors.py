"""Classifies the colours of detected objects with CLIP, as GenEval does.

GenEval's network is OpenAI's ViT-L/14. The original runs it in float16; here it runs in the dtype
in which it was loaded.

Source: GenEval, evaluation/evaluate_images.py, `ImageCrops` and `color_classification`;
clip_benchmark 1.4.0, zeroshot_classification.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np
from PIL import Image

from corl_jax.data.geneval_demands import CLASSES, COLORS
from corl_jax.devices import processes
from corl_jax.devices.batches import pad_rows, run_in_pieces
from corl_jax.errors import InputError
from corl_jax.evaluation.geneval.detections import Detection
from corl_jax.models import modules
from corl_jax.models.clip import Clip, ClipConfig
from corl_jax.rewards.clip_scores import normalise_pixels, tokenize_prompts
from corl_jax.rewards.samples import Network
from corl_jax.types import Params

BACKGROUND = (0x99, 0x99, 0x99)  # of the pixels outside of the mask
CROPS_AT_ONCE = 64
LOGIT_SCALE = 100.0

ClassifyCrops = Callable[[Sequence[Image.Image], Sequence[str]], list[str]]


def make_color_classifier(
    clip: Network,
) -> Callable[[Image.Image, str, Sequence[Detection]], list[str]]:
    """Returns (image, class name, its detections) -> the colour of each."""
    classify_crops = make_crop_classifier(clip)

    def classify_colors(
        image: Image.Image, name: str, detections: Sequence[Detection]
    ) -> list[str]:
        crops = [crop_object(image, detection) for detection in detections]
        return classify_crops(crops, [name] * len(crops))

    return classify_colors


def make_crop_classifier(clip: Network) -> ClassifyCrops:
    """Returns (crops, the class name of each) -> their colours. Crops may be of several images.

    All processes must call it together, also one without crops.
    """

    @functools.cache
    def embed_class(name: str) -> np.ndarray:
        """Returns the vectors of a class in each colour, [colours, D]."""
        ids = tokenize_prompts(clip, make_prompts(name))
        program = functools.partial(_embed_texts, clip.config, clip.params)
        (vectors,) = run_in_pieces(program, lambda i: (ids[i],), len(ids), len(ids), clip.params)
        vectors = np.asarray(vectors)
        means = vectors.reshape(len(COLORS), -1, vectors.shape[-1]).mean(axis=1)
        return means / np.linalg.norm(means, axis=-1, keepdims=True)

    def classify_crops(crops: Sequence[Image.Image], names: Sequence[str]) -> list[str]:
        # A network may lie on the devices of several processes. Each runs the same programs then,
        # whatever its own images show.
        most_crops = processes.all_max(len(crops))
        if not most_crops:
            return []
        by_class = {name: embed_class(name) for name in list_classes(names)}
        vectors = _embed_crops(clip, crops, most_crops)  # [N, D]
        if not crops:
            return []
        classes = np.stack([by_class[name] for name in names])  # [N, colours, D]
        logits = LOGIT_SCALE * np.einsum("nd,ncd->nc", vectors, classes)
        return [COLORS[index] for index in logits.argmax(axis=1)]

    return classify_crops


def list_classes(names: Sequence[str]) -> list[str]:
    """Returns each class once, those of other processes included, in the same order for all."""
    if jax.process_count() == 1:
        return list(dict.fromkeys(names))
    numbers = processes.all_union({CLASSES.index(name) for name in names})
    return [CLASSES[number] for number in sorted(numbers)]


def make_prompts(name: str) -> list[str]:
    """Returns the texts of a class: three for each colour."""
    templates = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")
    return [template.format(color, name) for color in COLORS for template in templates]


def crop_object(image: Image.Image, detection: Detection) -> Image.Image:
    """Returns the object's box of the image; pixels outside of the mask are grey.

    A box that rounds to no pixels is widened to one, where the original fails.

    Raises: InputError for a mask of another size than the image's.
    """
    image = image.convert("RGB")
    if detection.mask is not None:
        if detection.mask.shape != image.size[::-1]:
            height, width = detection.mask.shape
            raise InputError(
                f"mask: has {width} x {height} pixels, its image {image.width} x {image.height}; "
                "expected the same"
            )
        blank = Image.new("RGB", image.size, BACKGROUND)
        image = Image.composite(image, blank, Image.fromarray(detection.mask))
    # Python's numbers: Pillow 13 refuses NumPy's. It rounds them itself.
    left, top, right, bottom = (round(float(edge)) for edge in detection.box)
    return image.crop((left, top, max(right, left + 1), max(bottom, top + 1)))


def resize_crop(crop: Image.Image, size: int) -> np.ndarray:
    """Returns the middle of a crop whose shorter side becomes `size`, uint8 [size, size, 3].

    Source: torchvision's Resize (bicubic) and CenterCrop.
    """
    shorter = min(crop.size)
    width, height = (size if side == shorter else int(size * side / shorter) for side in crop.size)
    resized = crop.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return np.asarray(resized.crop((left, top, left + size, top + size)))


def _embed_crops(clip: Network, crops: Sequence[Image.Image], most_crops: int) -> np.ndarray:
    """Computes unit vectors [N, D] of crops, in a program that has room for `most_crops`."""
    blank = Image.new("RGB", (1, 1))  # something to compute with, where there are no crops
    pixels = np.stack([resize_crop(crop, clip.config.image_size) for crop in crops or [blank]])
    # A power of two, so that few programs are compiled: 5 crops -> 8 rows, 100 -> 128.
    num_rows = 1 << (most_crops - 1).bit_length()
    rows = pad_rows(np.arange(len(pixels)), num_rows)

    def take(index: np.ndarray) -> tuple[np.ndarray]:
        return (pixels[rows[index]],)

    program = functools.partial(_embed_images, clip.config, clip.params)
    (vectors,) = run_in_pieces(program, take, num_rows, CROPS_AT_ONCE, clip.params)
    return np.asarray(vectors)[: len(crops)]


@functools.partial(jax.jit, static_argnames=("config",))
def _embed_images(config: ClipConfig, params: Params, pixels: jax.Array) -> jax.Array:
    return modules.bind(Clip, config, params).image_embeds(normalise_pixels(config, pixels))


@functools.partial(jax.jit, static_argnames=("config",))
def _embed_texts(config: ClipConfig, params: Params, ids: jax.Array) -> jax.Array:
    return modules.bind(Clip, config, params).text_embeds(ids)
