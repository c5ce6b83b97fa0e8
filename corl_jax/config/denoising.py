"""Defines the options of models whose images are made by denoising."""

from __future__ import annotations

from typing import Literal

from corl_jax.config.fields import ImageSteps, NonNegative, Positive, PositiveFloat, Section, option


class Denoising(Section):
    """How a model whose images are made by denoising (JanusFlow) draws and scores them."""

    steps: ImageSteps = option(10, "Steps in which training draws an image.")
    eval_steps: ImageSteps = option(30, "Steps in which an evaluation does, without noise.")
    schedule: Literal["uniform", "linspace", "euler_discrete", "dynamic"] = option(
        "uniform",
        "Times of the steps. uniform: equally spaced, JanusFlow; linspace: these, shifted towards "
        "the noise, DanceGRPO; euler_discrete: diffusers' scheduler, Flow-GRPO; dynamic: shifted "
        "by the size of the image, FLUX.",
    )
    shift: PositiveFloat | None = option(
        None, "Shift of the schedules linspace and euler_discrete. null: 3."
    )
    dynamics: Literal["flow", "dance", "cps"] = option(
        "flow",
        "How noise enters the steps of training. flow: Flow-GRPO; dance: DanceGRPO; cps: "
        "coefficients-preserving sampling.",
    )
    noise_level: PositiveFloat | None = option(
        None, "Amount of that noise. null: 0.7 for flow, 0.3 for dance, 0.8 for cps."
    )
    window: NonNegative = option(
        0,
        "Number of steps that have noise and are trained; the others have none. It decides how "
        "long an update takes. 0: all steps.",
    )
    window_starts: Positive = option(
        1, "The window begins at one of the first so many steps, drawn for each prompt."
    )
    same_noise: bool = option(
        False,
        "Whether all images of a prompt begin with the same noise, as in DanceGRPO and MixGRPO. "
        "Then they differ by the noise of their steps alone, which is what is trained.",
    )
    kl: Literal["gaussian", "gaussian_no_dt", "latent_mse", "velocity_mse"] = option(
        "gaussian",
        "Divergence of a step from the reference's. gaussian: the true one; gaussian_no_dt: "
        "without the length of the step, as Flow-GRPO's code; latent_mse, velocity_mse: squared "
        "differences of means or velocities.",
    )
    clip_range: PositiveFloat = option(
        1.0e-4,
        "Clip range of a step's ratio, in the place of algorithm.clip_low and clip_high. Log-probs "
        "of steps are means over the image, so ratios are close to 1.",
    )
    guard: Literal["none", "ratio", "ratio_per_dt"] = option(
        "none",
        "GRPO-Guard. ratio: the log-ratio of a step is centred and loses its 1 / std, so that "
        "early and late steps are clipped alike; ratio_per_dt: also the loss of a step is divided "
        "by its length, as in Flow-GRPO's code. For flow and dance.",
    )
    latent_dtype: Literal["float32", "bfloat16"] = option(
        "float32",
        "dtype in which the latents of training are stored and read by the next step. bfloat16: "
        "half the memory, but a step whose std is below 0.05 cannot be trained.",
    )
