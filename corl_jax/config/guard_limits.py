"""Defines the limits that end a run or raise an alarm."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from corl_jax.config.fields import Fraction, Positive, PositiveFloat, Section, option


class Guards(Section):
    """Limits that stop a run or raise an alarm. Reasons: docs/explained/reliability.md."""

    max_skipped_updates: Positive = option(
        3, "The run ends with exit code 3 after this many updates in a row that are not finite."
    )
    max_failed_reward_fraction: Fraction = option(
        0.5,
        "The run ends if a reward by `use` or by http fails on more than this fraction of the "
        "samples of 20 steps.",
    )
    step_timeout_s: PositiveFloat | None = option(
        1800.0,
        "The run ends if no iteration, evaluation batch or save finishes for this many seconds. "
        "null: never.",
    )
    kl: PositiveFloat | None = option(
        1.0, "Alarm if the KL divergence of a task is above this, in nats per token."
    )
    entropy: PositiveFloat | None = option(
        0.1,
        "Alarm if the mean entropy of 10 steps falls below this fraction of that of the first 10 "
        "steps.",
    )
    duplicates: Fraction | None = option(
        0.5,
        "Alarm if more than this fraction of images repeats another image of its group, mean of "
        "10 steps.",
    )
    zero_spread: Fraction | None = option(
        0.9,
        "Alarm if more than this fraction of groups has equal rewards, mean of 10 steps.",
    )
    not_applicable: Fraction | None = option(
        0.5,
        "Alarm if more than this fraction of completions has no reward, mean of 10 steps, or if a "
        "reward applies to no completion. A run without any reward ends.",
    )
    drift_mean: PositiveFloat | None = option(
        0.05,
        "Alarm if the log-probs of sampler and trainer differ by more than this, mean of all "
        "tokens, in nats.",
    )
    drift_max: PositiveFloat | None = option(
        5.0,
        "Alarm if the log-probs of sampler and trainer differ by more than this for one token, in "
        "nats.",
    )
    drift_steps: PositiveFloat | None = option(
        0.005,
        "Alarm if the probability ratio of sampler and trainer differs from 1 by more than this "
        "for one step of an image that is made by denoising.",
    )
    held_out: PositiveFloat | None = option(
        3.0,
        "Alarm if a held-out score falls by more than this many standard errors while the reward "
        "rises.",
    )
    fatal: list[
        Literal[
            "kl",
            "entropy",
            "duplicates",
            "zero_spread",
            "not_applicable",
            "drift_mean",
            "drift_max",
            "drift_steps",
            "held_out",
        ]
    ] = Field(default_factory=list, description="Alarms that end the run with exit code 3.")
