"""The reference model of the KL penalty: the policy at the start, or one that follows the policy.

A fixed reference is no state of a run: it is made anew from the model's files. One that moves is a
part of `TrainState`, so that checkpoints have it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from corl_jax.config.schema import Config
from corl_jax.devices.mesh import param_shardings
from corl_jax.devices.offload import Offloadable, host_shardings
from corl_jax.policies.family import Family
from corl_jax.train.step import TrainState
from corl_jax.types import DTYPES, Params

if TYPE_CHECKING:
    from corl_jax.train.resolve import RunOutline


def has_reference(outline: RunOutline) -> bool:
    """Returns whether the run has a KL penalty."""
    return outline.stage.compares and outline.config.algorithm.kl_coef > 0


def is_moving(config: Config) -> bool:
    """Returns whether a reference would follow the policy."""
    return config.algorithm.reference_every > 0


def is_averaged(config: Config) -> bool:
    """Returns whether the reference is a mean of policies, which is kept in float32."""
    # With a decay of 0.99 a step changes it by 1% of a difference that is small itself. In
    # bfloat16 that would be rounded away.
    return is_moving(config) and config.algorithm.reference_decay > 0


def has_own_copy(config: Config) -> bool:
    """Returns whether the reference has parameters of its own."""
    # Adapters start as no change of the frozen network, which is then a reference without a copy.
    return not config.lora.rank or is_moving(config)


def copies_start(outline: RunOutline) -> bool:
    """Returns whether each start makes a reference of the parameters that the run began with."""
    config = outline.config
    return has_reference(outline) and has_own_copy(config) and not is_moving(config)


def get_number_bytes(config: Config) -> int:
    """Returns the bytes of a number in which the reference is kept, but for `float32_parts`."""
    return 4 if is_averaged(config) else jnp.dtype(DTYPES[config.model.dtype]).itemsize


def cast_reference(config: Config, family: Family, trained: Params) -> Params:
    """Returns the trained parameters in the dtype in which the reference keeps them."""
    if not has_own_copy(config):
        return {}
    if is_averaged(config):
        return jax.tree.map(lambda x: x.astype(jnp.float32), trained)
    return family.cast(trained, DTYPES[config.model.dtype])


def copy_reference(config: Config, family: Family, trained: Params) -> Params:
    """Returns a copy of the trained parameters as the reference keeps them."""
    # The buffers of the state are donated to the next step, so nothing may share them.
    return jax.tree.map(jnp.copy, cast_reference(config, family, trained))


def make_fixed_reference(plan: RunOutline, trained: Params) -> Offloadable | None:
    """Returns the start values of the trained parameters; None without, or if they move."""
    config = plan.config
    if not has_reference(plan) or is_moving(config):
        return None
    copied = copy_reference(config, plan.family, trained)
    shardings = param_shardings(copied, plan.mesh, plan.family.rules)
    return Offloadable(copied, shardings, offload=config.algorithm.reference == "host")


@dataclasses.dataclass(frozen=True)
class MovingReference:
    """How the reference in `TrainState` follows the policy, and where it lies between its uses."""

    config: Config
    family: Family
    sharding: Any  # while it is used
    resting_sharding: Any

    def rest(self, reference: Any) -> Params:
        """Returns the reference where it lies between its uses."""
        return jax.device_put(reference, self.resting_sharding)

    @contextlib.contextmanager
    def use(self, reference: Any) -> Iterator[Params]:
        """Yields the reference, on the device."""
        on_device = jax.device_put(reference, self.sharding)
        try:
            yield on_device
        finally:
            if self.resting_sharding is not self.sharding:
                for leaf in jax.tree.leaves(on_device):
                    leaf.delete()

    def move(self, state: TrainState, step: int) -> TrainState:
        """Returns the state with the reference after step `step`, counted from 0."""
        algorithm = self.config.algorithm
        if (step + 1) % algorithm.reference_every:
            return state
        if not is_averaged(self.config):
            moved = copy_reference(self.config, self.family, state.params)
        else:
            with self.use(state.reference) as reference:
                moved = average_params(reference, state.params, algorithm.reference_decay)
        return dataclasses.replace(state, reference=self.rest(moved))


@functools.partial(jax.jit, static_argnames="decay")
def average_params(reference: Params, policy: Params, decay: float) -> Params:
    """Returns decay * reference + (1 - decay) * policy, in float32."""
    return jax.tree.map(
        lambda old, new: decay * old + (1 - decay) * new.astype(jnp.float32), reference, policy
    )


def make_moving_reference(plan: RunOutline, trained: Params) -> MovingReference | None:
    """Returns how the reference moves; None without one, or if it is fixed."""
    config = plan.config
    if not has_reference(plan) or not is_moving(config):
        return None
    sharding = param_shardings(trained, plan.mesh, plan.family.rules)
    resting = host_shardings(sharding) if config.algorithm.reference == "host" else sharding
    return MovingReference(config, plan.family, sharding, resting)


@contextlib.contextmanager
def use_whole_state(moving: MovingReference | None, state: TrainState) -> Iterator[TrainState]:
    """Yields the state with all of it on the device, as checkpoints save it."""
    if moving is None:
        yield state
        return
    with moving.use(state.reference) as reference:
        yield dataclasses.replace(state, reference=reference)


def rest_state(moving: MovingReference | None, state: TrainState) -> TrainState:
    """Returns a state that lies on the device with its reference where that lies between uses."""
    if moving is None:
        return state
    return dataclasses.replace(state, reference=moving.rest(state.reference))
