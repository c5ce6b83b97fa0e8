"""Defines the options of models that draw the codes of an image in any order."""

from __future__ import annotations

from typing import Literal

from corl_jax.config.fields import ImageSteps, NonNegative, Section, option


class Unmasking(Section):
    """How a model that draws the codes of an image in any order (Show-o) draws and scores them."""

    steps: ImageSteps | None = option(
        None,
        "Steps in which rollouts, the suite rewards and log.images_every draw an image. null: 16 "
        "for images of up to 256 codes, else 50, as all other suites draw.",
    )
    logprobs: Literal["one_shot", "complement", "trajectory"] = option(
        "one_shot",
        "Codes of an image that are hidden and scored. one_shot: some at random; complement: these "
        "and, in a second pass, all others; trajectory: those that a step of the sampler "
        "committed, in a pass for each step.",
    )
    scored_steps: NonNegative = option(
        0, "Steps of a trajectory that are scored, chosen at random for each image. 0: all."
    )
