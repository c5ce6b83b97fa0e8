"""What the guards of a run are given: its alarms, its updates, its rewards."""

from __future__ import annotations

import math

import pytest

from corl_jax.config.guard_limits import Guards as Options
from corl_jax.errors import GuardError, RewardError
from corl_jax.metrics import Metric, to_metrics
from corl_jax.runs.guards import FAILED_WINDOW
from corl_jax.train import alarms
from corl_jax.train.run import Iteration

UPDATE = to_metrics({
    "loss": 1.0, "grad_norm": 2.0, "t2i/loss": math.nan, "update/skipped": 1.0, "update/applied": 3,
}) | {"t2i/sampling/x": Metric(math.nan, "first")}  # fmt: skip


def test_the_sampler_is_no_part_of_a_loss_that_is_not_finite():
    guards = alarms.make_guards(Options(max_skipped_updates=1))
    with pytest.raises(GuardError, match=r"loss 1 and gradient norm 2 .* not finite: t2i/loss\. "):
        alarms.check_iteration(guards, 1, Iteration({}, {}, {}, [UPDATE]), is_last=False)
    assert guards.skipped == 1


def test_every_reward_is_checked_by_its_name_and_task():
    guards = alarms.make_guards(Options())
    iteration = Iteration({}, {}, {}, [], failed={"judge of mm2t": 0.1, "judge of t2i": 0.9})
    for step in range(1, FAILED_WINDOW):
        alarms.check_iteration(guards, step, iteration, is_last=False)
    with pytest.raises(RewardError, match="reward judge of t2i failed on 90%"):
        alarms.check_iteration(guards, FAILED_WINDOW, iteration, is_last=False)


def test_alarms_have_the_limits_of_the_options():
    options = Options(kl=2.5, entropy=None)
    limits = {alarm.name: alarm.limit for alarm in alarms.list_alarms(options)}
    assert limits["kl"] == 2.5 and "entropy" not in limits
    assert limits.keys() | {"entropy"} == {alarm.name for alarm in alarms.ALARMS}
