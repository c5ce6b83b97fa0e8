"""Rewards of a batch are started together; each score is the one that the reward gives alone."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest

from corl_jax.devices.batches import PendingRows
from corl_jax.errors import RewardError
from corl_jax.rewards import registry
from corl_jax.rewards.registry import BoundReward, Context, RewardRow, Samples

SAMPLES = Samples({}, images=np.zeros((2, 4, 4, 3), np.uint8))


def make_rewards(events):
    """On the host, by a network, and by the policy; each notes what it does."""

    def of(name, value, networks=(), scorers=()):
        def wait():
            events.append(f"wait {name}")
            return np.full(2, value, np.float32)

        def function(samples, context):
            events.append(f"start {name}")
            return PendingRows(wait) if networks or scorers else np.full(2, value, np.float32)

        row = RewardRow(function, "images")
        return BoundReward(name, 1.0, function, row, networks=networks, scorers=scorers)

    return [of("host", 1), of("network", 2, ("clip",)), of("policy", 3, (), ("policy",))]


def make_context(offload):
    network = SimpleNamespace(is_offloaded=offload, use=contextlib.nullcontext)
    return Context(None, None, None, None, None, 0, 0, {"clip": network})


def test_networks_start_first_and_results_keep_the_order_of_the_config():
    events: list[str] = []
    found, costs = registry.score_and_measure(make_rewards(events), SAMPLES, make_context(False))
    starts = ["start network", "start policy", "start host"]
    assert events == [*starts, "wait network", "wait policy"]
    assert {name: values.tolist() for name, values in found.items()} == {
        "host": [1, 1], "network": [2, 2], "policy": [3, 3],
    }  # fmt: skip
    assert list(found) == list(costs) == ["host", "network", "policy"]


def test_an_offloaded_network_leaves_before_the_next_one_comes():
    events: list[str] = []
    registry.score_and_measure(make_rewards(events), SAMPLES, make_context(True))
    assert events == [
        "start network", "wait network", "start policy", "start host", "wait policy",
    ]  # fmt: skip


@pytest.mark.parametrize("waits", [False, True])
def test_an_error_of_a_reward_ends_the_scoring_with_its_message(waits):
    def fail(*_):
        raise RewardError("reward network: no")

    events: list[str] = []
    host, network, policy = make_rewards(events)
    function = (lambda samples, context: PendingRows(fail)) if waits else fail
    network = BoundReward("network", 1.0, function, network.row, networks=("clip",))
    with pytest.raises(RewardError, match="reward network: no"):
        registry.score_and_measure([host, network, policy], SAMPLES, make_context(False))


def test_the_seconds_of_a_reward_are_those_of_its_start_and_of_the_wait(monkeypatch):
    clock = iter(range(100))
    for module in ("starting", "registry"):
        monkeypatch.setattr(f"corl_jax.rewards.{module}.time.perf_counter", lambda: next(clock))
    _, costs = registry.score_and_measure(make_rewards([]), SAMPLES, make_context(False))
    assert {name: cost["seconds"] for name, cost in costs.items()} == {
        "host": 2, "network": 2, "policy": 2,
    }  # fmt: skip
