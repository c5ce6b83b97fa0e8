"""Estimates the memory of a run from shapes: what a device keeps, and what each program adds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax

from corl_jax.algorithms.recipes import RECIPES
from corl_jax.devices.batches import num_batch_shards
from corl_jax.devices.mesh import param_spec
from corl_jax.params import leaf_paths, partition, unflatten
from corl_jax.policies import PolicyFiles
from corl_jax.policies.family import Family
from corl_jax.tasks import CODES, TASKS, TEXT, Turn, name_turns
from corl_jax.train import attending
from corl_jax.train.average import has_average
from corl_jax.train.reference import get_number_bytes, has_own_copy, has_reference
from corl_jax.train.resolve import ResolvedRun, RunOutline
from corl_jax.types import EncodedPrompts, Params
from corl_jax.weights.checkpoint import open_checkpoint
from corl_jax.weights.sources import find_leaf_dtype, list_layers

GIB = 2**30
OPTIMIZER_COPIES = {"adamw": 2, "lion": 1, "adafactor": 0, "sgd": 1}
"""Copies of the trained parameters that each optimizer keeps; adafactor keeps rows and columns."""


PROMPT_OPTIONS = {
    name: "--text-prompt" if turn.segments[-1] == TEXT else "--image-prompt"
    for task in TASKS
    for name, turn in name_turns(task).items()
}
"""Name of a turn -> option of `corl-jax plan` for its prompts' length."""
COMPUTE_COPY = "compute copy"
KEPT = (
    "parameters, trained", "parameters, frozen", "optimizer", "mean of the weights", "reference",
    "reward networks",
)  # fmt: skip
WORKING = {
    "during an update": (
        "gradients",
        COMPUTE_COPY,
        "activations (kept by remat)",
        "attention scores (xla)",
    ),
    "while sampling": (COMPUTE_COPY, "sampling caches (largest task)"),
}
"""Program -> the parts of `estimate_memory` that it needs; a device holds KEPT all the time."""


def count_parameters(params: Params) -> int:
    """Counts the numbers in a tree of shapes or arrays."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def read_stored_dtypes(plan: ResolvedRun) -> dict[str, Any]:
    """Returns the dtype of each parameter in the run's model files, by path."""
    kind, base = plan.family.kind, plan.family.base(plan.sizes)
    with open_checkpoint(plan.model_dir, kind, base) as checkpoint:
        leaves = checkpoint.leaves
        return {
            path: find_leaf_dtype(leaves, path, list_layers(leaves, path, kind.is_stacked(path)))
            for path in leaves.shapes
        }


def _count_frozen(
    outline: RunOutline, frozen: Params, stored: Callable[[str], Any]
) -> tuple[int, int]:
    """Returns (bytes of frozen parameters, how many of them computing copies), on one device."""
    # A frozen parameter keeps the type of its checkpoint. Computing casts it to the compute dtype,
    # and that makes a copy only where the two types differ.
    by_dtype: dict[Any, dict[str, Any]] = {}
    for path, leaf in leaf_paths(frozen):
        by_dtype.setdefault(jax.numpy.dtype(stored(path)), {})[path] = leaf
    # At most 4 bytes: JAX loads a float64 tensor as float32.
    nbytes = sum(
        min(kind.itemsize, 4) * _count_share(unflatten(part), outline.mesh, outline.family)
        for kind, part in by_dtype.items()
    )
    compute = jax.numpy.dtype(outline.config.model.dtype)
    copied = {
        path: leaf
        for kind, part in by_dtype.items()
        for path, leaf in part.items()
        if kind != jax.numpy.dtype(outline.family.compute_dtype(path, compute))
    }
    count = _count_share(unflatten(copied), outline.mesh, outline.family) if copied else 0
    return nbytes, count


def _count_share(params: Params, mesh: Any, family: Family) -> int:
    """Returns the number of parameters that one device holds."""
    total = 0
    for path, leaf in leaf_paths(params):
        spec = param_spec(path, leaf.shape, mesh, family.rules)
        names = [n for axes in spec if axes for n in ((axes,) if isinstance(axes, str) else axes)]
        total += math.prod(leaf.shape) // math.prod(mesh.shape[name] for name in names)
    return total


def estimate_memory(plan: ResolvedRun) -> dict[str, float]:
    """Estimates GiB per device: weights and optimizer exactly, the rest from shapes."""
    stored = read_stored_dtypes(plan)
    # A scorer of the rewards is a further network only for a run that samples.
    networks = _count_network_bytes(plan) if plan.stage.samples else 0
    return estimate_outline(plan, measure_prompt_lengths(plan), stored.__getitem__, networks)


def estimate_outline(
    outline: RunOutline,
    prompts: Mapping[str, int],
    stored: Callable[[str], Any],
    network_bytes: float = 0,
) -> dict[str, float]:
    """Estimates GiB per device as `estimate_memory`, for a model and data that need not be here.

    `prompts` are padded lengths by `tasks.name_turns`. `stored` returns the dtype of a parameter
    in the model's files.
    """
    config, mesh, family = outline.config, outline.mesh, outline.family
    trained, frozen = partition(family.abstract(outline.sizes), outline.trained)
    num_trained = _count_share(trained, mesh, family)
    frozen_bytes, copied = _count_frozen(outline, frozen, stored)
    width = jax.numpy.dtype(config.model.dtype).itemsize
    master = 2 if config.compat.bfloat16_master else 4
    estimate: dict[str, float] = {
        "parameters, trained": num_trained * master,
        "parameters, frozen": frozen_bytes,
        "optimizer": num_trained * master * OPTIMIZER_COPIES[config.optimizer.name],
        "gradients": num_trained * master,
        COMPUTE_COPY: (num_trained + copied) * width,
    }
    if has_average(config):
        estimate["mean of the weights"] = num_trained * 4
    turns = {name: x for task in outline.tasks for name, x in name_turns(task).items()}
    if outline.stage.samples:
        second = has_reference(outline) and has_own_copy(config)
        estimate["reference"] = num_trained * get_number_bytes(config) if second else 0
        estimate["reward networks"] = network_bytes
        # The tasks are sampled one after the other, so only the largest cache counts.
        caches = [
            _count_cache(outline, turn, prompts[name], is_shared=name in TASKS)
            for name, turn in turns.items()
        ]
        estimate["sampling caches (largest task)"] = max(caches) * width
    if outline.stage.uses_language_model:
        lengths = [(x, prompts[name], name in TASKS) for name, x in turns.items()]
        numbers = [_count_activations(outline, *x) for x in lengths]
        estimate["activations (kept by remat)"] = max(numbers) * width
        scores = [_count_scores(outline, *x) for x in lengths]
        estimate["attention scores (xla)"] = max(scores) * 4  # float32
    return {name: size / GIB for name, size in estimate.items()}


def describe_prompts(outline: RunOutline, prompts: Mapping[str, int], source: str) -> str:
    """Returns the padded prompt lengths by task, and their `source`; empty without prompts."""
    names = [name for task in outline.tasks for name in name_turns(task) if name in prompts]
    lengths = ", ".join(f"{name} {prompts[name]:,}" for name in names)
    if not lengths:
        return ""
    limit = f"{outline.config.data.max_prompt_length:,} (data.max_prompt_length)"
    return f"prompts padded to {lengths} tokens, {source}; at most {limit}"


def describe_counted(outline: RunOutline, estimate: Mapping[str, float]) -> str:
    """Returns what an estimate adds up."""
    parts = ["parameters", "optimizer", "gradients", COMPUTE_COPY]
    parts += [name for name in KEPT[3:] if estimate.get(name)]
    if outline.stage.samples:
        parts.append("caches")
    if outline.stage.uses_language_model:
        parts.append(f"activations (remat {outline.config.model.remat})")
        if _writes_scores(outline):
            parts.append("attention scores")
    return f"counted from shapes: {', '.join(parts)}"


def add_up_memory(estimate: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """Returns the GiB that are kept for the whole run, and program -> all GiB while it runs."""
    always_held = sum(size for name, size in estimate.items() if name in KEPT)
    programs = {
        program: always_held + sum(estimate[name] for name in parts if name in estimate)
        for program, parts in WORKING.items()
        # The copy alone is no program: a stage that does not sample has it too.
        if any(name in estimate for name in parts if name != COMPUTE_COPY)
    }
    return always_held, programs


def _count_network_bytes(plan: ResolvedRun) -> int:
    """Counts the bytes of the frozen networks of the rewards on one device."""
    # A scorer is sharded as the policy is. The others are counted whole on each device, which on a
    # mesh with fsdp or tensor is more than they take.
    width = jax.numpy.dtype(plan.config.model.dtype).itemsize
    sizes = [network.nbytes for network in plan.networks if network.policy is None]
    scorers: list[Any] = [network.policy for network in plan.networks if network.policy]
    if any("initial" in reward.scorers for of_task in plan.rewards.values() for reward in of_task):
        base = plan.family.base(plan.sizes)
        scorers.append(PolicyFiles(plan.family, base, plan.processor, plan.model_dir))
    sizes += [
        _count_share(scorer.family.abstract(scorer.sizes), plan.mesh, scorer.family) * width
        for scorer in scorers
    ]
    # Offloaded networks are on the device one at a time.
    return max(sizes, default=0) if plan.config.networks.offload else sum(sizes)


def _count_cache(plan: RunOutline, turn: Turn, prompt: int, *, is_shared: bool) -> int:
    """Counts the numbers in the key and value caches of one device's rows, all layers.

    `is_shared`: completions share their prompt's keys and values, as in the first turn of a task.
    """
    config, limits = plan.config, plan.limits
    prompts = config.rollout.batch_prompts or config.train.prompts_per_step
    # Guidance decodes a second row without the prompt; that of denoising has two tokens.
    if turn.segments[-1] == CODES and config.rollout.cfg_scale != 1 and not plan.family.denoises:
        prompts *= 2
    group = config.rollout.group_size + RECIPES[config.algorithm.name].uses_greedy
    cached = [kind for kind in turn.segments if kind != CODES or limits.caches_codes]
    completion = sum(get_segment_length(plan, kind) for kind in cached)
    if CODES in cached:
        completion += config.rollout.image_window - 1  # the last window may begin at the last code
    # An image by denoising behind a plan: the prompt is copied in front of each plan.
    has_copies = plan.family.denoises and CODES in turn.segments and TEXT in turn.segments
    tokens = prompt * (1 if is_shared and not has_copies else group) + group * completion
    per_token = 2 * limits.layers * limits.kv_heads * limits.head_dim
    share = num_batch_shards(plan.mesh) * plan.mesh.shape["tensor"]
    return prompts * tokens * per_token // share


def measure_prompt_lengths(plan: ResolvedRun) -> dict[str, int]:
    """Returns the padded prompt length of each turn in the first batch; later ones may be longer.

    Keys are those of `tasks.name_turns`.
    """
    encoded = plan.train_loader.batch(0).encoded
    return list_prompt_lengths({task: encoded[task] for task in plan.tasks})


def list_prompt_lengths(encoded: Mapping[str, EncodedPrompts]) -> dict[str, int]:
    """Returns the padded prompt length of each turn of encoded tasks, by `tasks.name_turns`."""
    lengths = {}
    for task, prompts in encoded.items():
        for name in name_turns(task):
            lengths[name] = prompts.input_ids.shape[1]
            prompts = prompts.next or prompts  # the last turn has no next one
    return lengths


def describe_first_batch(plan: ResolvedRun) -> str:
    """Returns `describe_prompts` of the first batch, or of the first rows of a check."""
    source = (
        "as in the first batch" if plan.train_loader.options.shuffle else "as in the first rows"
    )
    return describe_prompts(plan, measure_prompt_lengths(plan), source)


def count_turn_tokens(plan: RunOutline, turn: Turn) -> int:
    """Returns the number of tokens of a turn's longest completion."""
    return sum(get_segment_length(plan, kind) for kind in turn.segments)


def get_segment_length(plan: RunOutline, kind: str) -> int:
    """Returns the number of choices of the longest segment of a kind."""
    return {TEXT: plan.config.rollout.max_new_tokens, CODES: plan.limits.image_tokens}[kind]


def _is_denoised(plan: RunOutline, turn: Turn) -> bool:
    """Returns whether an update scores the steps of images that are made by denoising."""
    return plan.family.denoises and turn.segments[-1] == CODES and plan.stage.compares


def _count_branches(plan: RunOutline, turn: Turn) -> int:
    """Counts how often an update reads a completion: images with guidance twice."""
    if turn.segments[-1] != CODES or not plan.stage.samples:
        return 1
    # The steps of denoising are scored with the guidance that drew them, whatever the option says.
    if plan.family.denoises:
        return 1 + (plan.config.rollout.cfg_scale != 1)
    return 1 + (plan.config.algorithm.image_logprobs == "guided")


def _count_update_prompts(plan: RunOutline) -> int:
    """Counts the prompts of one micro-batch on all devices."""
    return plan.config.train.micro_batch or plan.config.train.prompts_per_step


def _count_update_rows(plan: RunOutline) -> int:
    """Counts the completions of one micro-batch on all devices."""
    return _count_update_prompts(plan) * (
        plan.config.rollout.group_size if plan.stage.samples else 1
    )


def _count_step_rows(plan: RunOutline) -> int:
    """Counts the trained steps of the images of one micro-batch, each of which is read."""
    denoising = plan.config.denoising
    return _count_update_rows(plan) * (denoising.window or denoising.steps)


def _count_read_prompts(plan: RunOutline, is_shared: bool) -> int:
    """Counts the prompts that one branch of a micro-batch reads, on all devices.

    `is_shared`: completions share their prompt, as in the first turn of a task.
    """
    return _count_update_prompts(plan) if is_shared else _count_update_rows(plan)


def _count_read_tokens(plan: RunOutline, turn: Turn, prompt: int, is_shared: bool) -> int:
    """Counts the tokens that the update of one micro-batch reads on all devices."""
    tokens, rows = count_turn_tokens(plan, turn), _count_update_rows(plan)
    branches, prompts = _count_branches(plan, turn), _count_read_prompts(plan, is_shared)
    if not _is_denoised(plan, turn):
        return branches * (prompts * prompt + rows * tokens)
    # Steps are read behind prompts that are read once; without the prompt, behind two tokens.
    image = plan.limits.image_tokens
    read = _count_step_rows(plan) * branches * image + rows * (tokens - image)
    return prompts * prompt + read


def _count_activations(plan: RunOutline, turn: Turn, prompt: int, is_shared: bool) -> int:
    """Counts the numbers that the backward pass keeps: with remat `full` each layer's input."""
    limits = plan.limits
    wide = 3 * limits.inner_width + 4 * limits.width
    inner_numbers = {"full": 0, "dots": wide, "none": 2 * wide}[plan.config.model.remat]
    numbers = _count_read_tokens(plan, turn, prompt, is_shared) * limits.layers
    return numbers * (limits.width + inner_numbers) // num_batch_shards(plan.mesh)


def _writes_scores(plan: RunOutline) -> bool:
    """Returns whether the update's attention writes its scores to memory: only `xla` does."""
    return attending.choose_update_kernel(plan.config, plan.limits.head_dim, plan.mesh) == "xla"


def _count_scores(plan: RunOutline, turn: Turn, prompt: int, is_shared: bool) -> int:
    """Counts the attention scores that `xla` writes out: of one layer, with remat `none` of all."""
    if not _writes_scores(plan):
        return 0
    limits, tokens = plan.limits, count_turn_tokens(plan, turn)
    keeps_all = plan.config.model.remat == "none"
    branches, pairs = _count_branches(plan, turn), _count_read_prompts(plan, is_shared) * prompt**2
    if _is_denoised(plan, turn):
        # Each step sees the prompt and its own tokens alone. One branch follows the other.
        pairs += _count_step_rows(plan) * tokens * (prompt + tokens) * (branches**keeps_all)
    else:
        pairs += _count_update_rows(plan) * tokens * (prompt + tokens)
        pairs *= branches
    numbers = pairs * limits.heads * (limits.layers if keeps_all else 1)
    return numbers // (num_batch_shards(plan.mesh) * plan.mesh.shape["tensor"])
