"""Builds a `Run` and its first `TrainState` from a `ResolvedRun`: loads weights, jits functions."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from corl_jax.devices.mesh import param_shardings
from corl_jax.devices.offload import Offloadable
from corl_jax.models import lora
from corl_jax.params import leaf_paths, merge, partition
from corl_jax.policies.janus import network, sampling
from corl_jax.policies.janus.logprobs import LogprobOptions
from corl_jax.rewards import networks
from corl_jax.rewards.samples import FrozenNetwork, Policy
from corl_jax.train import attending, iteration, sft, vq
from corl_jax.train.optimizer import learning_rate, make_optimizer, master_dtype
from corl_jax.train.resolve import ResolvedRun, RunOutline
from corl_jax.train.run import Run
from corl_jax.train.step import LossOptions, TrainState, make_logprob_step, make_train_step
from corl_jax.types import Params
from corl_jax.weights.sharded_load import load_sharded, stored_dtypes, stored_layer_dtypes

ADAPTER_STREAM = 1 << 16
"""Random stream of the adapters' first values, apart from those of the samples."""
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
ITERATIONS = {
    "rl": iteration.rl_iteration,
    "sft": sft.sft_iteration,
    "vq": vq.vq_iteration,
}


def build(plan: ResolvedRun, phases: Any) -> tuple[Run, TrainState]:
    """Weights on the mesh, jitted functions, and the state of a fresh start."""
    config, mesh = plan.config, plan.mesh
    trained, frozen = load_parts(plan)
    reference = make_reference(plan, trained)
    optimizer = make_optimizer(config.optimizer, plan.optimizer_steps)
    shardings = state_shardings(optimizer, trained, mesh)
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(trained)
    state = jax.device_put(TrainState(jnp.int32(0), trained, opt_state), shardings)
    train_step, score_step = make_steps(plan, optimizer, shardings)
    run = Run(
        model_config=plan.model_config,
        processor=plan.processor,
        mesh=mesh,
        dtype=DTYPES[config.model.dtype],
        frozen=frozen,
        reference=reference,
        source_dtypes=stored_dtypes(plan.model_dir, network.base(plan.model_config)),
        layer_dtypes=stored_layer_dtypes(plan.model_dir, network.base(plan.model_config)),
        train_loader=plan.train_loader,
        eval_loader=plan.eval_loader,
        steps=plan.steps,
        seed=config.seed,
        image_side=round(math.sqrt(plan.model_config.num_image_tokens))
        * plan.model_config.vq.downsample,
        iterate=ITERATIONS[config.stage],
        train_step=train_step,
        score_step=score_step,
        samplers=make_samplers(plan),
        rewards=plan.rewards,
        networks=load_networks(plan),
        comparison=_comparison(plan),
        tasks=plan.tasks,
        group_size=config.rollout.group_size,
        pixel_dtype=DTYPES[config.rollout.pixel_dtype],
        rollout_batch=config.rollout.batch_prompts or config.train.prompts_per_step,
        num_iterations=plan.updates_per_step,
        mask_truncated=config.algorithm.mask_truncated,
        sft=config.sft,
        schedule=learning_rate(config.optimizer, plan.optimizer_steps),
        phases=phases,
    )
    return run, state


def load_parts(plan: ResolvedRun) -> tuple[Params, Params]:
    """(trained, frozen) parameters on the mesh at the start: master copies, and as stored."""
    config, mesh, base = plan.config, plan.mesh, network.base(plan.model_config)
    shapes, rest = partition(network.abstract(plan.model_config), config.trained)
    shardings, master = param_shardings(shapes, mesh), master_dtype(config.compat.bfloat16_master)
    if not config.lora.rank:
        trained = dict(leaf_paths(shapes))
        loaded = load_sharded(
            plan.model_dir, base, param_shardings(merge(shapes, rest), mesh),
            lambda path: master if path in trained else None,
        )  # fmt: skip
        return partition(loaded, config.trained)
    frozen = load_sharded(plan.model_dir, base, param_shardings(rest, mesh), lambda _: None)

    def draw(key: jax.Array) -> Params:
        return jax.tree.map(lambda x: x.astype(master), lora.init_adapters(shapes, key))

    # Not the seed itself, which the samples' keys are made of.
    key = jax.random.fold_in(jax.random.key(config.seed), ADAPTER_STREAM)
    return jax.jit(draw, out_shardings=shardings)(key), frozen


def make_reference(plan: ResolvedRun, trained: Params) -> Offloadable | None:
    """What the KL penalty compares with: the trained part at the start, in the compute dtype."""
    if plan.config.stage != "rl" or not plan.config.algorithm.kl_coef:
        return None
    # A copy: the state's own buffers are donated to the first step.
    # Adapters have none: the reference is what is frozen.
    first = {} if plan.config.lora.rank else trained
    copied = jax.tree.map(jnp.copy, network.cast(first, DTYPES[plan.config.model.dtype]))
    offload = plan.config.algorithm.reference == "host"
    return Offloadable(copied, param_shardings(first, plan.mesh), offload=offload)


def load_networks(plan: ResolvedRun) -> dict[str, FrozenNetwork]:
    """What the rewards ask besides the policy; `initial` has the weights of the run's start."""
    offload = plan.config.networks.offload
    loaded = {found.name: networks.load(found, plan.mesh, offload) for found in plan.networks}
    if any("initial" in reward.scorers for listed in plan.rewards.values() for reward in listed):
        base = network.base(plan.model_config)
        start = Policy(base, {}, plan.processor, DTYPES[plan.config.model.dtype])
        loaded["initial"] = networks.load_policy(start, plan.model_dir, plan.mesh, offload=offload)
    return loaded


def make_steps(
    plan: RunOutline, optimizer: optax.GradientTransformation, shardings: TrainState
) -> tuple[Callable, Callable]:
    """The jitted update and the jitted scoring of the plan's objective."""
    objective, jit = make_loss_options(plan), {"out_shardings": (shardings, None)}
    if plan.config.stage == "vq":
        train_step = vq.make_vq_step(plan.model_config, plan.config.vq, optimizer, **jit)
    else:
        train_step = make_train_step(plan.model_config, objective, optimizer, **jit)
    return train_step, make_logprob_step(plan.model_config, objective)


def place(params: Params, mesh: Mesh) -> Params:
    """Host parameters on the mesh, by the sharding table."""
    return jax.device_put(params, param_shardings(params, mesh))


def state_shardings(
    optimizer: optax.GradientTransformation, trained: Params, mesh: Mesh
) -> TrainState:
    """A TrainState of shardings: optimizer moments lie as their parameters do."""
    replicated = NamedSharding(mesh, PartitionSpec())
    params = param_shardings(trained, mesh)
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


def make_loss_options(plan: RunOutline) -> LossOptions:
    """The loss's constants from the config."""
    config = plan.config
    algorithm = config.algorithm
    rl_weights = {"t2i": algorithm.t2i_loss_weight, "mm2t": algorithm.mm2t_loss_weight}
    sft_weights = {
        "t2i": config.sft.t2i_weight,
        "mm2t": config.sft.mm2t_weight,
        "caption": config.sft.caption_weight,
    }
    scoring = LogprobOptions(
        special=plan.special,
        temperature=config.rollout.temperature if config.stage == "rl" else 1.0,
        cfg_scale=config.rollout.cfg_scale,
        image_logprobs=config.algorithm.image_logprobs,
        unshifted=config.compat.image_logprobs_unshifted and config.stage == "rl",
        remat=config.model.remat,
        attention=attending.of_update(plan.config, plan.model_config, plan.mesh),
        chunk=config.model.logprob_chunk,
    )
    weights = sft_weights if config.stage == "sft" else rl_weights
    return LossOptions(
        scoring=scoring,
        weights=tuple(weights.items()),
        kl_coef=config.algorithm.kl_coef,
        clip_low=config.algorithm.clip_low,
        clip_high=config.algorithm.clip_high,
        dtype=DTYPES[config.model.dtype],
        micro_batches=plan.micro_batches,
    )


def make_samplers(plan: RunOutline) -> dict[str, Callable]:
    """task -> (params, prompts, keys) -> Rollout, with the config's sampling options."""
    rollout, algorithm = plan.config.rollout, plan.config.algorithm
    common = {
        "special": plan.special,
        "temperature": rollout.temperature,
        "dtype": DTYPES[plan.config.model.dtype],
        "attention": attending.of_samplers(plan.config, plan.model_config, plan.mesh),
    }
    images = functools.partial(
        sampling.sample_images, plan.model_config,
        cfg_scale=rollout.cfg_scale, score=algorithm.image_logprobs, **common,
    )  # fmt: skip
    texts = functools.partial(
        sampling.sample_text, plan.model_config,
        max_new_tokens=rollout.max_new_tokens,
        top_k=50 if plan.config.compat.text_top_k_50 else rollout.top_k,
        top_p=rollout.top_p, **common,
    )  # fmt: skip
    return {"t2i": images, "mm2t": texts}


def _comparison(plan: ResolvedRun) -> dict[str, Any]:
    algorithm = plan.config.algorithm
    weights = {t: tuple(r.weight for r in listed) for t, listed in plan.rewards.items()}
    return {
        "weights": tuple(weights.items()),
        "mode": algorithm.advantages,
        "group_size": plan.config.rollout.group_size,
        "mm2t_weight": algorithm.mm2t_weight,
        "eps": algorithm.std_eps,
        "scale": algorithm.scale_by_std,
        "each": algorithm.multi_objective_aggregation == "normalize_then_sum",
    }
