"""Builds a `Run` and its first `TrainState` from a `ResolvedRun`: loads weights, jits functions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from corl_jax.algorithms.advantages import AdvantageOptions
from corl_jax.algorithms.losses import LossConstants
from corl_jax.algorithms.recipes import RECIPES
from corl_jax.devices.batches import num_batch_shards
from corl_jax.devices.mesh import Rules, param_shardings
from corl_jax.models import lora
from corl_jax.params import leaf_paths, merge, partition
from corl_jax.policies.family import Denoising, LogprobOptions, SamplingOptions, Unmasking
from corl_jax.policies.packing import Blocks
from corl_jax.policies.turns import Sampler, bind_sampler
from corl_jax.rewards import networks
from corl_jax.rewards.samples import FrozenNetwork, Policy
from corl_jax.sampling_options import choose_cfg_scale
from corl_jax.tasks import CODES, TASKS
from corl_jax.train import attending, fit
from corl_jax.train.average import keep_average, start_average
from corl_jax.train.kl_penalty import KlPenalty
from corl_jax.train.optimizer import learning_rate, make_optimizer, master_dtype
from corl_jax.train.recipe_options import choose_eval_denoising, choose_sde, choose_window
from corl_jax.train.reference import (
    MovingReference,
    copy_reference,
    has_reference,
    make_fixed_reference,
    make_moving_reference,
)
from corl_jax.train.resolve import ResolvedRun, RunOutline
from corl_jax.train.run import Run
from corl_jax.train.step import TokenSelection, TrainState, UpdateOptions, make_logprob_step
from corl_jax.types import DTYPES, Params
from corl_jax.weights.checkpoint import load_sharded, read_layer_dtypes, read_stored_dtypes

ADAPTER_STREAM = 1 << 16
"""Random stream of the adapters' first values, apart from those of the samples."""


def build(plan: ResolvedRun, phases: Any) -> tuple[Run, TrainState]:
    """Loads weights onto the mesh, jits functions, and makes the state of a fresh start."""
    config, mesh, family = plan.config, plan.mesh, plan.family
    trained, frozen = load_parts(plan)
    moving = make_moving_reference(plan, trained)
    optimizer = make_plan_optimizer(plan)
    shardings = state_shardings(optimizer, trained, mesh, family.rules)
    state = make_state(plan, optimizer, trained, shardings, moving)
    train_step, logprob_step = make_steps(plan, optimizer, shardings)
    run = Run(
        family=family,
        sizes=plan.sizes,
        processor=plan.processor,
        mesh=mesh,
        dtype=DTYPES[config.model.dtype],
        frozen=frozen,
        reference=make_fixed_reference(plan, trained),
        moving=moving,
        source_dtypes=read_stored_dtypes(plan.model_dir, family.kind, family.base(plan.sizes)),
        layer_dtypes=read_layer_dtypes(plan.model_dir, family.kind, family.base(plan.sizes)),
        train_loader=plan.train_loader,
        evaluations=plan.evaluations,
        steps=plan.steps,
        seed=config.seed,
        image_side=plan.limits.image_side,
        iterate=keep_average(plan.stage.iterate, config.train.ema_decay, shardings.params),
        train_step=train_step,
        logprob_step=logprob_step,
        velocity_step=make_velocity_step(plan),
        **make_run_samplers(plan),
        rewards=plan.rewards,
        networks=load_networks(plan),
        recipe=RECIPES[config.algorithm.name],
        advantage_options=make_advantage_options(plan),
        loss_weights=tuple(plan.stage.loss_weights(config).items()),
        tasks=plan.tasks,
        kl_penalty=make_kl_penalty(plan),
        alternate_every=choose_period(plan),
        group_size=config.rollout.group_size,
        redraws=count_redraws(plan),
        rollout_batch=config.rollout.batch_prompts or config.train.prompts_per_step,
        num_iterations=plan.updates_per_step,
        answer_blocks=choose_answer_blocks(plan),
        max_new_tokens=config.rollout.max_new_tokens,
        mask_truncated=config.algorithm.mask_truncated,
        sft=config.sft,
        schedule=learning_rate(config.optimizer, plan.optimizer_steps),
        phases=phases,
    )
    return run, state


def make_plan_optimizer(plan: RunOutline) -> optax.GradientTransformation:
    """Returns the optimizer of the config with the family's rules for its parameters."""
    return make_optimizer(
        plan.config.optimizer, plan.optimizer_steps, undecayed=plan.family.undecayed,
        groups=plan.family.groups,
    )  # fmt: skip


def make_state(
    plan: ResolvedRun, optimizer: optax.GradientTransformation, trained: Params,
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


def load_parts(plan: ResolvedRun) -> tuple[Params, Params]:
    """Returns (trained, frozen) parameters on the mesh: master copies, and as stored."""
    config, mesh, family = plan.config, plan.mesh, plan.family
    base, rules = family.base(plan.sizes), family.rules
    shapes, rest = partition(family.abstract(plan.sizes), plan.trained)
    shardings = param_shardings(shapes, mesh, rules)
    master = master_dtype(config.compat.bfloat16_master)
    if not config.lora.rank:
        trained = dict(leaf_paths(shapes))
        loaded = load_sharded(
            plan.model_dir, family.kind, base,
            param_shardings(family.abstract(base), mesh, rules),
            # None keeps the type of the file: a frozen parameter needs no float32 copy.
            lambda path: master if path in trained else None,
        )  # fmt: skip
        return partition(merge(loaded, draw_alignment(plan, master)), plan.trained)
    frozen = load_sharded(
        plan.model_dir, family.kind, base, param_shardings(rest, mesh, rules), lambda _: None
    )

    def draw_adapters(key: jax.Array) -> Params:
        return jax.tree.map(lambda x: x.astype(master), lora.init_adapters(shapes, key))

    # Not the seed itself, which the samples' keys are made of.
    key = jax.random.fold_in(jax.random.key(config.seed), ADAPTER_STREAM)
    return jax.jit(draw_adapters, out_shardings=shardings)(key), frozen


def draw_alignment(plan: ResolvedRun, dtype: Any) -> Params:
    """Returns the first values of the projector of an alignment; empty without one."""
    alignment, sizes = plan.family.alignment, plan.sizes
    if alignment is None or not fit.aligns_images(plan.config):
        return {}

    def draw(key: jax.Array) -> Params:
        return jax.tree.map(lambda x: x.astype(dtype), alignment.init(sizes, key))

    # No run has adapters as well, whose stream this is.
    key = jax.random.fold_in(jax.random.key(plan.config.seed), ADAPTER_STREAM)
    shardings = param_shardings(jax.eval_shape(draw, key), plan.mesh, plan.family.rules)
    return jax.jit(draw, out_shardings=shardings)(key)


def load_networks(plan: ResolvedRun) -> dict[str, FrozenNetwork]:
    """Loads the networks of the rewards; `initial` is the policy at the start of the run."""
    offload = plan.config.networks.offload
    loaded = {
        network.name: networks.load_frozen_network(network, plan.mesh, offload)
        for network in plan.networks
    }
    if any("initial" in reward.scorers for of_task in plan.rewards.values() for reward in of_task):
        base, dtype = plan.family.base(plan.sizes), DTYPES[plan.config.model.dtype]
        start = Policy(plan.family, base, {}, plan.processor, dtype)
        loaded["initial"] = networks.load_frozen_policy(
            start, plan.model_dir, plan.mesh, offload=offload
        )
    return loaded


def make_steps(
    plan: RunOutline, optimizer: optax.GradientTransformation, shardings: TrainState
) -> tuple[Callable, Callable]:
    """Returns the jitted update and the jitted scoring of the stage."""
    options = make_update_options(plan)
    # The new state must lie as the donated one, so that it can take over its buffers.
    jit = {"out_shardings": (shardings, None)}
    train_step = plan.stage.make_step(plan, options, optimizer, **jit)
    return train_step, make_logprob_step(plan.family, plan.sizes, options)


def choose_answer_blocks(plan: RunOutline) -> Blocks | None:
    """Returns the blocks of prompts whose answers may share rows in an update; None: none may."""
    # Splash attention cannot keep answers of a row apart and let all see the prompt.
    if attending.choose_update_kernel(plan.config, plan.limits.head_dim, plan.mesh) == "splash":
        return None
    return Blocks(num_batch_shards(plan.mesh), plan.micro_batches)


def make_velocity_step(plan: RunOutline) -> Callable:
    """Returns the jitted computing of the velocities of latents."""
    options = make_update_options(plan)
    return make_logprob_step(plan.family, plan.sizes, options, velocities=True)


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


def make_update_options(plan: RunOutline) -> UpdateOptions:
    """Returns the loss and its constants from the config."""
    config, compares = plan.config, plan.stage.compares
    algorithm = plan.algorithm
    logprobs = LogprobOptions(
        special=plan.special,
        # Supervised targets were not sampled, so they are scored by the plain softmax.
        temperature=config.rollout.temperature if compares else 1.0,
        cfg_scale=choose_cfg_scale(config.rollout.cfg_scale, plan.family),
        image_logprobs=algorithm.image_logprobs if compares else "conditional",
        unshifted=config.compat.image_logprobs_unshifted and compares,
        remat=config.model.remat,
        attention=attending.choose_update_kernel(config, plan.limits.head_dim, plan.mesh),
        chunk=config.model.logprob_chunk,
        straight_through=plan.stage.straight_through(config),
        image=plan.image,
        unmasking=choose_unmasking(plan),
        denoising=choose_denoising(plan),
        is_given=not compares,
        released=config.sft.released and not plan.stage.samples,
        aligned=fit.aligns_images(config),
    )
    return UpdateOptions(
        loss=plan.stage.loss(config),
        constants=dataclasses.replace(
            make_loss_constants(algorithm), alignment_weight=config.sft.repa_weight
        ),
        logprobs=logprobs,
        weights=tuple(plan.stage.loss_weights(config).items()),
        dtype=DTYPES[config.model.dtype],
        micro_batches=plan.micro_batches,
        selections=choose_selections(algorithm) if compares else (),
        latent_clip=config.denoising.clip_range,
        masks_indifferent=algorithm.mask_indifferent and compares,
    )


def make_loss_constants(algorithm: Any) -> LossConstants:
    """Returns the constants of the loss from a block `algorithm` that its recipe completed."""
    return LossConstants(
        # A penalty in the reward has no term in the loss.
        kl_coef=algorithm.kl_coef if algorithm.kl_in == "loss" else 0.0,
        clip_low=algorithm.clip_low,
        clip_high=algorithm.clip_high,
        reduction=algorithm.reduction,
        kl_estimator=algorithm.kl_estimator,
        dual_clip=algorithm.dual_clip,
        importance_cap=algorithm.importance_cap,
        advantage_clip=algorithm.advantage_clip,
    )


def choose_selections(algorithm: Any) -> tuple[TokenSelection, ...]:
    """Returns how the tokens of images are weighted in the loss; empty if all count the same."""
    selections = ()
    if algorithm.image_token_share < 1:
        selections += (TokenSelection(CODES, algorithm.image_token_share),)
    if algorithm.image_token_weights == "entropy":
        selections += (TokenSelection(CODES),)
    return selections


def make_sampling_options(plan: RunOutline, *, evaluates: bool = False) -> SamplingOptions:
    """Returns the sampling options of the config, of training or of evaluations."""
    rollout, compat = plan.config.rollout, plan.config.compat
    return SamplingOptions(
        special=plan.special,
        temperature=rollout.temperature,
        top_k=50 if compat.text_top_k_50 else rollout.top_k,
        top_p=rollout.top_p,
        max_new_tokens=rollout.max_new_tokens,
        cfg_scale=choose_cfg_scale(rollout.cfg_scale, plan.family),
        image_window=rollout.image_window,
        image_logprobs=plan.config.algorithm.image_logprobs,
        dtype=DTYPES[plan.config.model.dtype],
        attention=attending.choose_sampler_kernel(plan.config, plan.limits.head_dim, plan.mesh),
        image=plan.image,
        unmasking=choose_unmasking(plan),
        denoising=choose_denoising(plan, evaluates=evaluates),
    )


def choose_denoising(plan: RunOutline, *, evaluates: bool = False) -> Denoising:
    """Returns how images that are made by denoising are drawn and scored.

    Evaluations and stages without a comparison draw them without noise.
    """
    options, tokens = plan.config.denoising, plan.limits.latent_tokens
    if evaluates or not plan.stage.compares:
        return choose_eval_denoising(options, tokens)
    return Denoising(
        options.steps, options.schedule, options.shift,
        choose_sde(options), choose_window(options), options.same_noise, options.kl, tokens,
    )  # fmt: skip


def choose_unmasking(plan: RunOutline) -> Unmasking:
    """Returns how images whose codes come in any order are drawn and scored."""
    options = plan.config.unmasking
    if not plan.stage.compares:  # given images have no trajectory
        return Unmasking(options.steps)
    return Unmasking(options.steps, options.logprobs, options.scored_steps)


def count_redraws(plan: RunOutline) -> int:
    """Returns the most further batches that a step samples for groups with equal rewards."""
    return (plan.algorithm.redraws or 0) if plan.stage.compares else 0


def uses_greedy(plan: RunOutline) -> bool:
    """Returns whether the algorithm compares completions with a greedy one of the same prompt."""
    return plan.stage.compares and RECIPES[plan.config.algorithm.name].uses_greedy


def make_samplers(
    plan: RunOutline, *, greedy_last: bool = False, evaluates: bool = False
) -> dict[str, Sampler]:
    """Returns (params, prompts, keys) -> segments for each task of the run.

    `greedy_last`: the last completion of each prompt is greedy.
    """
    options = make_sampling_options(plan, evaluates=evaluates)
    options = dataclasses.replace(options, greedy_last=greedy_last)
    return {
        name: bind_sampler(plan.family.turns[TASKS[name].turn_kinds].sample, plan.sizes, options)
        for name in plan.tasks
    }


def make_run_samplers(plan: RunOutline) -> dict[str, Any]:
    """Returns the samplers of a run by the names of its fields."""
    return {
        "samplers": make_samplers(plan),
        "evaluation_samplers": make_samplers(plan, evaluates=True),
        "greedy_samplers": make_samplers(plan, greedy_last=True) if uses_greedy(plan) else None,
    }


def make_kl_penalty(plan: RunOutline) -> KlPenalty | None:
    """Returns the KL penalty of rewards; None without one, or if it is in the loss."""
    algorithm: Any = plan.algorithm
    if not has_reference(plan) or algorithm.kl_in == "loss":
        return None
    return KlPenalty(algorithm.kl_coef, algorithm.kl_estimator)


def choose_period(plan: RunOutline) -> int:
    """Returns after how many steps the trained task changes; 0 if each step trains all tasks."""
    alternates = plan.stage.compares and len(plan.tasks) > 1
    return plan.config.algorithm.alternate_every if alternates else 0


def make_advantage_options(plan: ResolvedRun) -> AdvantageOptions:
    """Returns how the config turns rewards into advantages."""
    algorithm: Any = plan.algorithm
    weights = {task: tuple(r.weight for r in of_task) for task, of_task in plan.rewards.items()}
    return AdvantageOptions(
        reward_weights=tuple(weights.items()),
        task_weights=task_weights(algorithm),
        mode=algorithm.advantages,
        group_size=plan.config.rollout.group_size,
        scale=algorithm.scale,
        ddof=algorithm.ddof,
    )


def task_weights(algorithm: Any) -> tuple[tuple[str, float], ...]:
    """Returns the weight of each task in the joint reward: 1 for images, lambda for texts."""
    return tuple(
        (name, algorithm.mm2t_weight if task.makes_text else 1.0) for name, task in TASKS.items()
    )
