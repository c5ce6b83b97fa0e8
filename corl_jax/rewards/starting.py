"""Starts the rewards of a batch, so that devices and host work at the same time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from corl_jax.devices.batches import PendingRows
from corl_jax.rewards.samples import Context, Samples

if TYPE_CHECKING:
    from corl_jax.rewards.registry import BoundReward


def start_rewards(
    resolved: Sequence[BoundReward], samples: Samples, context: Context
) -> dict[str, tuple[np.ndarray | PendingRows, float]]:
    """Returns name -> (rewards [N], which devices may still compute; seconds of the start).

    The order of the starts depends on the config alone, so all processes of a run have the same.
    """
    started = {}
    # Rewards that ask networks come first: the devices work on them while the host, a user's code
    # or a server computes the others.
    for reward in sorted(resolved, key=lambda reward: not (*reward.networks, *reward.scorers)):
        began = time.perf_counter()
        values = reward.function(samples, context)
        networks = (context.networks.get(name) for name in (*reward.networks, *reward.scorers))
        if any(network is not None and network.is_offloaded for network in networks):
            # These networks leave the devices before those of the next reward come.
            values = np.asarray(values)
        started[reward.name] = values, time.perf_counter() - began
    return started
