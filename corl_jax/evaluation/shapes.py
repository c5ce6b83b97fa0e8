"""Suite `shapes`: the rates of right images and right answers on the drawn world.

For each row one image is generated and one question answered. The exact checker judges images. An
answer is right if it equals the solution. The samples of a row depend on the seed and the row's
number only, so the batch size does not change them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from corl_jax import tasks
from corl_jax.data.column_values import find_spec_problem, read_question_type
from corl_jax.data.dataset import Loader
from corl_jax.data.drawn_world.checker import check_all
from corl_jax.data.drawn_world.scene import CATEGORIES
from corl_jax.errors import InputError, Problems
from corl_jax.estimates import Z_95
from corl_jax.evaluation.intervals import Rate
from corl_jax.evaluation.sampling import sample_rows
from corl_jax.evaluation.suite import EvaluationInputs
from corl_jax.evaluation.units import Unit
from corl_jax.evaluation.verdict_page import draw_verdicts
from corl_jax.policies.turns import decode_segment
from corl_jax.rewards.answers import read_solution
from corl_jax.rewards.text import format_reward, qa_accuracy
from corl_jax.runs import pictures
from corl_jax.types import Prompts

TASKS = tasks.UNIFIED
COLUMNS = ("prompt", "spec", "category", "qa_problem", "qa_solution", "qa_type")
ACCURACIES = ("draw/accuracy", "answer/accuracy")


@dataclasses.dataclass(frozen=True)
class ShapesReport:
    """The results. Rates are over all processes, other fields over this process's rows."""

    rates: dict[str, Rate]  # by name without `eval/`
    images: np.ndarray  # [rows, S, S, 3] uint8
    prompts: list[str]
    passed: list[bool]  # whether the image shows what its prompt demands
    answers: list[dict[str, Any]]  # question, answer, solution, qa_type, correct, format
    categories: list[str] = dataclasses.field(default_factory=list)

    def metrics(self) -> dict[str, float]:
        """Returns `eval/NAME`, `eval/NAME_low` and `eval/NAME_high` of each rate with tries."""
        return {
            f"eval/{name}{suffix}": value
            for name, rate in self.rates.items()
            if rate.n
            for suffix, value in (("", rate.mean), ("_low", rate.low), ("_high", rate.high))
        }

    def scores(self) -> dict[str, tuple[float, float]]:
        """Returns metric -> (mean, standard error) of the two accuracies."""
        # Half the width of a 95% interval is Z_95 standard errors.
        return {
            f"eval/{name}": (rate.mean, (rate.high - rate.low) / (2 * Z_95))
            for name, rate in self.rates.items()
            if name in ACCURACIES and rate.n
        }

    def as_json(self) -> dict[str, Any]:
        """Returns rates and verdicts as plain values; the mean of a rate without tries is None."""
        rates = {name: dataclasses.asdict(rate) for name, rate in self.rates.items()}
        for rate in rates.values():
            rate["mean"] = rate["mean"] if rate["n"] else None
        drawings = [
            {"prompt": prompt, "passed": passed}
            for prompt, passed in zip(self.prompts, self.passed, strict=True)
        ]
        return {"rows": len(self.prompts), "rates": rates, "drawings": drawings}

    def units(self) -> list[Unit]:
        """Returns a unit for each row: whether its image and its answer are right."""
        rows = zip(self.prompts, self.categories, self.passed, self.answers, strict=True)
        return [
            Unit(
                f"{number:05}: {prompt}",
                category,
                {"draw": float(passed), "answer": float(answer["correct"])},
            )
            for number, (prompt, category, passed, answer) in enumerate(rows)
        ]

    def draw(self, title: str = "", max_images: int = 64, columns: int = 8) -> pictures.Page:
        """Returns a page of the first images, with verdict and prompt below each.

        A frame is green for an image that passed, else red. The rate is added to the title.
        """
        if title:
            rate = self.rates["draw/accuracy"]
            title = f"{title}: {rate.mean:.1%} of {rate.n} images match their prompt"
        return draw_verdicts(self.images, self.prompts, self.passed, title, max_images, columns)


def evaluate_shapes(inputs: EvaluationInputs) -> ShapesReport:
    """Generates an image and an answer for each row, and scores both.

    Raises:
        InputError: a batch lacks something, which is checked before it is sampled; or no rows.
    """
    batches, num_rows = inputs.batches, inputs.rows
    if isinstance(batches, Loader):
        available = len(batches.source)
        num_rows = available if num_rows is None else min(num_rows, available)
        batches = batches.iterate(0, -(-num_rows // batches.batch_size))
    size, pieces = 0, []
    for prompts in batches:
        rows = np.flatnonzero(prompts.index < (np.inf if num_rows is None else num_rows))
        # With several processes another one may have rows left, and all must run the programs.
        if not rows.size and jax.process_count() == 1:
            break
        check_batch(prompts)
        # A smaller last batch is padded to the size of the others, so that no program is compiled.
        size = max(size, len(prompts))
        images, texts = _sample(inputs, prompts, size)
        columns = {name: [values[row] for row in rows] for name, values in prompts.columns.items()}
        pieces.append((images[rows], [texts[row] for row in rows], columns))
    return _make_report(pieces, inputs.gather)


def check_batch(prompts: Prompts) -> None:
    """Checks that a batch has all that the scores need. Raises: InputError listing problems."""
    problems = Problems()
    for task in TASKS:
        if task not in prompts.encoded:
            problems.add(
                f"evaluation: the batch has no {task} prompts; give the loader tasks={TASKS}"
            )
    for name in COLUMNS:
        if name not in prompts.columns:
            problems.add(
                f"evaluation: column {name} is missing; found {', '.join(prompts.columns)}; the "
                "suite `shapes` needs rows as `corl-jax data` writes them"
            )
    problems.raise_any()
    problems.add(find_row_problems(prompts.columns, [f"row {i}" for i in prompts.index]))
    problems.raise_any()


def find_row_problems(columns: Mapping[str, Sequence], names: Sequence[str]) -> list[str]:
    """Lists problems of the columns that scores need; `names` are the rows' names in messages."""
    problems = Problems()
    for row, name in enumerate(names):
        spec, category = columns["spec"][row], columns["category"][row]
        problem = find_spec_problem(spec)
        if problem:
            problems.add(f"{name}: spec: {problem}; write the rows with corl_jax.data.drawn_world")
        spec_category = category if problem else _parse_spec(spec)["category"]
        if category not in CATEGORIES or category != spec_category:
            problems.add(
                f"{name}: category is {category!r}, its spec's is {spec_category!r}; "
                f"expected the same, one of {', '.join(CATEGORIES)}"
            )
        if not read_solution(columns["qa_solution"][row] or ""):
            problems.add(f"{name}: qa_solution is empty; expected <answer>..</answer>")
        with problems.collect(f"{name}: qa_type: "):
            if read_question_type(columns["qa_type"][row]) is None:
                problems.add(f"{name}: qa_type is empty; expected MC or OE")
    return list(problems)


def score_images(images: np.ndarray, columns: Mapping[str, Sequence]) -> list[bool]:
    """Returns whether each image uint8 [N, H, W, 3] shows exactly what its `spec` demands."""
    return check_all(images, columns["spec"])


def score_answers(texts: Sequence[str], columns: Mapping[str, Sequence]) -> list[dict[str, Any]]:
    """Returns each answer with its question, its solution, and whether it is right and well formed.

    An answer is right if its accuracy reward is 1: the true option, or the words of the solution.
    """
    names = ("qa_problem", "qa_solution", "qa_type")
    rows = zip(texts, *(columns[name] for name in names), strict=True)
    return [
        {
            "question": question,
            "answer": text,
            "solution": solution,
            "qa_type": read_question_type(kind),
            "correct": qa_accuracy(text, solution, kind, problem=question) >= 1.0,
            "format": format_reward(text) >= 1.0,
        }
        for text, question, solution, kind in rows
    ]


def compute_rates(
    passed: Sequence[bool],
    categories: Sequence[str],
    answers: Sequence[Mapping[str, Any]],
    gather: Callable[[np.ndarray], np.ndarray] = lambda rows: rows,
) -> dict[str, Rate]:
    """Computes rates by name, over the rows of all processes. `gather` all-gathers rows."""
    correct = [answer["correct"] for answer in answers]
    kinds = [answer["qa_type"] for answer in answers]
    tries = {"draw/accuracy": list(passed)}
    for category in CATEGORIES:
        tries[f"draw/{category}"] = [
            p for p, c in zip(passed, categories, strict=True) if c == category
        ]
    tries["answer/accuracy"] = correct
    for kind in ("MC", "OE"):
        tries[f"answer/{kind.lower()}"] = [c for c, k in zip(correct, kinds) if k == kind]
    tries["answer/format"] = [answer["format"] for answer in answers]
    # Counts, not rates, are added over processes: [processes, rates, 2] -> [rates, 2].
    counts = np.array([[sum(values), len(values)] for values in tries.values()], np.int32)
    counts = gather(counts[None]).sum(axis=0)
    return {name: Rate.of(int(hits), int(n)) for name, (hits, n) in zip(tries, counts)}


def _sample(
    inputs: EvaluationInputs, prompts: Prompts, num_rows: int
) -> tuple[np.ndarray, list[str]]:
    """Samples images [num_rows, S, S, 3] and answers of a batch filled up to `num_rows` rows."""
    policy, results = inputs.policy, []
    for name in TASKS:
        rollout = sample_rows(inputs, name, prompts, num_rows)
        model = (policy.family, policy.config, policy.params, policy.processor)
        results.append(decode_segment(*model, rollout.segments[-1]))
    images, texts = results
    return images, texts


def _make_report(
    pieces: list[tuple[np.ndarray, list[str], dict[str, list]]],
    gather: Callable[[np.ndarray], np.ndarray],
) -> ShapesReport:
    if not pieces:
        raise InputError("evaluation: found no rows; expected at least one batch")
    images = np.concatenate([images for images, _, _ in pieces])
    texts = [text for _, texts, _ in pieces for text in texts]
    columns = {name: [value for *_, c in pieces for value in c[name]] for name in COLUMNS}
    passed, answers = score_images(images, columns), score_answers(texts, columns)
    rates = compute_rates(passed, columns["category"], answers, gather)
    return ShapesReport(rates, images, columns["prompt"], passed, answers, columns["category"])


def _parse_spec(value: str | Mapping[str, Any]) -> Mapping[str, Any]:
    return json.loads(value) if isinstance(value, str) else value
