"""Averages the rewards of each category of a task that asks about its own images."""

from __future__ import annotations

import numpy as np

from corl_jax.data.self_questions.objects import TAGS
from corl_jax.devices.batches import all_gather_rows
from corl_jax.tasks import TASKS
from corl_jax.train.drawn import Drawn
from corl_jax.train.run import Run


def average_by_tag(run: Run, drawn: Drawn) -> dict[str, float]:
    """Returns `TASK/rewards/NAME/TAG`: the mean over the completions of all processes with a tag.

    A tag to whose rows the reward does not apply in this step has no number.
    """
    means: dict[str, float] = {}
    for task, scored in drawn.scored.items():
        if TASKS[task].question is None:
            continue
        tags = scored.samples.columns.get("tag")
        if tags is None:
            continue
        numbers = [TAGS.index(tag) if tag in TAGS else -1 for tag in tags]
        table = all_gather_rows(run.mesh, np.array([numbers, *scored.rewards.values()]).T)
        for column, name in enumerate(scored.rewards, 1):
            for number, tag in enumerate(TAGS):
                values = table[table[:, 0] == number, column]
                values = values[~np.isnan(values)]
                if len(values):
                    means[f"{task}/rewards/{name}/{tag}"] = float(values.mean())
    return means
