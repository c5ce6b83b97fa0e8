"""Describes a planned run for `--check`: parameters, memory, disk, steps and rewards."""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from corl_jax.data.dataset import ROWS_CHECKED_AT_START
from corl_jax.devices.batches import num_batch_shards
from corl_jax.devices.mesh import param_spec
from corl_jax.errors import InputError
from corl_jax.params import leaf_paths, partition, unflatten
from corl_jax.policies import PolicyFiles
from corl_jax.policies.family import Family
from corl_jax.rewards import applicable
from corl_jax.tasks import CODES, TASKS, TEXT
from corl_jax.train import attending
from corl_jax.train.resolve import ResolvedRun, RunOutline
from corl_jax.types import Params
from corl_jax.weights.checkpoint import open_checkpoint
from corl_jax.weights.sources import find_leaf_dtype, list_layers

GIB = 2**30
OPTIMIZER_COPIES = {"adamw": 2, "lion": 1, "adafactor": 0, "sgd": 1}
"""Copies of the trained parameters that each optimizer keeps; adafactor keeps rows and columns."""


PROMPT_OPTIONS = {
    name: "--text-prompt" if task.makes_text else "--image-prompt" for name, task in TASKS.items()
}
"""Task -> option of `python -m corl_jax.plan` for its prompts' length."""
COMPUTE_COPY = "compute copy"
KEPT = (
    "parameters, trained", "parameters, frozen", "optimizer", "reference", "reward networks",
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


def describe(plan: ResolvedRun) -> str:
    """Returns the report as text."""
    sections = [
        _format_parameters(plan),
        _format_memory(plan),
        _format_disk(plan),
        _format_steps(plan),
    ]
    if any(plan.rewards.values()):
        sections.append(_format_rewards(plan))
    sections += [f"warning: {line}" for line in describe_inapplicable_rewards(plan)]
    return "\n\n".join(sections)


def describe_inapplicable_rewards(plan: ResolvedRun) -> list[str]:
    """Returns a line for each reward that can score none of the first training rows."""
    source, rows = plan.train_loader.source, []
    for row in range(min(ROWS_CHECKED_AT_START, len(source))):
        with contextlib.suppress(InputError):  # a row that cannot be read gives way to another
            rows.append(source[row])
    bound_rewards = [reward for of_task in plan.rewards.values() for reward in of_task]
    return applicable.find_inapplicable_rewards(bound_rewards, rows)


def count_parameters(params: Params) -> int:
    """Counts the numbers in a tree of shapes or arrays."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def _format_parameters(plan: ResolvedRun) -> str:
    shapes, lora = plan.family.abstract(plan.sizes), plan.config.lora
    trained, _ = partition(shapes, plan.trained)
    lines = [f"model: {plan.model_dir}", f"  {'part':24}{'parameters':>16}{'trained':>16}"]
    for part, tree in shapes.items():
        numbers = count_parameters(tree), count_parameters(trained.get(part, {}))
        lines.append(f"  {part:24}{numbers[0]:>16,}{numbers[1]:>16,}")
    lines.append(f"  {'total':24}{count_parameters(shapes):>16,}{count_parameters(trained):>16,}")
    if lora.rank:
        lines.append(
            f"  trained: adapters of rank {lora.rank}, alpha {lora.alpha:g}, on "
            f"{', '.join(plan.family.lora_of(plan.sizes).targets)}"
        )
    if chosen := describe_attention(plan):
        lines.append(f"  {chosen}")
    return "\n".join(lines)


def describe_attention(plan: RunOutline) -> str:
    """Returns a line about the attention kernels; empty for the image tokenizer's stage."""
    if not plan.stage.uses_language_model:
        return ""
    where = plan.config, plan.limits.head_dim, plan.mesh
    update = attending.choose_update_kernel(*where)
    sampler = attending.choose_sampler_kernel(*where) if plan.stage.samples else update
    both = update if update == sampler else f"{update} in updates, {sampler} in samplers"
    return f"attention: {both}"


def _count_frozen(plan: ResolvedRun, frozen: Params) -> tuple[int, int]:
    """Returns (bytes of frozen parameters, how many of them computing copies), on one device."""
    # A frozen parameter keeps the type of its checkpoint. Computing casts it to the compute dtype,
    # and that makes a copy only where the two types differ.
    by_dtype: dict[Any, dict[str, Any]] = {}
    base = plan.family.base(plan.sizes)
    with open_checkpoint(plan.model_dir, plan.family.kind, base) as checkpoint:
        leaves = checkpoint.leaves
        for path, leaf in leaf_paths(frozen):
            layers = list_layers(leaves, path, plan.family.kind.is_stacked(path))
            by_dtype.setdefault(find_leaf_dtype(leaves, path, layers), {})[path] = leaf
    # At most 4 bytes: JAX loads a float64 tensor as float32.
    stored = sum(
        min(kind.itemsize, 4) * _count_share(unflatten(part), plan.mesh, plan.family)
        for kind, part in by_dtype.items()
    )
    compute = jax.numpy.dtype(plan.config.model.dtype)
    copied = {
        path: leaf
        for kind, part in by_dtype.items()
        for path, leaf in part.items()
        if kind != jax.numpy.dtype(plan.family.compute_dtype(path, compute))
    }
    return stored, _count_share(unflatten(copied), plan.mesh, plan.family) if copied else 0


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
    config, mesh = plan.config, plan.mesh
    shapes = plan.family.abstract(plan.sizes)
    trained, frozen = partition(shapes, plan.trained)
    num_trained = _count_share(trained, mesh, plan.family)
    frozen_bytes, copied = _count_frozen(plan, frozen)
    prompts = measure_prompt_lengths(plan)
    width = jax.numpy.dtype(config.model.dtype).itemsize
    master = 2 if config.compat.bfloat16_master else 4
    estimate = {
        "parameters, trained": num_trained * master,
        "parameters, frozen": frozen_bytes,
        "optimizer": num_trained * master * OPTIMIZER_COPIES[config.optimizer.name],
        "gradients": num_trained * master,
        COMPUTE_COPY: (num_trained + copied) * width,
    }
    if plan.stage.samples:
        # With adapters the reference is what is frozen.
        second = config.algorithm.kl_coef and not config.lora.rank
        estimate["reference"] = num_trained * width if second else 0
        estimate["reward networks"] = _count_network_bytes(plan)
        # The tasks are sampled one after the other, so only the largest cache counts.
        caches = [_count_cache(plan, task, prompt) for task, prompt in prompts.items()]
        estimate["sampling caches (largest task)"] = max(caches) * width
    if plan.stage.uses_language_model:
        activations = [_count_activations(plan, task, prompt) for task, prompt in prompts.items()]
        estimate["activations (kept by remat)"] = max(activations) * width
        scores = [_count_scores(plan, task, prompt) for task, prompt in prompts.items()]
        estimate["attention scores (xla)"] = max(scores) * 4  # float32
    return {name: size / GIB for name, size in estimate.items()}


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


def _count_cache(plan: ResolvedRun, task: str, prompt: int) -> int:
    """Counts the numbers in the key and value caches of one device's rows, all layers."""
    config, limits = plan.config, plan.limits
    rows = (config.rollout.batch_prompts or config.train.prompts_per_step) * (
        config.rollout.group_size
    )
    if not TASKS[task].makes_text and config.rollout.cfg_scale != 1:
        rows *= 2  # guidance decodes a second row without the prompt
    length = prompt + get_completion_length(plan, task)
    per_token = 2 * limits.layers * limits.kv_heads * limits.head_dim
    return rows * length * per_token // (num_batch_shards(plan.mesh) * plan.mesh.shape["tensor"])


def measure_prompt_lengths(plan: ResolvedRun) -> dict[str, int]:
    """Returns each task's padded prompt length in the first batch; later ones may be longer."""
    batch = plan.train_loader.batch(0)
    return {task: batch.encoded[task].input_ids.shape[1] for task in plan.tasks}


def get_completion_length(plan: RunOutline, task: str) -> int:
    """Returns the number of tokens of a task's longest completion, all segments together."""
    return sum(get_segment_length(plan, kind) for kind in TASKS[task].turn.segments)


def get_segment_length(plan: RunOutline, kind: str) -> int:
    """Returns the number of choices of the longest segment of a kind."""
    return {TEXT: plan.config.rollout.max_new_tokens, CODES: plan.limits.image_tokens}[kind]


def _count_update_rows(plan: ResolvedRun, task: str) -> int:
    """Counts the rows of one micro-batch on all devices; guided log-probs need two per image."""
    config = plan.config
    if not plan.stage.samples:
        return config.train.micro_batch or config.train.prompts_per_step
    guided = not TASKS[task].makes_text and config.algorithm.image_logprobs == "guided"
    rows = (config.train.micro_batch or config.train.prompts_per_step) * config.rollout.group_size
    return rows * (1 + guided)


def _count_activations(plan: ResolvedRun, task: str, prompt: int) -> int:
    """Counts the numbers that the backward pass keeps: with remat `full` each layer's input."""
    limits = plan.limits
    wide = 3 * limits.inner_width + 4 * limits.width
    inner_numbers = {"full": 0, "dots": wide, "none": 2 * wide}[plan.config.model.remat]
    length = prompt + get_completion_length(plan, task)
    numbers = length * limits.layers * (limits.width + inner_numbers)
    return _count_update_rows(plan, task) * numbers // num_batch_shards(plan.mesh)


def _count_scores(plan: ResolvedRun, task: str, prompt: int) -> int:
    """Counts the attention scores that `xla` writes out: of one layer, with remat `none` of all."""
    if attending.choose_update_kernel(plan.config, plan.limits.head_dim, plan.mesh) != "xla":
        return 0
    limits = plan.limits
    layers = limits.layers if plan.config.model.remat == "none" else 1
    numbers = layers * limits.heads * (prompt + get_completion_length(plan, task)) ** 2
    return (
        _count_update_rows(plan, task)
        * numbers
        // (num_batch_shards(plan.mesh) * plan.mesh.shape["tensor"])
    )


def _format_memory(plan: ResolvedRun) -> str:
    """Returns the table of memory: what a device always holds, and what each program adds."""
    estimate = estimate_memory(plan)
    always_held, programs = add_up_memory(estimate)
    lines = [
        f"memory of each of {plan.mesh.size} device(s), GiB",
        "  kept for the whole run, exact",
    ]
    for name, size in estimate.items():
        if name in KEPT:
            lines.append(f"    {name:32}{size:>10.2f}")
    lines.append(f"    {'sum':32}{always_held:>10.2f}")
    for program, total in programs.items():
        sizes = {name: estimate[name] for name in WORKING[program] if name in estimate}
        lines.append(f"  {program}, at least")
        lines += [f"    {name:32}{size:>10.2f}" for name, size in sizes.items()]
        lines.append(f"    {'with what is kept':32}{total:>10.2f}")
    return "\n".join([*lines, *_explain_uncounted(plan)])


def _explain_uncounted(plan: ResolvedRun) -> list[str]:
    """Returns what the figures leave out, and the command that compiles and counts everything."""
    missing = "  not counted: logits, scores while sampling, decoded images, the compiler's copies"
    if not plan.stage.samples:
        return [missing]
    lengths = measure_prompt_lengths(plan)
    shown = ", ".join(f"{task} {tokens}" for task, tokens in lengths.items())
    options = " ".join(f"{PROMPT_OPTIONS[task]} {tokens}" for task, tokens in lengths.items())
    return [
        f"  padded prompts as in the first batch, in tokens: {shown}; of at most "
        f"{plan.config.data.max_prompt_length:,} (data.max_prompt_length)",
        missing,
        "  to count all but the reward networks, for the same prompts, compile the programs:",
        f"  python -m corl_jax.plan --config FILE --topology local {options}",
    ]


def estimate_disk(plan: ResolvedRun) -> dict[str, float]:
    """Estimates the GiB that the run directory may come to hold."""
    config, shapes = plan.config, plan.family.abstract(plan.sizes)
    trained, _ = partition(shapes, plan.trained)
    master = 2 if config.compat.bfloat16_master else 4
    state = count_parameters(trained) * master * (1 + OPTIMIZER_COPIES[config.optimizer.name])
    estimate = {}
    if config.checkpoint.directory is None:
        name = f"checkpoints, {config.checkpoint.keep} and one being written"
        # The oldest one is removed only when the new one is whole.
        estimate[name] = (config.checkpoint.keep + 1) * state / GIB
    if config.export.layout != "none":
        exported = trained if config.export.lora == "adapter" else shapes
        size = count_parameters(exported) * 4 / GIB  # float32 at most
        replaces = (Path(config.output_dir) / "export").exists()
        estimate["export, beside the one it replaces" if replaces else "export"] = size * (
            1 + replaces
        )
    return estimate


def _measure_free_gib(plan: ResolvedRun) -> float:
    """Returns the GiB free where the run directory is or will be."""
    folder = Path(plan.config.output_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free / GIB


def explain_disk_shortage(plan: ResolvedRun) -> str | None:
    """Returns a line if the disk may become full during the run; None if there is room."""
    needed, free = sum(estimate_disk(plan).values()), _measure_free_gib(plan)
    # The estimate includes the files that a resumed run has written already.
    for path in Path(plan.config.output_dir).rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # the first process may write and rename
            free += path.stat().st_size * path.is_file() / GIB
    if needed <= free:
        return None
    return (
        f"{plan.config.output_dir} may come to hold {needed:.3g} GiB and has room for "
        f"{free:.3g} GiB; make room, lower checkpoint.keep, or name another output_dir"
    )


def _format_disk(plan: ResolvedRun) -> str:
    estimate = estimate_disk(plan)
    lines = [f"disk, at most, with {_measure_free_gib(plan):,.2f} GiB free: GiB"]
    lines += [f"  {name:40}{size:>10.2f}" for name, size in estimate.items()]
    return "\n".join([*lines, f"  {'sum':40}{sum(estimate.values()):>10.2f}"])


def _format_steps(plan: ResolvedRun) -> str:
    train = plan.config.train
    num_held_out = len(plan.eval_loader.source) if plan.eval_loader else 0
    return "\n".join([
        f"data: {len(plan.train_loader.source):,} rows to train on, {num_held_out:,} held out",
        f"steps: {plan.steps:,} of {train.prompts_per_step} prompts in {plan.micro_batches} "
        f"micro-batch(es), {plan.optimizer_steps:,} optimizer steps",
        f"mesh: {dict(plan.mesh.shape)} on {plan.mesh.devices.flat[0].platform}",
    ])  # fmt: skip


def _format_rewards(plan: ResolvedRun) -> str:
    lines = ["rewards:", f"  {'reward':28}{'task':8}{'weight':>8}  networks"]
    for task, of_task in plan.rewards.items():
        for reward in of_task:
            networks = ", ".join((*reward.networks, *reward.scorers)) or "none"
            lines.append(f"  {reward.name:28}{task:8}{reward.weight:>8g}  {networks}")
    if plan.networks:
        place = "host memory between uses" if plan.config.networks.offload else "every device"
        scorers = any(network.policy for network in plan.networks)
        note = ", scorers sharded as the policy" if scorers else ""
        lines.append(f"reward networks, in {place}{note}:")
        lines.append(f"  {'network':16}{'parameters':>16}{'MiB':>10}  weights")
        lines += [
            f"  {row.name:16}{row.parameters:>16,}{row.nbytes / 2**20:>10,.0f}  {row.path}"
            for row in plan.networks
        ]
    return "\n".join(lines)
