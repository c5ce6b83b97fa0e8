"""Measures whole steps in the shape of published recipes: rollout, pixels, rewards, update.

All parameters are trained in T2I-R1's shape (arXiv 2505.00703: Janus-Pro-7B, 16 prompts with 8
images, KL divergence from the first policy; three CLIPs stand in for its HPS, GIT and
GroundingDINO, and one GPU for its eight), adapters in that of UniRL's recipe of Janus-Pro (rank 16,
8 prompts with 4 images, PickScore):

    export XLA_PYTHON_CLIENT_MEM_FRACTION=0.95
    python -m tools.bench --size 7b --parts recipe --prompts 16 --micro-batch 1 --batch-prompts 8
    python -m tools.bench --size 7b --parts recipe --prompts 8 --group 4 --lora 16

both with `--peer transformers --repeats 2`. T2I-R1 also writes a plan before each image: `--plan
128` gives it as many tokens, all sampled, scored and trained; without the option there are none.

Memory of 7B, all parameters, GiB: parameters 12.9 in bfloat16, Adam 25.7, the reference 12.9,
frozen parameters 0.9, three reward networks in float32 11: 63.4 are kept. Gradients take 12.9, and
the same again with micro-batches. Keys and values of 64 guided images take 36, the fused layers of
sampling 12. In float32 parameters, moments and gradients alone are 103, their copy in bfloat16 and
the reference 26 more, and the sum of micro-batches another 26: more than the 139 of an H200. So
PyTorch and this project both train bfloat16 parameters with bfloat16 moments, as with
`compat.bfloat16_master`. Adapters are float32 in both.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from corl_jax.algorithms.losses import LossConstants
from corl_jax.devices.mesh import param_shardings
from corl_jax.devices.offload import Offloadable
from corl_jax.policies.turns import bind_sampler
from corl_jax.rewards import registry
from corl_jax.tasks import TASKS, name_segments
from corl_jax.train.iteration import rl_iteration
from corl_jax.train.run import Run
from corl_jax.train.step import TrainState, UpdateOptions, make_logprob_step
from corl_jax.types import EncodedPrompts, Params, Prompts
from tools.bench import inputs, training
from tools.bench.generation import make_sampling_options
from tools.bench.scoring import Networks
from tools.bench.setting import Setting
from tools.bench.sizes import Size
from tools.bench.timing import Record

PART, NAME = "recipe", "whole step"
PHASES = ("rollout", "reward", "update")
SAME = (
    "shapes, prompts, codes of an image, guidance, images resized on the device, reward networks "
    "with TF32, "
    "group advantages, clipped loss, clipping by global norm, AdamW, checkpointed layers, "
    "micro-batches, prompts sampled at once"
)
DIFFERENT = (
    "prompts are read once for their group here, once for each image in PyTorch, which also reads "
    "a plan anew before its image; codes become pixels in float32 here, in bfloat16 in PyTorch; "
    "without plans AdamW moves the unused lm_head here, and skips it in PyTorch"
)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a step does, beside the numbers of prompts and images and the size of the model."""

    source: str
    rewards: tuple[str, ...]  # of images, each with one CLIP
    kl_coef: float  # of the divergence from the first policy; 0: there is no reference
    bfloat16_master: bool  # parameters and moments in bfloat16; else float32
    unlike: str  # what the publication does in another way


FULL = Recipe(
    "T2I-R1", ("hpsv2", "pickscore", "t2i_clip_reward"), 0.01, bfloat16_master=True,
    unlike="rewards by HPS, GIT and GroundingDINO, not by three CLIPs; parameters split over 8 "
    "GPUs; a plan before each image (--plan)",
)  # fmt: skip
ADAPTERS = Recipe(
    "UniRL", ("pickscore",), 0.0, bfloat16_master=False,
    unlike="draws one image after another; log-probs under guidance, old ones computed anew",
)  # fmt: skip


def choose_recipe(has_adapters: bool) -> Recipe:
    """Returns the recipe: T2I-R1's for all parameters, UniRL's for adapters."""
    return ADAPTERS if has_adapters else FULL


def list_networks(recipe: Recipe) -> tuple[str, ...]:
    """Returns the reward networks of a recipe."""
    bound = [registry.bind_reward(name, {}) for name in recipe.rewards]
    return tuple(dict.fromkeys(name for reward in bound for name in reward.networks))


def name_task(plan: int) -> str:
    """Returns the task of a recipe whose plans have so many tokens."""
    return "think" if plan else "t2i"


def make_encoded_prompts(size: Size, special: Any, count: int, plan: int) -> EncodedPrompts:
    """Returns the prompts of images; those of plans end before the token that begins an image."""
    prompts = inputs.make_image_prompts(size, special, count, size.image_prompt)
    if not plan:
        return prompts
    return EncodedPrompts(prompts.input_ids[:, :-1], prompts.attention_mask[:, :-1])


def make_texts(prompts: int) -> list[str]:
    """Returns the prompts that the reward networks read."""
    return inputs.make_rows(prompts, 1)["prompt"]


def describe_steps(
    steps: Sequence[dict[str, float]], completions: int, devices: int = 1
) -> dict[str, float]:
    """Returns the figures of steps, each {phase: seconds}: medians, rates, and hours of devices."""
    phases = {f"{name}_s": statistics.median(step[name] for step in steps) for name in PHASES}
    whole = statistics.median(sum(step.values()) for step in steps)
    return phases | {
        "images_per_s": completions / whole,
        "s_per_image": whole / completions,
        "gpu_hours_per_1000_steps": 1000 * whole * devices / 3600,
    }


def announce_step(who: str, number: int, phases: dict[str, float]) -> None:
    """Prints the seconds of a step on stderr, so that a later time limit does not lose them."""
    parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in phases.items())
    print(
        f"{who}, step {number}: {sum(phases.values()):.2f} s ({parts})", file=sys.stderr, flush=True
    )


def measure_recipe(setting: Setting) -> Iterator[Record]:
    """Measures whole steps of GRPO on images, with reward networks; see above.

    Phases: `rollout` draws codes; `reward` makes pixels, runs the networks and compares; `update`
    computes the reference's log-probs, gradients and AdamW's step. Hours are those of all devices.
    """
    recipe = choose_recipe(setting.has_adapters)
    yield Record(PART, "setting", None, describe_setting(setting, recipe), memory={})
    options = make_update_options(setting, recipe)
    master = jnp.bfloat16 if recipe.bfloat16_master else jnp.float32
    state, frozen, step = training.start_training(setting, options, master)
    run = make_run(setting, recipe, options, state, frozen, step)
    prompts, steps = make_row_prompts(setting), list[dict[str, float]]()

    def take_step() -> Any:
        nonlocal state
        state, done = rl_iteration(run, state, prompts, len(steps))
        seconds = run.phases.take()
        steps.append({name: seconds[f"phase/{name}_seconds"] for name in PHASES})
        announce_step("here", len(steps), steps[-1])
        return done.metrics

    timing = setting.measure(PART, take_step)
    # The first step compiles; one behind the others may have been profiled.
    figures: dict[str, Any] = describe_steps(
        steps[1 : 1 + setting.repeats], setting.completions, setting.mesh.size
    )
    figures |= {"programs": step._cache_size(), "attention": setting.attention}
    yield Record(PART, NAME, timing, figures)


def describe_setting(setting: Setting, recipe: Recipe) -> dict[str, Any]:
    """Returns what is measured, and what PyTorch does in the same and in another way."""
    master = "bfloat16" if recipe.bfloat16_master else "float32"
    return {
        "recipe": recipe.source,
        "shape": f"{setting.prompts} x {setting.group} images",
        "trained": "adapters" if setting.has_adapters else "all parameters",
        "parameters_and_moments": master,
        "rewards": "+".join(recipe.rewards),
        "kl_coef": recipe.kl_coef,
        "plan": setting.plan,
        "micro_batch": setting.micro_batch or setting.prompts,
        "batch_prompts": setting.batch_prompts or setting.prompts,
        "remat": setting.remat,
        "same": SAME,
        "different": DIFFERENT,
        "unlike_publication": recipe.unlike,
    }


def make_update_options(setting: Setting, recipe: Recipe) -> UpdateOptions:
    """Returns the update options of the recipe: images with their plans, its KL penalty."""
    options = training.make_update_options(setting)
    scoring = options.logprobs
    if setting.plan:  # random plans have all their tokens: no token ends them
        scoring = dataclasses.replace(scoring, special=setting.endless)
    return dataclasses.replace(
        options, constants=LossConstants(kl_coef=recipe.kl_coef), logprobs=scoring,
        weights=weigh_segments(setting),
    )  # fmt: skip


def weigh_segments(setting: Setting) -> tuple[tuple[str, float], ...]:
    """Returns the weight of the loss of plans and images: 1."""
    task = name_task(setting.plan)
    return tuple((name, 1.0) for name in name_segments(task, TASKS[task].segments))


def make_run(
    setting: Setting, recipe: Recipe, options: UpdateOptions, state: TrainState, frozen: Params,
    step: Any,
) -> Run:  # fmt: skip
    """Returns a Run of images, with the rewards of the recipe and their random networks."""
    family, policy, task = setting.size.family, setting.size.policy, name_task(setting.plan)
    networks = Networks(setting, list_networks(recipe))
    placement = next(networks.yield_placements())
    reference = None
    if recipe.kl_coef:
        copied = jax.tree.map(jnp.copy, state.params)  # the step takes over those of the state
        reference = Offloadable(copied, param_shardings(copied, setting.mesh, family.rules))
    rewards = [registry.bind_reward(name, {}) for name in recipe.rewards]
    run = training.make_run(setting, frozen, step)
    assert run.advantage_options is not None
    comparison = dataclasses.replace(
        run.advantage_options, reward_weights=((task, (1.0,) * len(rewards)),)
    )
    sampling = make_sampling_options(setting, task, max_new_tokens=setting.plan or 1)
    sampler = bind_sampler(family.turns[TASKS[task].turn_kinds].sample, policy, sampling)
    return dataclasses.replace(
        run, tasks=(task,), rewards={task: rewards}, networks=placement, reference=reference,
        logprob_step=make_logprob_step(family, policy, options), advantage_options=comparison,
        loss_weights=weigh_segments(setting), samplers={task: sampler},
    )  # fmt: skip


def make_row_prompts(setting: Setting) -> Prompts:
    """Returns random prompts, with the texts that the reward networks read."""
    columns = {"prompt": make_texts(setting.prompts)}
    size, special, plan = setting.size, setting.processor.special, setting.plan
    encoded = make_encoded_prompts(size, special, setting.prompts, plan)
    return Prompts(np.arange(setting.prompts), columns, {name_task(plan): encoded})
