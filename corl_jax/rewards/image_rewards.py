"""Scores generated images without a network: Samples -> [N] float32."""

from __future__ import annotations

import functools
import json
from typing import Literal

import jax
import numpy as np

from corl_jax.config.fields import Fraction
from corl_jax.data.column_values import find_spec_problem
from corl_jax.data.drawn_world import checker
from corl_jax.data.drawn_world.scene import Spec
from corl_jax.devices.batches import PendingRows, run_in_pieces
from corl_jax.errors import Problems
from corl_jax.rewards import image
from corl_jax.rewards.samples import Context, Samples, score_rows

IMAGES_AT_ONCE = 16  # compared in one program; bounds the memory of float32 temporaries

ImageTerm = Literal["rmse", "mse", "ssim", "psnr"]
Fit = Literal["squash", "centre_crop", "pad"]


def score_pixel_mse(
    samples: Samples, context: Context, *, image_fit: Fit = "squash"
) -> PendingRows:
    """Returns 1 - sliding-window RMSE to the real image, in [-1, 1]; NaN without a real image."""
    return compare_to_real_images(samples, context, "pixel_mse", image_fit)


def compare_to_real_images(samples: Samples, context: Context, score: str, fit: str) -> PendingRows:
    """Scores generated images against the real images of their rows: [N]; NaN without a real image.

    `score` is `pixel_mse` or a key of `image.IMAGE_TERMS`. `fit` says how real images are
    resized (see `image.fit_image`).

    Raises:
        InputError: the images are too small for the score.
    """
    generated = samples.require_images()
    real = image.fit_images(samples.column("real_image"), generated.shape[1], fit)
    # For rows without a real image, so that the program keeps one shape. NaN replaces the score
    # below.
    blank = np.zeros(generated.shape[1:], np.uint8)

    def take(index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return generated[index], np.stack([blank if real[i] is None else real[i] for i in index])

    program = functools.partial(_score_program, score)
    (scores,) = run_in_pieces(program, take, len(samples), IMAGES_AT_ONCE, context.params)
    is_missing = [pixels is None for pixels in real]
    return scores.then(lambda x: np.where(is_missing, np.float32(np.nan), x))


@functools.partial(jax.jit, static_argnames=("score",))
def _score_program(score: str, generated: jax.Array, real: jax.Array) -> jax.Array:
    # float32 only on the device: uint8 is a quarter of the bytes to move there.
    generated, real = image.scale_levels(generated), image.scale_levels(real)
    if score == "pixel_mse":
        return image.pixel_mse_reward(generated, real)
    return image.image_term(score, generated, real)


def score_shapes(
    samples: Samples, context: Context, *, strict: bool = True, partial_credit: Fraction = 0.0
) -> np.ndarray:
    """Returns 1 for an image that shows what `spec` demands, by the drawn world's checker.

    `strict`: the image must show nothing else. Any other image gets `partial_credit` times the
    fraction of correct objects. The fraction is their number over that of the detected or of the
    demanded objects, whichever is larger. NaN without a spec.

    Raises:
        InputError: a spec that cannot be read.
    """
    specs, problems = samples.column("spec"), Problems()
    # All specs before the first score, so that one message lists every bad row.
    for row, spec in enumerate(specs):
        problem = None if spec is None else find_spec_problem(spec)
        if problem:
            problems.add(f"row {row}: spec: {problem}")
    problems.raise_any()

    demands = [json.loads(spec) if isinstance(spec, str) else spec for spec in specs]

    def score_detections(detections: list[checker.Detection], demand: Spec | None) -> float:
        if demand is None:
            return float("nan")
        if checker.satisfies(detections, demand, strict=strict):
            return 1.0
        return partial_credit * _measure_fraction_correct(detections, demand)

    return score_rows(score_detections, checker.detect_all(samples.require_images()), demands)


def _measure_fraction_correct(detections: list[checker.Detection], demand: Spec) -> float:
    correct = 0
    for entry in demand["include"]:
        color = entry.get("color")
        # A spec without a color accepts each color.
        same = [d for d in detections if d.shape == entry["class"] and color in (None, d.color)]
        # 3 circles where 2 are demanded: 2 are correct, and the third one adds to the divisor.
        correct += min(len(same), entry["count"])
    return correct / max(len(detections), sum(entry["count"] for entry in demand["include"]))
