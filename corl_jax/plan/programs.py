"""Lists the programs of a GRPO iteration: the functions of a run, with shapes as inputs.

Parameters, optimizer state and batches are ShapeDtypeStructs with the shardings of a run; no array
is made.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from corl_jax.data.columns import IMAGE_COLUMN
from corl_jax.devices.mesh import attach_shardings, batch_sharding, param_shardings
from corl_jax.params import merge, partition
from corl_jax.policies.choices import split_steps
from corl_jax.policies.family import NOISE_KEYS
from corl_jax.tasks import LATENTS, TASKS, TEXT, image_tasks, name_turns
from corl_jax.train import build, states
from corl_jax.train.average import start_average
from corl_jax.train.image_codes import reads_codes
from corl_jax.train.memory import count_turn_tokens, get_segment_length
from corl_jax.train.optimizer import master_dtype
from corl_jax.train.reference import cast_reference, has_own_copy, has_reference
from corl_jax.train.resolve import RunOutline
from corl_jax.train.step import Batch, TaskBatch, TrainState
from corl_jax.types import EncodedPrompts, Params, Segment


@dataclasses.dataclass(frozen=True)
class Program:
    """One jitted function of the iteration with the shapes of its inputs."""

    name: str
    function: Any  # jitted
    resident: tuple  # inputs that stay on the device between programs
    inputs: tuple  # the others
    calls: float = 1  # in an iteration; the mean of both where tasks take turns
    rounds: int = 1  # most rounds of a loop whose end depends on sampled tokens

    def lower(self) -> Any:
        """Lowers the program; call it within `jax.set_mesh`."""
        return self.function.lower(*self.resident, *self.inputs)


@dataclasses.dataclass(frozen=True)
class ResidentArrays:
    """Shapes of the arrays that stay on the devices for the whole run."""

    state: TrainState
    frozen: Params
    reference: Params | None
    average: Params | None = None  # of the trained parameters over steps

    def by_name(self) -> dict[str, Any]:
        """Returns the arrays by the name that tables print."""
        return {
            "trained parameters": self.state.params,
            "optimizer": self.state.opt_state,
            "frozen parameters": self.frozen,
            "reference": self.reference,
            "mean of the weights": self.average,
        }


def count_shard_bytes(tree: Any) -> int:
    """Counts the bytes of one device for shapes with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def make_resident_arrays(
    outline: RunOutline, stored: Any = jnp.bfloat16
) -> tuple[ResidentArrays, Any, TrainState]:
    """Returns (resident arrays, optimizer, shardings of the state), as `build.build` lays them out.

    `stored` is the dtype of the model's files, in which frozen parameters stay.
    """
    config, mesh = outline.config, outline.mesh
    parts = partition(outline.family.abstract(outline.sizes), outline.trained)
    master = master_dtype(config.compat.bfloat16_master)
    trained, frozen = (
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), part)  # noqa: B023
        for part, dtype in zip(parts, (master, stored), strict=True)
    )
    optimizer = states.make_plan_optimizer(outline)
    shardings = states.state_shardings(optimizer, trained, mesh, outline.family.rules)
    fresh = TrainState(
        jax.ShapeDtypeStruct((), jnp.int32), trained, jax.eval_shape(optimizer.init, trained)
    )
    reference = None
    if has_reference(outline):
        cast = functools.partial(cast_reference, config, outline.family)
        where = shardings.params if has_own_copy(config) else {}
        reference = attach_shardings(jax.eval_shape(cast, trained), where)
    average = jax.eval_shape(functools.partial(start_average, config), trained)
    average = average and attach_shardings(average, shardings.params)
    frozen = attach_shardings(frozen, param_shardings(frozen, mesh, outline.family.rules))
    return (
        ResidentArrays(attach_shardings(fresh, shardings), frozen, reference, average),
        optimizer,
        shardings,
    )


def make_prompts(
    outline: RunOutline, task: str, count: int, lengths: Mapping[str, int]
) -> EncodedPrompts:
    """Returns shapes of `count` prompts of all turns, with pixels for questions about real images.

    `lengths` are padded lengths by `tasks.name_turns`.
    """
    side = outline.limits.input_image_side
    shape = functools.partial(jax.ShapeDtypeStruct, sharding=batch_sharding(outline.mesh))
    encoded = None
    for name in reversed(name_turns(task)):
        has_image = name == task and IMAGE_COLUMN in TASKS[task].columns
        encoded = EncodedPrompts(
            shape((count, lengths[name]), jnp.int32),
            shape((count, lengths[name]), jnp.bool_),
            shape((count, side, side, 3), jnp.float32) if has_image else None,
            encoded,
        )
    assert encoded is not None  # every task has a turn
    return encoded


def make_batch(
    outline: RunOutline, tasks: Sequence[str], lengths: dict[str, int], extra: tuple[str, ...]
) -> Batch:
    """Returns shapes of an update's batch; `extra` names further log-probs that it needs."""
    config = outline.config
    count = config.train.prompts_per_step
    rows = count * config.rollout.group_size
    shape = functools.partial(jax.ShapeDtypeStruct, sharding=batch_sharding(outline.mesh))
    # Supervised stages learn without the sampler's log-probs, and without advantages.
    compares = outline.stage.compares

    def prepare_for_learning(segment: Segment) -> Segment:
        if segment.kind == TEXT:
            return dataclasses.replace(segment, logprobs=None, replay={})
        bits = jax.random.key_data(jax.random.key(0))
        noise = {NOISE_KEYS: shape((rows, *bits.shape), bits.dtype)}
        # Latents of data are scored at one time, codes one by one.
        mask = shape(segment.values.shape[:2], jnp.bool_)
        return Segment(segment.kind, segment.values, mask, replay=segment.replay | noise)

    samplers, params = build.make_samplers(outline), outline.family.abstract(outline.sizes)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))

    def make_task(task: str) -> TaskBatch:
        prompts = make_prompts(outline, task, count, lengths)
        # Only the sampler knows what it records for scoring.
        sampled = jax.eval_shape(samplers[task], params, prompts, keys)
        segments = tuple(
            segment if compares else prepare_for_learning(segment)
            for segment in attach_shardings(sampled, batch_sharding(outline.mesh))
        )
        further = {name: _make_scores(name, segments, shape) for name in extra}
        if reads_codes(outline.family, outline.sizes):  # before the update, as in training
            prompts = dataclasses.replace(prompts, pixel_values=None)
        return TaskBatch(
            prompts,
            segments,
            shape((rows,), jnp.float32) if compares else None,
            turns=TASKS[task].turn_kinds,
            **further,
        )

    return {task: make_task(task) for task in tasks}


def _make_scores(name: str, segments: Sequence[Segment], shape: Any) -> tuple[Any, ...]:
    """Returns shapes of the scores of segments by a field of `TaskBatch`."""
    has_velocities = name == "ref_velocities"
    # The reference's velocities of a step are as large as the image; its log-probs are not used.
    return tuple(
        None
        if name != "old_logprobs" and has_velocities != (segment.kind == LATENTS)
        else shape(
            (*segment.mask.shape, *(segment.values.shape[2:] if has_velocities else ())),
            jnp.float32,
        )
        for segment in segments
    )


def _make_image_values(segments: Sequence[Segment], count: int) -> Any:
    """Returns the shape of `count` images as a family's `decode_images` takes them."""
    # Only the sampler knows whether these are codes or latents, and how many of an image it keeps.
    values = next(segment.values for segment in segments if segment.kind != TEXT)
    return jax.ShapeDtypeStruct((count, *values.shape[1:]), values.dtype)


def _count_rounds(outline: RunOutline, task: str) -> int:
    """Returns the most rounds of the loop in which a task samples a text."""
    if TASKS[task].has_plan:  # the last token is read as well, because an image follows it
        return split_steps(get_segment_length(outline, TEXT))[0]
    # The prefill gives the first token, so the loop makes one fewer.
    return split_steps(count_turn_tokens(outline, TASKS[task].turns[-1]) - 1)[0]


def make_programs(
    outline: RunOutline, lengths: dict[str, int], stored: Any = jnp.bfloat16
) -> tuple[ResidentArrays, list[Program]]:
    """Returns the resident arrays and the programs of an iteration in order, without rewards.

    `lengths` are the padded lengths of each turn's prompts. `stored` is the dtype of the model's
    files, which for the released ones is bfloat16.
    """
    config, group = outline.config, outline.config.rollout.group_size
    resident, optimizer, shardings = make_resident_arrays(outline, stored)
    params = merge(resident.state.params, resident.frozen)
    count = config.rollout.batch_prompts or config.train.prompts_per_step
    rows = batch_sharding(outline.mesh)
    share = 1 / len(outline.tasks) if build.choose_period(outline) else 1
    with_greedy = build.uses_greedy(outline)
    drawn = count * (group + with_greedy)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), drawn))
    samplers = build.make_samplers(outline, greedy_last=with_greedy)
    inputs = {
        task: (make_prompts(outline, task, count, lengths), attach_shardings(keys, rows))
        for task in samplers
        if task in outline.tasks
    }
    programs = [
        Program(
            f"sample {task}",
            jax.jit(samplers[task]),
            (params,),
            of_task,
            calls=share * (config.train.prompts_per_step // count),
            rounds=_count_rounds(outline, task),
        )
        for task, of_task in inputs.items()
    ]
    for task in image_tasks(outline.tasks):
        scored = config.train.prompts_per_step * (group + with_greedy)
        segments = jax.eval_shape(samplers[task], params, *inputs[task])
        codes = attach_shardings(_make_image_values(segments, scored), rows)
        decode = functools.partial(outline.family.decode_images, outline.sizes)
        programs.append(Program("codes to pixels", jax.jit(decode), (params,), (codes,), share))
    steps = build.make_steps(outline, optimizer, shardings)
    return resident, programs + make_update_programs(outline, lengths, resident, steps)


def make_update_programs(
    outline: RunOutline, lengths: dict[str, int], resident: ResidentArrays, steps: tuple[Any, Any]
) -> list[Program]:
    """Returns the programs that compute log-probs and update; one of each for all tasks, or each.

    `steps` are the jitted update and scoring.
    """
    period = build.choose_period(outline)
    # The tasks of an update, and the share of the iterations in which it is made.
    updates = [(task,) for task in outline.tasks] if period else [outline.tasks]
    share = 1 / len(updates) if period else 1
    has_reference, penalty = resident.reference is not None, build.make_kl_penalty(outline)
    scored_policy = outline.updates_per_step > 1 or penalty is not None
    old = ("old_logprobs",) if outline.updates_per_step > 1 else ()
    ref = ("ref_logprobs", "ref_velocities") if has_reference and penalty is None else ()
    programs = []
    for tasks in updates:
        name = f" {tasks[0]}" if period else ""
        if calls := share * (scored_policy + has_reference):
            # Old and reference log-probs are counted as calls of one program. The reference is in
            # the compute dtype, so only its casts differ.
            batch, parameters = make_batch(outline, tasks, lengths, ()), resident.state.params
            resident_inputs = (parameters, resident.frozen)
            programs.append(Program(f"log-probs{name}", steps[1], resident_inputs, (batch,), calls))
        batch, calls = make_batch(outline, tasks, lengths, (*old, *ref)), outline.updates_per_step
        resident_inputs = (resident.state, resident.frozen)
        programs.append(
            Program(f"update{name}", steps[0], resident_inputs, (batch,), share * calls)
        )
    return programs
