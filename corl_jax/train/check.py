"""Describes a planned run for `--check`: parameters, memory, disk, steps and rewards."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping
from pathlib import Path

from corl_jax.data.dataset import ROWS_CHECKED_AT_START
from corl_jax.errors import InputError
from corl_jax.params import partition
from corl_jax.rewards import applicable
from corl_jax.train import attending
from corl_jax.train.average import has_average
from corl_jax.train.memory import (
    GIB,
    KEPT,
    OPTIMIZER_COPIES,
    PROMPT_OPTIONS,
    WORKING,
    add_up_memory,
    count_parameters,
    describe_counted,
    describe_first_batch,
    estimate_memory,
    measure_prompt_lengths,
)
from corl_jax.train.reference import get_number_bytes, has_reference, is_moving
from corl_jax.train.resolve import ResolvedRun, RunOutline


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
    return "\n".join([*lines, *_explain_estimate(plan, estimate)])


def _explain_estimate(plan: ResolvedRun, estimate: Mapping[str, float]) -> list[str]:
    """Returns what the figures count and leave out, and the command that counts everything."""
    lines = [f"  {describe_counted(plan, estimate)}"]
    if prompts := describe_first_batch(plan):
        lines.append(f"  {prompts}")
    lines.append(
        "  not counted: logits, scores while sampling, decoded images, the compiler's copies"
    )
    if plan.stage.samples:
        lengths = measure_prompt_lengths(plan)
        options = " ".join(f"{PROMPT_OPTIONS[task]} {size}" for task, size in lengths.items())
        lines += [
            "  to compile the programs for the same prompts, and see this estimate beside it:",
            f"  corl-jax plan CONFIG --topology local {options}",
        ]
    return lines


def estimate_disk(plan: ResolvedRun) -> dict[str, float]:
    """Estimates the GiB that the run directory may come to hold."""
    config, shapes = plan.config, plan.family.abstract(plan.sizes)
    trained, _ = partition(shapes, plan.trained)
    master = 2 if config.compat.bfloat16_master else 4
    state = count_parameters(trained) * master * (1 + OPTIMIZER_COPIES[config.optimizer.name])
    if has_reference(plan) and is_moving(config):
        state += count_parameters(trained) * get_number_bytes(config)
    if has_average(config):
        state += count_parameters(trained) * 4
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
    num_held_out = sum(evaluation.rows for evaluation in plan.evaluations)
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
