"""Packs the answers of a batch into rows for the update, by the lengths of all processes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from corl_jax.devices.batches import all_gather_array, take_own_rows
from corl_jax.policies.packing import PACKED, count_tokens_to_score, pack_rows
from corl_jax.tasks import TASKS, TurnKinds, name_segments
from corl_jax.train.run import Run, put_batch
from corl_jax.train.step import Batch, TaskBatch
from corl_jax.types import Rollout

MIN_SAVED_TOKENS = 8192
"""Fewest tokens of a batch that packing has to save. Another shape takes seconds to compile."""

_count_tokens = jax.jit(count_tokens_to_score)


def pack_answers(run: Run, batch: Batch) -> Batch:
    """Returns the batch with the packed rows of its answers, where an update gains by them.

    The number of rows depends on the lengths of all processes' answers alone.
    """
    return {
        name: _pack_task(run, task) if _can_pack(run, task.turn_kinds) else task
        for name, task in batch.items()
    }


def depends_on_lengths(run: Run, rollouts: Mapping[str, Rollout]) -> bool:
    """Returns whether the lengths of answers decide the rows that an update of rollouts reads."""
    return any(
        _can_pack(run, TASKS[task].turn_kinds)
        and rollout.segments[0].values.size >= MIN_SAVED_TOKENS
        for task, rollout in rollouts.items()
    )


def _can_pack(run: Run, turns: TurnKinds) -> bool:
    """Returns whether an update can read several answers of such turns in a row."""
    return run.answer_blocks is not None and run.family.turns[turns].packs_answers


def _pack_task(run: Run, task: TaskBatch) -> TaskBatch:
    (text,) = task.segments
    lengths = all_gather_array(_count_tokens(text.mask))
    answers, row_length = len(lengths), text.values.shape[1]
    assert run.answer_blocks is not None
    packed = pack_rows(lengths.reshape(-1, run.group_size), row_length, run.answer_blocks)
    if packed is None or (answers - len(packed)) * row_length < MIN_SAVED_TOKENS:
        return task
    rows = put_batch(run, take_own_rows(run.mesh, packed))
    text = dataclasses.replace(text, replay=text.replay | {PACKED: rows})
    return dataclasses.replace(task, segments=(text,))


def measure_rows(run: Run, batch: Batch) -> dict[str, Any]:
    """Returns `update_rows` of answers: the rows that an update reads, over the answers."""
    return {
        f"{prefix}/update_rows": np.float32(
            len(segment.replay.get(PACKED, segment.mask)) / len(segment.mask)
        )
        for name, task in batch.items()
        if _can_pack(run, task.turn_kinds)
        for prefix, segment in zip(name_segments(name, task.kinds), task.segments, strict=True)
    }
