"""Prepares what a run starts from: its parameters, references and `TrainState`."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from corl_jax.devices.mesh import Rules, attach_shardings, param_shardings
from corl_jax.devices.offload import Offloadable
from corl_jax.train.average import start_average
from corl_jax.train.loading import describe_trained, load_frozen, load_parts
from corl_jax.train.optimizer import make_optimizer
from corl_jax.train.reference import (
    MovingReference,
    copies_start,
    copy_reference,
    make_fixed_reference,
    make_moving_reference,
)
from corl_jax.train.resolve import ResolvedRun, RunOutline
from corl_jax.train.step import TrainState
from corl_jax.types import Params


@dataclasses.dataclass(frozen=True)
class Start:
    """What a run starts from."""

    frozen: Params
    reference: Offloadable | None  # trained parameters at the start of the run
    moving: MovingReference | None
    optimizer: optax.GradientTransformation
    shardings: TrainState
    state: TrainState  # of a fresh start; shapes with shardings where a checkpoint has it


def prepare_start(plan: ResolvedRun, *, from_checkpoint: bool) -> Start:
    """Loads the weights onto the mesh and makes the state of a fresh start.

    With `from_checkpoint` the state is described. Then trained parameters are loaded only if a
    reference is made of them.
    """
    loads_trained = not from_checkpoint or copies_start(plan)
    trained, frozen = (
        load_parts(plan) if loads_trained else (describe_trained(plan), load_frozen(plan))
    )
    moving, optimizer = make_moving_reference(plan, trained), make_plan_optimizer(plan)
    shardings = state_shardings(optimizer, trained, plan.mesh, plan.family.rules)
    reference = make_fixed_reference(plan, trained)
    make = describe_state if from_checkpoint else make_state
    state = make(plan, optimizer, trained, shardings, moving)
    if from_checkpoint and loads_trained:
        # The devices have room for one state: the fresh one goes before the saved one comes.
        for leaf in jax.tree.leaves(trained):
            leaf.delete()
    return Start(frozen, reference, moving, optimizer, shardings, state)


def make_plan_optimizer(plan: RunOutline) -> optax.GradientTransformation:
    """Returns the optimizer of the config with the family's rules for its parameters."""
    return make_optimizer(
        plan.config.optimizer, plan.optimizer_steps, undecayed=plan.family.undecayed,
        groups=plan.family.groups,
    )  # fmt: skip


def state_shardings(
    optimizer: optax.GradientTransformation, trained: Params, mesh: Mesh, rules: Rules
) -> TrainState:
    """Returns a TrainState of shardings: each optimizer moment has the layout of its parameter."""
    replicated = NamedSharding(mesh, PartitionSpec())
    params = param_shardings(trained, mesh, rules)
    shapes = jax.eval_shape(optimizer.init, trained)
    moments = optax.tree_utils.tree_map_params(
        optimizer,
        # Adafactor's factors are smaller than the parameters that they belong to.
        lambda leaf, sharding, param: sharding if leaf.shape == param.shape else replicated,
        shapes,
        params,
        trained,
        transform_non_params=lambda _: replicated,
    )
    return TrainState(replicated, params, moments)


def make_state(
    plan: RunOutline, optimizer: optax.GradientTransformation, trained: Params,
    shardings: TrainState, moving: MovingReference | None,
) -> TrainState:  # fmt: skip
    """Returns the state of a fresh start, with the reference if it moves."""
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(trained)
    # Before the state, which takes over the arrays.
    reference = moving and moving.rest(copy_reference(plan.config, plan.family, trained))
    # The layout that the step returns: a different one would compile a second program.
    state = jax.device_put(TrainState(jnp.int32(0), trained, opt_state), shardings)
    return dataclasses.replace(
        state, reference=reference, average=start_average(plan.config, state.params)
    )


def describe_state(
    plan: RunOutline, optimizer: optax.GradientTransformation, trained: Params,
    shardings: TrainState, moving: MovingReference | None,
) -> TrainState:  # fmt: skip
    """Returns shapes and shardings of `make_state`, with all of it on the device.

    `trained` are arrays or shapes.
    """
    step, opt_state = jax.ShapeDtypeStruct((), jnp.int32), jax.eval_shape(optimizer.init, trained)
    state = attach_shardings(TrainState(step, trained, opt_state), shardings)
    reference = average = None
    if moving is not None:
        copy = functools.partial(copy_reference, plan.config, plan.family)
        reference = attach_shardings(jax.eval_shape(copy, trained), moving.sharding)
    start = jax.eval_shape(functools.partial(start_average, plan.config), trained)
    if start is not None:
        average = attach_shardings(start, shardings.params)
    return dataclasses.replace(state, reference=reference, average=average)
