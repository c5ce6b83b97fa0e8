"""LPIPS between generated and real images."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from PIL import Image

from corl_jax.models import modules
from corl_jax.models.vgg import Lpips, VggConfig
from corl_jax.rewards import image
from corl_jax.rewards.samples import in_pieces
from corl_jax.types import Params

SIZE = 224  # pixels a side, as the released code compares
IMAGES_AT_ONCE = 32  # 25 MB of float32 features each


def lpips_distance(
    network: Any,
    generated: np.ndarray,
    real: Sequence[Image.Image | None],
    *,
    size: int = SIZE,
    fit: str = "squash",
) -> np.ndarray:
    """LPIPS of generated [N, S, S, 3] uint8 to real images, [N] float32; NaN without one.

    Both are resized to `size`, bilinear with antialiasing, the real one as `fit` says (see
    `image.fit`). `network` is a Network of a Lpips.
    Source: the released code (torchmetrics' LPIPS, net_type vgg, normalize).
    """
    # The completions of a prompt share one picture object, so it is resized once.
    fitted = {id(x): image.fit(x, size, fit) for x in _distinct(real)}
    blank = np.zeros((size, size, 3), np.float32)  # keeps the program's shape; dropped below

    def squashed(row: int) -> np.ndarray:
        return image.squash(Image.fromarray(generated[row]), size)

    def take(index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        drawn = np.stack(list(threads.map(squashed, index)))
        return drawn, np.stack([fitted.get(id(real[i]), blank) for i in index])

    program = functools.partial(_distances, network.config, network.params)
    with ThreadPoolExecutor() as threads:  # Pillow lets go of the interpreter while it resizes
        (distances,) = in_pieces(program, take, len(generated), IMAGES_AT_ONCE, network.params)
    return np.where([x is None for x in real], np.float32(np.nan), distances)


def _distinct(pictures: Sequence[Image.Image | None]) -> list[Image.Image]:
    return list({id(x): x for x in pictures if x is not None}.values())


@functools.partial(jax.jit, static_argnames=("config",))
def _distances(
    config: VggConfig, params: Params, generated: jax.Array, real: jax.Array
) -> jax.Array:
    # Rounded products of an accelerator shift the distance by as much as small edits do.
    with jax.default_matmul_precision("highest"):
        return modules.bind(Lpips, config, params)(generated, real)
