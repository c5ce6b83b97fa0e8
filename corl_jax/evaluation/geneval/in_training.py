"""Suite `geneval`: GenEval's verdicts on an image of each of its prompts, during a training.

The rows are lines of evaluation_metadata.jsonl. The networks of the reward `geneval` see the
objects and their colours, and GenEval's rules judge.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from corl_jax import tasks
from corl_jax.data.geneval_demands import parse_demand
from corl_jax.errors import InputError, Problems
from corl_jax.estimates import Z_95
from corl_jax.evaluation.geneval.detections import read_rows
from corl_jax.evaluation.intervals import Rate
from corl_jax.evaluation.sampling import sample_rows
from corl_jax.evaluation.suite import EvaluationInputs
from corl_jax.evaluation.verdict_page import draw_verdicts
from corl_jax.input_files import expand_path
from corl_jax.policies.turns import decode_segment
from corl_jax.rewards.samples import Samples
from corl_jax.runs.pictures import Page

(TASK,) = TASKS = tasks.GENERATION
REWARD, DEMAND = "geneval", "geneval"  # the reward, and its column
REWARDS: dict[str, dict[str, Any]] = {REWARD: {"score": "strict"}}
ACCURACY, OVERALL = "draw/accuracy", "draw/overall"


@dataclasses.dataclass(frozen=True)
class GenevalReport:
    """The results. Rates are over all processes, other fields over this process's rows."""

    rates: dict[str, Rate]  # of all images, and by tag; by name without `eval/`
    images: np.ndarray  # [rows, S, S, 3] uint8
    prompts: list[str]
    passed: list[bool]

    def metrics(self) -> dict[str, float]:
        """Returns `eval/NAME`, `eval/NAME_low` and `eval/NAME_high`, and the mean over tags."""
        metrics = {}
        for name, rate in self.rates.items():
            ends = {f"eval/{name}_low": rate.low, f"eval/{name}_high": rate.high}
            metrics |= {f"eval/{name}": rate.mean, **ends}
        of_tags = [rate.mean for name, rate in self.rates.items() if name != ACCURACY]
        return metrics | {f"eval/{OVERALL}": float(np.mean(of_tags))}

    def scores(self) -> dict[str, tuple[float, float]]:
        """Returns the accuracy as metric -> (mean, standard error)."""
        rate = self.rates[ACCURACY]
        # Half the width of a 95% interval is Z_95 standard errors.
        return {f"eval/{ACCURACY}": (rate.mean, (rate.high - rate.low) / (2 * Z_95))}

    def draw(self, title: str = "", max_images: int = 64, columns: int = 8) -> Page | None:
        """Returns a page of the first images with their verdicts; the rate is in the title."""
        rate = self.rates[ACCURACY]
        title = title and f"{title}: {rate.mean:.1%} of {rate.n} images pass GenEval's rules"
        return draw_verdicts(self.images, self.prompts, self.passed, title, max_images, columns)


class GenevalRows:
    """The lines of GenEval's metadata file, as prompts with their demands.

    Raises: InputError on construction, listing the lines that are no demands.
    """

    def __init__(self, path: Path):
        problems = Problems()
        self._path = path
        self._rows: list[tuple[int, dict[str, Any]]] = []
        for number, row in read_rows(path):
            with problems.collect(f"{path}:{number}: "):
                demand = parse_demand(row)
                self._rows.append((number, {"prompt": demand["prompt"], DEMAND: demand}))
        problems.raise_any()
        self.names = {"prompt": "prompt", DEMAND: DEMAND}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return dict(self._rows[row][1])

    def column(self, name: str) -> list:
        return [values[name] for _, values in self._rows]

    def where(self, row: int) -> str:
        return f"{self._path}:{self._rows[row][0]}"

    def fingerprint(self) -> None:
        """Returns None: no run resumes in the middle of these rows."""


def open_rows(path: str, columns: Sequence[str]) -> GenevalRows:
    """Opens evaluation_metadata.jsonl; its rows have all `columns` that the suite needs.

    Raises: InputError for a file that cannot be read or judged.
    """
    rows = GenevalRows(Path(expand_path(path)))
    assert set(columns) <= set(rows.names), columns
    return rows


def evaluate_geneval(inputs: EvaluationInputs) -> GenevalReport:
    """Generates an image for each row and judges it. `inputs.batches` is a Loader.

    Raises: InputError if there are no rows.
    """
    loader: Any = inputs.batches
    assert inputs.judge is not None
    num_rows = len(loader.source) if inputs.rows is None else min(inputs.rows, len(loader.source))
    images, prompts, passed, tags = [], [], [], []
    for batch in loader.iterate(0, -(-num_rows // loader.batch_size)):
        rollout = sample_rows(inputs, TASK, batch)
        policy = inputs.policy
        model = (policy.family, policy.config, policy.params, policy.processor)
        drawn = decode_segment(*model, rollout.segments[-1])
        verdicts = inputs.judge(Samples(batch.columns, images=drawn))[REWARD]
        # The last batch may contain rows of a second pass.
        for row in np.flatnonzero(batch.index < num_rows):
            images.append(drawn[row])
            prompts.append(batch.columns["prompt"][row])
            passed.append(bool(verdicts[row] >= 1))
            tags.append(batch.columns[DEMAND][row]["tag"])
    # Every process has the same tags, also those of rows that others have.
    every_tag = list(dict.fromkeys(d["tag"] for d in loader.source.column(DEMAND)[:num_rows]))
    if not every_tag:
        raise InputError("evaluation: found no rows; expected at least one")
    rates = compute_rates(passed, tags, every_tag, inputs)
    stacked = np.stack(images) if images else np.zeros((0, 1, 1, 3), np.uint8)
    return GenevalReport(rates, stacked, prompts, passed)


def compute_rates(
    passed: Sequence[bool], tags: Sequence[str], every_tag: Sequence[str], inputs: EvaluationInputs
) -> dict[str, Rate]:
    """Returns the rates of all images and of each tag, over the rows of all processes."""
    groups: Mapping[str, list[bool]] = {
        ACCURACY: list(passed),
        **{
            f"draw/{tag}": [p for p, of in zip(passed, tags, strict=True) if of == tag]
            for tag in every_tag
        },
    }
    # Counts, not rates, are added over processes: [processes, rates, 2] -> [rates, 2].
    counts = np.array([[sum(values), len(values)] for values in groups.values()], np.int32)
    counts = inputs.gather(counts[None]).sum(axis=0)
    return {name: Rate.of(int(hits), int(n)) for name, (hits, n) in zip(groups, counts)}
