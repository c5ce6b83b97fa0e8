"""Detects GenEval's objects in images: Mask2Former in JAX, or transformers' in PyTorch.

Both give mmdetection's instances (see `models.instances`), as the official detector does.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from corl_jax.data.geneval_demands import CLASSES
from corl_jax.devices.batches import pad_rows, run_in_pieces
from corl_jax.errors import InputError, take_first_line
from corl_jax.evaluation.geneval.detections import Detection
from corl_jax.evaluation.geneval.rules import GENEVAL_RULES
from corl_jax.models.instances import (
    Instances,
    find_instances,
    fit_sides,
    prepare_pixels,
    select_instances,
    unpack_mask,
)
from corl_jax.rewards.samples import Network

IMAGES_AT_ONCE = 16
USUAL_PIXELS = 2**20
JAX_NAME = "GenEval (JAX detector)"
TORCH_NAME = "GenEval (transformers detector)"

Picture = Image.Image | np.ndarray
"""An image of any size: Pillow's, or uint8 [H, W, 3]."""


class Detector(Protocol):
    """Detects objects of GenEval's classes."""

    @property
    def name(self) -> str: ...

    def detect(self, images: Sequence[Picture]) -> list[dict[str, list[Detection]]]:
        """Returns the objects in each image, by class name and by falling score."""
        ...


@dataclasses.dataclass(frozen=True)
class JaxDetector:
    """Mask2Former in JAX. Images of one size go through one program, split over the mesh."""

    network: Network
    images_at_once: int = IMAGES_AT_ONCE
    min_score: float = GENEVAL_RULES.threshold  # objects must score more, as the rules demand
    name: str = JAX_NAME

    def detect(self, images: Sequence[Picture]) -> list[dict[str, list[Detection]]]:
        """Returns the objects in each image, by class name and by falling score."""
        network = self.network
        program = functools.partial(find_instances, network.config, network.params)
        detections: list[dict[str, list[Detection]]] = [{} for _ in images]
        for numbers, pixels in group_images(images, self.images_at_once):
            # A power of two, so that few programs are compiled: 5 images -> 8 rows.
            rows = pad_rows(np.arange(len(numbers)), 1 << (len(numbers) - 1).bit_length())

            def take(index: np.ndarray, rows=rows, pixels=pixels) -> tuple[np.ndarray]:
                return (pixels[rows[index]],)

            outputs = run_in_pieces(program, take, len(rows), self.images_at_once, network.params)
            instances = Instances(*map(np.asarray, outputs))
            for index, number in enumerate(numbers):
                image = jax.tree.map(lambda x, index=index: x[index], instances)
                detections[number] = name_instances(image, pixels.shape[2], self.min_score)
        return detections


def group_images(
    images: Sequence[Picture], images_at_once: int
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Yields the numbers of a few images of one size, and their pixels [N, H, W, 3] uint8.

    Of images above USUAL_PIXELS there are fewer at once: their masks take as much memory.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, image in enumerate(images):
        sides = image.shape[:2] if isinstance(image, np.ndarray) else image.size[::-1]
        groups.setdefault(tuple(sides), []).append(number)
    for sides, numbers in groups.items():
        at_once = images_at_once * USUAL_PIXELS // max(USUAL_PIXELS, math.prod(sides)) or 1
        for first in range(0, len(numbers), at_once):
            chosen = numbers[first : first + at_once]
            yield chosen, np.stack([read_pixels(images[number]) for number in chosen])


def read_pixels(image: Picture) -> np.ndarray:
    """Returns the pixels of an image, uint8 [H, W, 3]."""
    return image if isinstance(image, np.ndarray) else np.asarray(image.convert("RGB"))


def name_instances(image: Any, width: int, min_score: float) -> dict[str, list[Detection]]:
    """Returns the objects of one image by class name, by falling score.

    `image` are its `Instances`, without the first axis. Classes beyond GenEval's, of a
    network that also knows COCO's stuff, are left out.
    """
    detections: dict[str, list[Detection]] = {}
    order = np.argsort(-image.scores, kind="stable")
    for index in order[image.scores[order] > np.float32(min_score)]:
        if image.labels[index] >= len(CLASSES):
            continue
        query = image.queries[index]
        left, top, right, bottom = (float(edge) for edge in image.boxes[query])
        detection = Detection(
            box=(left, top, right, bottom),
            score=float(image.scores[index]),
            mask=unpack_mask(image.masks[query], width),
        )
        detections.setdefault(CLASSES[image.labels[index]], []).append(detection)
    return detections


@dataclasses.dataclass(frozen=True)
class TorchDetector:
    """transformers' Mask2Former in PyTorch, between the same steps as the one in JAX."""

    model: Any
    min_score: float = GENEVAL_RULES.threshold
    name: str = TORCH_NAME
    shorter_side: int = 800
    longer_side: int = 1333

    def detect(self, images: Sequence[Picture]) -> list[dict[str, list[Detection]]]:
        """Returns the objects in each image, by class name and by falling score."""
        from corl_jax.weights.torch_bin import to_numpy, to_torch

        detections = []
        for image in images:
            pixels = read_pixels(image)
            sides = (pixels.shape[0], pixels.shape[1])
            resized = fit_sides(sides, self.shorter_side, self.longer_side)
            inputs = np.asarray(_prepare(pixels[None], resized))
            tensor = to_torch(inputs.transpose(0, 3, 1, 2).copy()).to(self.model.device)
            out = self.model(tensor)
            classes, masks = (
                to_numpy(x.float().cpu())
                for x in (out.class_queries_logits, out.masks_queries_logits)
            )
            padded = (inputs.shape[1], inputs.shape[2])
            instances = _select(classes, masks, padded, resized, sides)
            first = jax.tree.map(lambda x: np.asarray(x)[0], instances)
            detections.append(name_instances(first, sides[1], self.min_score))
        return detections


_prepare = jax.jit(prepare_pixels, static_argnums=1)
_select = jax.jit(select_instances, static_argnums=(2, 3, 4))


def load_torch_detector(folder: Path) -> TorchDetector:
    """Loads a folder in transformers' layout, onto a GPU if PyTorch has one.

    Raises: InputError if PyTorch is missing, or for a folder that transformers cannot load.
    """
    from corl_jax.console import hide_import_advice
    from corl_jax.weights.torch_bin import import_torch

    torch = import_torch(folder)
    with hide_import_advice():
        from transformers import Mask2FormerForUniversalSegmentation
    try:
        model = Mask2FormerForUniversalSegmentation.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers and safetensors raise many kinds
        raise InputError(
            f"{folder}: transformers cannot load a Mask2Former ({take_first_line(error)}); "
            "expected config.json with model_type mask2former, and its weights"
        ) from error
    device: Any = "cuda" if torch.cuda.is_available() else "cpu"
    return TorchDetector(model.eval().requires_grad_(False).to(device))


def check_class_count(network_classes: int, where: str) -> None:
    """Refuses a network that does not know GenEval's classes. Raises: InputError."""
    if network_classes < len(CLASSES):
        raise InputError(
            f"{where}: knows {network_classes} classes; expected COCO's {len(CLASSES)}, in COCO's "
            "order"
        )


def make_detector(network: Network, images_at_once: int = IMAGES_AT_ONCE) -> JaxDetector:
    """Returns the detector in JAX. Raises: InputError for a network of other classes."""
    check_class_count(network.config.num_classes, str(network.folder))
    dtype = jnp.dtype(network.dtype).name
    return JaxDetector(network, images_at_once, name=f"GenEval (JAX detector, {dtype})")
