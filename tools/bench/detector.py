"""Measures GenEval's detector: bytes of images in, boxes and packed masks out, on the device."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import numpy as np

from corl_jax.models import modules
from corl_jax.models.instances import find_instances
from corl_jax.models.mask2former import Mask2Former
from corl_jax.types import DTYPES
from tools.bench.setting import Setting
from tools.bench.timing import Record, measure
from tools.bench.weights import draw_params


def measure_detector(setting: Setting) -> Iterator[Record]:
    """Measures images of the model's size for each dtype and number of images at once."""
    config = setting.size.networks["mask2former"]
    side = setting.size.limits.input_image_side
    random = draw_params(modules.make_abstract(Mask2Former, config), 1)
    rng = np.random.default_rng(0)
    for name, dtype in sorted(DTYPES.items()):
        params = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), random)
        for batch in setting.size.detected:
            images = rng.integers(0, 256, (batch, side, side, 3), np.uint8)
            timing = measure(
                functools.partial(find_instances, config, params, images), setting.repeats
            )
            figures = {"images": batch, "images_per_s": batch / timing.median}
            yield Record("detector", f"{batch} images, {name}", timing, figures)
