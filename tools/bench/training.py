"""Measures the training step, and a whole iteration of GRPO without the cost of rewards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from corl_jax.algorithms.advantages import AdvantageOptions
from corl_jax.algorithms.losses import CLIPPED_POLICY_LOSS, LossConstants
from corl_jax.algorithms.recipes import RECIPES
from corl_jax.config.schema import Algorithm, Optimizer
from corl_jax.params import partition
from corl_jax.policies.family import LogprobOptions
from corl_jax.policies.packing import Blocks
from corl_jax.rewards.registry import BoundReward, RewardRow
from corl_jax.rewards.samples import Context, Samples
from corl_jax.runs.pace import Phases
from corl_jax.tasks import UNIFIED
from corl_jax.train import iteration as rl_iteration
from corl_jax.train.build import task_weights
from corl_jax.train.optimizer import learning_rate, make_optimizer
from corl_jax.train.run import Run
from corl_jax.train.states import state_shardings
from corl_jax.train.step import TrainState, UpdateOptions, make_train_step
from corl_jax.types import Params, Prompts
from tools.bench import inputs
from tools.bench.cost import Work, count_training_operations
from tools.bench.generation import make_prompts, make_samplers
from tools.bench.setting import COMPUTE, Setting, trained_patterns
from tools.bench.timing import Record

UPDATES = 1000  # of the schedule
LATENT_CLIP = 1e-4  # of denoising steps, as denoising.clip_range


def start_training(
    setting: Setting, options: UpdateOptions | None = None, master: Any = jnp.float32
) -> tuple[TrainState, Params, Any]:
    """Returns a new state with AdamW, the frozen parameters, and the jitted step.

    Without `options` the step is that of the paper's first stage. `master` is the dtype of the
    trained parameters and of their moments.
    """
    trained, frozen = partition(setting.make_policy(COMPUTE), trained_patterns(setting))
    trained = jax.tree.map(lambda x: x.astype(master), trained)
    optimizer = make_optimizer(Optimizer(), UPDATES)
    shardings = state_shardings(optimizer, trained, setting.mesh, setting.size.family.rules)
    moments = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(trained)
    step = make_train_step(
        setting.size.family,
        setting.size.policy,
        options or make_update_options(setting),
        optimizer,
        out_shardings=(shardings, None),
    )
    return jax.device_put(TrainState(jnp.int32(0), trained, moments), shardings), frozen, step


def make_update_options(setting: Setting) -> UpdateOptions:
    """Returns the update options of the paper's first stage."""
    scoring = LogprobOptions(
        setting.processor.special, remat=setting.remat, attention=setting.attention,
        unmasking=setting.unmasking, cfg_scale=setting.size.cfg_scale,
        denoising=setting.size.denoising,
    )  # fmt: skip
    pieces = setting.prompts // (setting.micro_batch or setting.prompts)
    weights = tuple((task, 1.0) for task in UNIFIED)
    return UpdateOptions(
        CLIPPED_POLICY_LOSS, LossConstants(), scoring, weights, micro_batches=pieces,
        latent_clip=LATENT_CLIP,
    )  # fmt: skip


def choose_answer_blocks(setting: Setting) -> Blocks | None:
    """Returns the blocks of prompts whose answers may share rows, as a run has them."""
    if setting.attention == "splash":
        return None
    return Blocks(setting.num_batch_shards, make_update_options(setting).micro_batches)


def list_works(setting: Setting) -> tuple[Work, ...]:
    """Returns the completions of a training step, as often as it reads them.

    Images by denoising are read at each step that is trained, with their prompt and without it.
    """
    size, (prompts, group) = setting.size, (setting.prompts, setting.group)
    window = size.denoising.window.length
    images = Work(
        "t2i", prompts, group * (window or 1), size.image_prompt, size.limits.image_tokens,
        guided=window is not None and size.cfg_scale != 1,
    )  # fmt: skip
    return images, Work("mm2t", prompts, group, size.text_prompt, size.answer)


def make_batch(setting: Setting) -> dict[str, Any]:
    """Returns a batch of both tasks, on the devices."""
    size, special = setting.size, setting.processor.special
    return setting.place(
        {
            work.task: inputs.make_task_batch(
                size, special, make_prompts(setting, work.task), setting.group, work.length
            )
            for work in list_works(setting)
        }
    )


def measure_train(setting: Setting) -> Iterator[Record]:
    """Measures one optimizer step on both tasks: vision tower, padding masks, AdamW.

    `tokens_per_s` counts a prompt once for each completion, as the reference reads it. `mfu` is the
    operations that the mathematics needs (see `cost`; each prompt read once) at the measured rate
    of products; `mfu_repeated_prompts` takes the reference's operations.
    """
    return _measure_step(setting, "train", UNIFIED)


def measure_image_update(setting: Setting) -> Iterator[Record]:
    """Measures one optimizer step on images alone; see `measure_train`."""
    return _measure_step(setting, "train_image", ("t2i",))


def _measure_step(setting: Setting, part: str, tasks: tuple[str, ...]) -> Iterator[Record]:
    state, frozen, step = start_training(setting)
    batch = {task: of_task for task, of_task in make_batch(setting).items() if task in tasks}
    works = tuple(work for work in list_works(setting) if work.task in tasks)

    def update() -> dict[str, jax.Array]:
        nonlocal state  # the step has taken over the buffers of the last one
        state, metrics = step(state, frozen, batch)
        return metrics

    timing = setting.measure(part, update)
    tokens = sum(work.rows * (work.prompt + work.length) for work in works)
    figures: dict[str, Any] = {"tokens_per_s": tokens / timing.median}
    for name, shared in (("mfu", True), ("mfu_repeated_prompts", False)):
        needed = count_training_operations(setting.size.costs, works, shared)
        figures[f"{name}_tflop"] = needed / 1e12
        figures[name] = needed / setting.ceilings.matmul / setting.mesh.size / timing.median
    figures |= {"loss": float(update()["loss"]), "programs": step._cache_size()}
    figures["attention"] = setting.attention
    yield Record(part, "optimizer step", timing, figures)


def measure_iteration(setting: Setting) -> Iterator[Record]:
    """Measures the project's GRPO iteration, with rewards that cost nothing.

    It has both rollouts, pixels and texts on the host, advantages, and the update, which reads
    answers as long as they were sampled. `programs` counts the update's compilations.
    """
    state, frozen, step = start_training(setting)
    run, prompts = make_run(setting, frozen, step), _make_prompts(setting)
    number = 0

    def iterate_once() -> Any:
        nonlocal state, number
        state, done = rl_iteration.rl_iteration(run, state, prompts, number)
        number += 1
        return done.metrics

    timing = setting.measure("iteration", iterate_once)
    run.phases.take()  # drops the seconds of the calls above, of which one compiled
    metrics = iterate_once()
    phases = {name.removeprefix("phase/"): spent for name, spent in run.phases.take().items()}
    difference = "sampling/sampling_logp_difference/mean"
    drift = {f"{task}_logp_difference": float(metrics[f"{task}/{difference}"]) for task in UNIFIED}
    ratios = [name for name in metrics if name.endswith("/ratio_first")]
    drift |= {name.replace("/", "_"): float(metrics[name]) for name in ratios}
    figures = phases | drift | {"programs": step._cache_size()}
    yield Record("iteration", "rollouts and update", timing, figures)


def make_segment_samplers(setting: Setting) -> dict[str, Any]:
    """Returns the samplers as a run has them: task -> (params, prompts, keys) -> segments."""

    def make(task: str) -> Any:
        # A function for each task: a lambda in the comprehension would see the last task.
        sample = make_samplers(setting, unmasking=setting.unmasking)[task]
        return lambda *inputs: (sample(*inputs),)

    return {task: make(task) for task in UNIFIED}


def _make_prompts(setting: Setting) -> Prompts:
    encoded = {task: make_prompts(setting, task) for task in UNIFIED}
    columns = {"prompt": [""] * setting.prompts}
    return Prompts(np.arange(setting.prompts), columns, encoded)


def _free_reward(samples: Samples, context: Context) -> np.ndarray:
    rng = np.random.default_rng(context.step)
    return rng.standard_normal(len(samples)).astype(np.float32)


def make_run(setting: Setting, frozen: Params, step: Any) -> Run:
    """Returns a Run with the values of an iteration; nothing is loaded, saved or evaluated."""
    rewards = {
        task: [BoundReward("free", 1.0, _free_reward, RewardRow(_free_reward, task))]
        for task in UNIFIED
    }
    comparison = AdvantageOptions(
        reward_weights=tuple((task, (1.0,)) for task in UNIFIED),
        task_weights=task_weights(Algorithm()),
        mode="unified_reward", group_size=setting.group, eps=1e-4, scale="group",
    )  # fmt: skip
    return Run(
        family=setting.size.family, sizes=setting.size.policy,
        processor=setting.processor, mesh=setting.mesh, dtype=COMPUTE, frozen=frozen,
        reference=None, moving=None, kl_penalty=None, source_dtypes={}, layer_dtypes={},
        train_loader=None, evaluations=(), steps=UPDATES, seed=0,
        image_side=setting.size.limits.image_side,
        iterate=rl_iteration.rl_iteration, train_step=step, logprob_step=step,
        velocity_step=step,
        samplers=make_segment_samplers(setting), evaluation_samplers={}, greedy_samplers=None,
        redraws=0,
        rewards=rewards, networks={},
        recipe=RECIPES["grpo"], advantage_options=comparison,
        loss_weights=tuple((task, 1.0) for task in UNIFIED), tasks=UNIFIED, alternate_every=0,
        group_size=setting.group, rollout_batch=setting.batch_prompts or setting.prompts,
        num_iterations=1, answer_blocks=choose_answer_blocks(setting),
        max_new_tokens=setting.size.answer, mask_truncated=False, sft=None,
        schedule=learning_rate(Optimizer(), UPDATES), phases=Phases(),
    )  # fmt: skip
