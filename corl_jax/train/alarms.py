"""Says which metrics the guards of a run check, and with which limits."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

from corl_jax.config import schema
from corl_jax.metrics import Metric
from corl_jax.runs.guards import WINDOW, Alarm, Guards, Limits, Update
from corl_jax.tasks import TASKS, list_segments
from corl_jax.train.agreement import RATIO_FIRST
from corl_jax.train.run import Iteration

REWARD = "reward"
"""The metric that should rise during training."""
ZERO_SPREAD = "frac_reward_zero_std"
"""Fraction of the groups with equal rewards."""
NOT_APPLICABLE = "not_applicable"
"""Fraction of the completions that no reward applies to."""


def name_for_tasks(name: str) -> tuple[str, ...]:
    """Returns the name of a metric for each task, such as `t2i/reward` for `reward`."""
    return tuple(f"{task}/{name}" for task in TASKS)


def name_for_segments(name: str) -> tuple[str, ...]:
    """Returns the name of a metric for each segment of each task, such as `t2i/kl` for `kl`."""
    return tuple(f"{segment}/{name}" for segment in list_segments())


DIFFERENCE = "sampling/sampling_logp_difference"
ALARMS = (
    Alarm(
        "kl", name_for_segments("kl"),
        "the policy leaves its reference; try a lower learning rate or a larger kl_coef",
    ),
    Alarm(
        "entropy", name_for_segments("entropy"), "samples become alike and groups teach nothing",
        above=False, span=WINDOW, relative=True,
    ),
    Alarm(
        "duplicates", name_for_segments("duplicate_fraction"),
        "images of a group have the same tokens", span=WINDOW,
    ),
    Alarm(
        "zero_spread", (ZERO_SPREAD,),
        "groups get equal rewards, so there is no signal", span=WINDOW, nan_is_absent=True,
    ),
    Alarm(
        "not_applicable", (NOT_APPLICABLE, *name_for_tasks(NOT_APPLICABLE)),
        "these completions have no reward (None, NaN or infinite) and teach nothing; look at the "
        "columns that the rewards need",
        span=WINDOW,
        # A reward that never applies, beside others that do.
        always_one=re.compile(rf"({'|'.join(TASKS)})/rewards/[^/]+/{NOT_APPLICABLE}"),
    ),
    Alarm(
        "drift_mean", name_for_segments(f"{DIFFERENCE}/mean"),
        "the sampler and the trainer disagree; check dtype, temperature, top_k, top_p, cfg_scale",
    ),
    Alarm(
        "drift_max", name_for_segments(f"{DIFFERENCE}/max"),
        "a token is far less likely to either the sampler or the trainer",
    ),
    Alarm(
        "drift_steps", name_for_segments(RATIO_FIRST),
        "the replay of an image's steps is not what the sampler did, so ratios and clipping mean "
        "little; try model.attention xla, then model.dtype float32; what is left is a fault of the "
        "family, because times, guidance and noise are the sampler's own",
    ),
)  # fmt: skip
"""Alarms over logged metrics. The limit of each is the option of `guards` with its name."""


def list_alarms(options: schema.Guards, alternates: bool = False) -> list[Alarm]:
    """Returns the alarms that have a limit in the options.

    `alternates`: a step trains one of several tasks.
    """
    limits = {alarm.name: getattr(options, alarm.name) for alarm in ALARMS}
    return [
        dataclasses.replace(
            alarm,
            limit=limits[alarm.name],
            # The joint metric is then that of another task from step to step.
            keys=name_for_tasks(ZERO_SPREAD)
            if alternates and alarm.keys == (ZERO_SPREAD,)
            else alarm.keys,
        )
        for alarm in ALARMS
        if limits[alarm.name] is not None
    ]


def make_guards(options: schema.Guards, alternating: Sequence[str] = ()) -> Guards:
    """Returns the guards of a run; `alternating` has the tasks that its steps train in turn."""
    limits = Limits(
        max_skipped_updates=options.max_skipped_updates,
        max_failed_fraction=options.max_failed_reward_fraction,
        end_unrewarded=options.not_applicable is not None,
        held_out=options.held_out,
        fatal=tuple(options.fatal),
    )
    progress = [f"{task}/{REWARD}" for task in alternating] or [REWARD]
    return Guards(limits, list_alarms(options, bool(alternating)), progress)


def describe_updates(updates: Sequence[Mapping[str, Metric]]) -> list[Update]:
    """Returns the updates of an iteration as guards read them."""
    return [
        Update(
            # Waits for the device; the other scalars stay there, because only an error reads them.
            skipped=bool(metrics["update/skipped"].value),
            loss=metrics["loss"],
            grad_norm=metrics["grad_norm"],
            # Left out: metrics of the first update alone. They compare it with the sampler, and
            # no part of the loss depends on them.
            parts={n: m.value for n, m in metrics.items() if "/" in n and m.over == "last"},
        )
        for metrics in updates
    ]


def check_iteration(guards: Guards, step: int, iteration: Iteration, is_last: bool) -> None:
    """Checks an iteration, after which `step` steps are done.

    Raises:
        GuardError, RewardError: the run must not continue, nor be saved as it is.
    """
    unrewarded = iteration.metrics.get(NOT_APPLICABLE)
    guards.check_step(
        step,
        describe_updates(iteration.updates),
        {reward: float(fraction) for reward, fraction in iteration.failed.items()},
        None if unrewarded is None else float(unrewarded),
        is_last,
    )
