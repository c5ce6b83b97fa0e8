"""From a config to a `Run` and its first `TrainState`.

`plan` does all that needs no device: files, data, tokenizer, rewards, sizes; it collects every
problem it finds. `build` then puts weights on the mesh and makes the jitted functions.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from corl_jax import sampling
from corl_jax.config import Config
from corl_jax.data.dataset import Loader, ParquetSource, held_out, required_columns
from corl_jax.data.processor import Processor
from corl_jax.errors import InputError
from corl_jax.models import janus
from corl_jax.models.janus import JanusConfig
from corl_jax.rewards import registry
from corl_jax.sharding import BATCH, leaf_paths, make_mesh, map_with_path, param_shardings
from corl_jax.train import iterate, supervised, vq
from corl_jax.train.logprobs import Scoring
from corl_jax.train.optimizer import learning_rate, make_optimizer, merge, partition, to_master
from corl_jax.train.run import Run
from corl_jax.train.step import Objective, TrainState, make_score_step, make_train_step
from corl_jax.types import Params
from corl_jax.weights import files

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
ITERATIONS = {
    "grpo": iterate.grpo_iteration,
    "sft": supervised.sft_iteration,
    "vq": vq.vq_iteration,
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """A checked config: what `build` needs, read from files and not yet on a device."""

    config: Config
    model_dir: Path
    model_config: JanusConfig
    processor: Processor
    mesh: Mesh
    tasks: tuple[str, ...]
    rewards: dict[str, list]
    train_loader: Loader
    eval_loader: Loader | None
    steps: int

    @property
    def micro_batches(self) -> int:
        train = self.config.train
        return train.prompts_per_step // (train.micro_batch or train.prompts_per_step)

    @property
    def optimizer_steps(self) -> int:
        return self.steps * self.config.grpo.num_iterations


def plan(config: Config) -> Plan:
    """Reads and checks everything but the weights' values.

    Raises:
        InputError: all problems found in the model directory, the data, rewards and mesh.
    """
    problems: list[str] = []

    def attempt(function: Callable, *args: Any) -> Any:
        try:
            return function(*args)
        except InputError as error:
            problems.extend(error.problems)
            return None

    model_dir = attempt(files.resolve_model_dir, config.model.path)
    model_config = model_dir and attempt(files.load_config, model_dir)
    processor = model_dir and attempt(Processor.from_dir, model_dir)
    rewards = attempt(registry.resolve, config.rewards, config.compat)
    tasks = _tasks(config)
    problems += _task_problems(config, tasks, rewards)
    mesh = attempt(make_mesh, config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    if mesh:
        problems += _batch_problems(config, mesh)
    if model_config:
        attempt(partition, janus.abstract(model_config), config.train.trainable)
        problems += _size_problems(config, model_config)
    loaders = processor and attempt(_loaders, config, processor, tasks, rewards or {})
    if problems:
        raise InputError(problems)
    train_loader, eval_loader = loaders
    steps = config.train.max_steps or max(
        1, round(config.train.epochs * len(train_loader.source) / config.train.prompts_per_step)
    )
    return Plan(
        config, model_dir, model_config, processor, mesh, tasks, rewards,
        train_loader, eval_loader, steps,
    )  # fmt: skip


def _tasks(config: Config) -> tuple[str, ...]:
    if config.objective == "vq":
        return ()
    if config.objective == "sft":
        return ("t2i", "mm2t")
    return {"unified": ("t2i", "mm2t")}.get(config.grpo.tasks, (config.grpo.tasks,))


def _task_problems(config: Config, tasks: tuple[str, ...], rewards: dict | None) -> list[str]:
    if config.objective != "grpo" or rewards is None:
        return []
    problems = [
        f"rewards: none is for {task}, which grpo.tasks {config.grpo.tasks} trains; "
        f"add one, or set grpo.tasks to the other task"
        for task in tasks
        if not rewards.get(task)
    ]
    return problems + [
        f"rewards: {reward.name} is for {task}, which grpo.tasks {config.grpo.tasks} leaves out; "
        "remove it"
        for task, listed in rewards.items()
        if task not in tasks
        for reward in listed
    ]


def _batch_problems(config: Config, mesh: Mesh) -> list[str]:
    ways = math.prod(mesh.shape[axis] for axis in BATCH)
    batch = config.train.prompts_per_step
    sizes = {
        "train.prompts_per_step": batch,
        "train.micro_batch": config.train.micro_batch or batch,
        "rollout.batch_prompts": config.rollout.batch_prompts or batch,
        "eval.batch_prompts": config.eval.batch_prompts if config.eval.suite != "none" else ways,
    }
    return [
        f"{name}: {size} is not a multiple of the {ways} ways that mesh data x fsdp splits "
        f"prompts; nearest: {size // ways * ways or ways} or {-(-size // ways) * ways}"
        for name, size in sizes.items()
        if size % ways
    ]


def _size_problems(config: Config, model: JanusConfig) -> list[str]:
    longest = config.data.max_prompt_length + max(
        config.rollout.max_new_tokens, model.num_image_tokens
    )
    limit = model.llama.max_position_embeddings
    if longest <= limit:
        return []
    return [
        f"data.max_prompt_length: {config.data.max_prompt_length} plus a completion is {longest} "
        f"tokens; the model has positions for {limit}"
    ]


def _loaders(
    config: Config, processor: Processor, tasks: tuple[str, ...], rewards: dict
) -> tuple[Loader, Loader | None]:
    data, columns = config.data, config.data.columns.model_dump()
    required = {*required_columns(tasks), *_extra_columns(config, rewards)}
    source: Any = ParquetSource(data.path, columns=columns, required=sorted(required))
    rows, held = source, None
    if config.eval.suite != "none":
        if config.eval.path is not None:
            held = ParquetSource(config.eval.path, columns=columns, required=sorted(required))
        else:
            rows, held = held_out(source, config.eval.rows)
    common = dict(
        processor=processor,
        seed=config.seed,
        required=[name for name in required if name in _extra_columns(config, rewards)],
        max_prompt_length=data.max_prompt_length,
        system_prompt=data.system_prompt,
        max_bad_fraction=data.max_bad_fraction,
        cache_rows=data.cache_rows,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    batch = config.train.prompts_per_step
    train = Loader(rows, tasks=tasks, batch_size=batch, prefetch=data.prefetch, **common)
    train.check()
    if held is None:
        return train, None
    tasks = tasks or ("t2i",)
    evaluation = Loader(
        held, tasks=tasks, batch_size=config.eval.batch_prompts, shuffle=False, **common
    )
    return train, evaluation


def _extra_columns(config: Config, rewards: dict) -> list[str]:
    if config.objective == "vq":
        return ["real_image"]
    if config.objective == "sft":
        captions = [config.sft.caption_column] if config.sft.caption_column else []
        return ["real_image", config.sft.answer_column, *captions]
    return sorted({c for listed in rewards.values() for r in listed for c in r.entry.columns})


def build(plan: Plan, phases: Any) -> tuple[Run, TrainState]:
    """Weights on the mesh, jitted functions, and the state of a fresh start."""
    config, mesh = plan.config, plan.mesh
    stored = files.load_params(plan.model_dir, plan.model_config)
    source_dtypes = {path: leaf.dtype for path, leaf in leaf_paths(stored)}
    trained, frozen = partition(stored, config.train.trainable)
    trained = place(to_master(trained, config.compat.bfloat16_master), mesh)
    frozen = place(to_master(frozen, False), mesh)
    optimizer = make_optimizer(config.optimizer, plan.optimizer_steps)
    shardings = state_shardings(optimizer, trained, mesh)
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(trained)
    state = TrainState(jnp.int32(0), trained, opt_state)
    reference = None
    if config.objective == "grpo" and config.grpo.kl_coef:
        # A copy: the state's own buffers are donated to the first step.
        reference = jax.tree.map(jnp.copy, janus.cast(trained, DTYPES[config.model.dtype]))
    objective = make_objective(plan)
    if config.objective == "vq":
        train_step = vq.make_vq_step(
            plan.model_config, config.vq, optimizer, out_shardings=(shardings, None)
        )
    else:
        train_step = make_train_step(
            plan.model_config, objective, optimizer, out_shardings=(shardings, None)
        )
    run = Run(
        model_config=plan.model_config,
        processor=plan.processor,
        mesh=mesh,
        dtype=DTYPES[config.model.dtype],
        frozen=frozen,
        reference=reference,
        source_dtypes=source_dtypes,
        train_loader=plan.train_loader,
        eval_loader=plan.eval_loader,
        steps=plan.steps,
        seed=config.seed,
        image_side=round(math.sqrt(plan.model_config.num_image_tokens))
        * plan.model_config.vq.downsample,
        iterate=ITERATIONS[config.objective],
        train_step=train_step,
        score_step=make_score_step(plan.model_config, objective),
        samplers=make_samplers(plan),
        rewards=plan.rewards,
        comparison=_comparison(plan),
        tasks=plan.tasks,
        group_size=config.rollout.group_size,
        rollout_batch=(config.rollout.batch_prompts or config.train.prompts_per_step)
        // jax.process_count(),
        num_iterations=config.grpo.num_iterations,
        mask_truncated=config.grpo.mask_truncated,
        sft=config.sft,
        schedule=learning_rate(config.optimizer, plan.optimizer_steps),
        phases=phases,
    )
    return run, jax.device_put(state, shardings)


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
        lambda leaf, sharding: sharding if leaf.ndim == len(leaf.shape) else replicated,
        shapes,
        params,
        transform_non_params=lambda _: replicated,
    )
    return TrainState(replicated, params, moments)


def make_objective(plan: Plan) -> Objective:
    """The loss's constants from the config."""
    config = plan.config
    grpo_weights = {"t2i": config.grpo.t2i_loss_weight, "mm2t": config.grpo.mm2t_loss_weight}
    sft_weights = {
        "t2i": config.sft.t2i_weight,
        "mm2t": config.sft.mm2t_weight,
        "caption": config.sft.caption_weight,
    }
    scoring = Scoring(
        special=plan.processor.special,
        temperature=config.rollout.temperature if config.objective == "grpo" else 1.0,
        cfg_scale=config.rollout.cfg_scale,
        image_logprobs=config.grpo.image_logprobs,
        unshifted=config.compat.image_logprobs_unshifted and config.objective == "grpo",
        remat=config.model.remat,
        chunk=config.model.logprob_chunk,
    )
    weights = sft_weights if config.objective == "sft" else grpo_weights
    return Objective(
        scoring=scoring,
        weights=tuple(weights.items()),
        kl_coef=config.grpo.kl_coef,
        clip_low=config.grpo.clip_low,
        clip_high=config.grpo.clip_high,
        dtype=DTYPES[config.model.dtype],
        micro_batches=plan.micro_batches,
    )


def make_samplers(plan: Plan) -> dict[str, Callable]:
    """task -> (params, prompts, keys) -> Rollout, with the config's sampling options."""
    rollout, grpo = plan.config.rollout, plan.config.grpo
    common = dict(
        special=plan.processor.special,
        temperature=rollout.temperature,
        dtype=DTYPES[plan.config.model.dtype],
    )
    images = functools.partial(
        sampling.sample_images, plan.model_config,
        cfg_scale=rollout.cfg_scale, score=grpo.image_logprobs, **common,
    )  # fmt: skip
    texts = functools.partial(
        sampling.sample_text, plan.model_config,
        max_new_tokens=rollout.max_new_tokens,
        top_k=50 if plan.config.compat.text_top_k_50 else rollout.top_k,
        top_p=rollout.top_p, **common,
    )  # fmt: skip
    return {"t2i": images, "mm2t": texts}


def _comparison(plan: Plan) -> dict[str, Any]:
    grpo = plan.config.grpo
    weights = {t: tuple(r.weight for r in listed) for t, listed in plan.rewards.items()}
    return dict(
        weights=tuple(weights.items()),
        mode=grpo.advantages,
        group_size=plan.config.rollout.group_size,
        mm2t_weight=grpo.mm2t_weight,
        eps=grpo.std_eps,
        scale=grpo.scale_by_std,
    )


def host_params(run: Run, state: TrainState) -> Params:
    """All parameters as the source checkpoint stores them, for export."""
    params = merge(state.params, run.frozen)
    return map_with_path(lambda path, leaf: leaf.astype(run.source_dtypes[path]), params)
