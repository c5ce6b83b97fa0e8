"""Builds a `Run` and its first `TrainState` from a `ResolvedRun`: loads weights, jits functions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import optax

from corl_jax.algorithms.advantages import AdvantageOptions
from corl_jax.algorithms.losses import LossConstants
from corl_jax.algorithms.recipes import RECIPES
from corl_jax.devices.batches import num_batch_shards
from corl_jax.policies.family import Denoising, LogprobOptions, SamplingOptions, Unmasking
from corl_jax.policies.packing import Blocks
from corl_jax.policies.turns import Sampler, bind_sampler
from corl_jax.rewards import networks
from corl_jax.rewards.samples import FrozenNetwork, Policy
from corl_jax.sampling_options import choose_cfg_scale
from corl_jax.tasks import CODES, TASKS
from corl_jax.train import attending, fit
from corl_jax.train.average import keep_average
from corl_jax.train.kl_penalty import KlPenalty
from corl_jax.train.optimizer import learning_rate
from corl_jax.train.recipe_options import choose_eval_denoising, choose_sde, choose_window
from corl_jax.train.reference import has_reference
from corl_jax.train.resolve import ResolvedRun, RunOutline
from corl_jax.train.run import Run
from corl_jax.train.states import prepare_start
from corl_jax.train.step import TokenSelection, TrainState, UpdateOptions, make_logprob_step
from corl_jax.types import DTYPES
from corl_jax.weights.checkpoint import read_layer_dtypes, read_stored_dtypes


def build(
    plan: ResolvedRun, phases: Any, *, from_checkpoint: bool = False
) -> tuple[Run, TrainState]:
    """Loads weights, jits functions, and makes the first state; see `states.prepare_start`."""
    config, mesh, family = plan.config, plan.mesh, plan.family
    start = prepare_start(plan, from_checkpoint=from_checkpoint)
    train_step, logprob_step = make_steps(plan, start.optimizer, start.shardings)
    base = family.base(plan.sizes)
    run = Run(
        family=family,
        sizes=plan.sizes,
        processor=plan.processor,
        mesh=mesh,
        dtype=DTYPES[config.model.dtype],
        frozen=start.frozen,
        reference=start.reference,
        moving=start.moving,
        source_dtypes=read_stored_dtypes(plan.model_dir, family.kind, base),
        layer_dtypes=read_layer_dtypes(plan.model_dir, family.kind, base),
        train_loader=plan.train_loader,
        evaluations=plan.evaluations,
        steps=plan.steps,
        seed=config.seed,
        image_side=plan.limits.image_side,
        iterate=keep_average(plan.stage.iterate, config.train.ema_decay, start.shardings.params),
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
    return run, start.state


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
    if not plan.stage.samples:  # given images have no trajectory
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
