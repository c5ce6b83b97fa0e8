"""Suite `tsv`: answers to a data set in VLMEvalKit's format during a training.

The rows are asked as Janus's wrapper in VLMEvalKit asks them, with the chat roles of the run. The
most likely tokens make the answers. The content of the last `<answer>` is the prediction, if there
is one. The default matcher rates it, as in `corl-jax evaluate --suite tsv`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from corl_jax import tasks
from corl_jax.data.columns import IMAGE_COLUMN
from corl_jax.data.images import decode_image
from corl_jax.devices.batches import to_host_rows
from corl_jax.errors import InputError
from corl_jax.estimates import Z_95
from corl_jax.evaluation.intervals import Rate
from corl_jax.evaluation.matching.answer_tags import split_answer
from corl_jax.evaluation.sampling import sample_rows
from corl_jax.evaluation.scores import Score
from corl_jax.evaluation.suite import EvaluationInputs
from corl_jax.evaluation.tsv.images import find_images, open_image, read_file
from corl_jax.evaluation.tsv.kinds import EXACT_MATCHING, KINDS, can_be_rated, recognise_kind
from corl_jax.evaluation.tsv.prompts import VLMEVALKIT, write_question
from corl_jax.evaluation.tsv.rate_yes_no import OVERALL_F1
from corl_jax.evaluation.tsv.rating import PER_CENT, Rating, RatingOptions, rate_hits
from corl_jax.evaluation.tsv.table import IMAGE, PREDICTION, Values, import_pandas, read_table
from corl_jax.input_files import expand_path
from corl_jax.runs.pictures import Page

(TASK,) = TASKS = tasks.UNDERSTANDING
ROW, KIND, NUM_IMAGES = COLUMNS = ("tsv_row", "tsv_kind", "tsv_images")
ACCURACY = "answer/accuracy"
SHOWN_ROWS = 3  # of the rows that a message is about


@dataclasses.dataclass(frozen=True)
class TsvReport:
    """The results, over the rows of all processes."""

    rates: dict[str, Rate | Score]  # by name without `eval/`; fractions
    unread: float  # share of the answers that no rule reads

    def metrics(self) -> dict[str, float]:
        """Returns `eval/NAME`, `eval/NAME_low`, `eval/NAME_high`, and the unread share."""
        metrics = {"eval/answer/unread": self.unread}
        for name, rate in self.rates.items():
            ends = {f"eval/{name}_low": rate.low, f"eval/{name}_high": rate.high}
            metrics |= {f"eval/{name}": rate.mean, **ends}
        return metrics

    def scores(self) -> dict[str, tuple[float, float]]:
        """Returns the accuracy as metric -> (mean, standard error)."""
        rate = self.rates[ACCURACY]
        # Half the width of a 95% interval is Z_95 standard errors.
        return {f"eval/{ACCURACY}": (rate.mean, (rate.high - rate.low) / (2 * Z_95))}

    def draw(self, title: str = "", max_images: int = 64, columns: int = 8) -> Page | None:
        """Returns None: the suite makes no images."""
        return None


class TsvRows:
    """The rows of a data set that can be rated without a judge, as questions about an image.

    Raises:
        InputError: on construction, for a file that cannot be read or rated.
    """

    def __init__(self, path: Path):
        import_pandas()
        self._table = read_table(path)
        self._kind = recognise_kind(self._table, None)
        judge = KINDS[self._kind].judge
        if judge != EXACT_MATCHING:
            raise InputError(
                f"{path}: found a data set of kind {self._kind}, whose answers need a judge"
                f"{f' ({judge})' if judge else ''}; choose one that rules can rate, or use "
                "corl-jax evaluate --suite tsv on an exported model"
            )
        if not can_be_rated(self._table, self._kind):
            raise InputError(f"{path}: states no answers; choose a data set that has them")
        self._images = find_images(self._table)
        self.names = {name: name for name in ("qa_problem", IMAGE_COLUMN, *COLUMNS)}

    def __len__(self) -> int:
        return len(self._table.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        values = {name: self._read(name, row) for name in self.names if name != IMAGE_COLUMN}
        # A row with several is refused by `find_row_problems`.
        source = self._images[row][0]
        decode_image(read_file(source))  # says what is wrong with a broken image
        return values | {IMAGE_COLUMN: open_image(source)}

    def column(self, name: str) -> list:
        return [self._read(name, row) for row in range(len(self))]

    def where(self, row: int) -> str:
        return self._table.where(row)

    def fingerprint(self) -> None:
        """Returns None: no run resumes in the middle of these rows."""

    def _read(self, name: str, row: int) -> Any:
        values = self._table.rows[row]
        if name == "qa_problem":
            question = write_question(values, self._kind, self._table.name, VLMEVALKIT)
            # The processor writes this line break behind the image.
            return question.text.removeprefix("\n")
        if name == NUM_IMAGES:
            return len(self._images[row])
        if name == KIND:
            return self._kind
        return {key: value for key, value in values.items() if key != IMAGE}


def open_rows(path: str, columns: Sequence[str]) -> TsvRows:
    """Opens a data set; its rows have all `columns` that the suite needs.

    Raises: InputError for a file that cannot be read or rated.
    """
    rows = TsvRows(Path(expand_path(path)))
    assert set(columns) <= set(rows.names), columns
    return rows


def find_row_problems(columns: Mapping[str, Sequence], names: Sequence[str]) -> list[str]:
    """Counts the rows with several images, and lists what keeps the others from being rated."""
    problems = []
    several = [name for name, n in zip(names, columns[NUM_IMAGES], strict=True) if n > 1]
    if several:
        problems.append(
            f"{len(several)} of {len(names)} rows have several images, such as "
            f"{', '.join(several[:SHOWN_ROWS])}; expected one image a row; write the others to a "
            "file of their own, or use corl-jax evaluate --suite tsv on an exported model"
        )
    return problems + KINDS[columns[KIND][0]].find_problems(columns[ROW])


def evaluate_tsv(inputs: EvaluationInputs) -> TsvReport:
    """Answers the rows and rates the answers. `inputs.batches` is a Loader of `TsvRows`."""
    loader: Any = inputs.batches
    num_rows = len(loader.source) if inputs.rows is None else min(inputs.rows, len(loader.source))
    answers: dict[int, str] = {}
    for prompts in loader.iterate(0, -(-num_rows // loader.batch_size)):
        rollout = sample_rows(inputs, TASK, prompts)
        segment = rollout.segments[-1]
        # Rating needs the rows of all processes: those of a question may lie in several.
        index, tokens, mask = (
            inputs.gather(values)
            for values in (
                prompts.index.astype(np.int32),
                to_host_rows(segment.values),
                to_host_rows(segment.mask),
            )
        )
        for number, row, counts in zip(index.tolist(), tokens, mask, strict=True):
            if number < num_rows:  # the last batch may contain rows of a second pass
                answers[number] = inputs.policy.processor.decode(row[counts])
    rows = loader.source.column(ROW)[:num_rows]
    return rate_answers(loader.source.column(KIND)[0], rows, [answers[n] for n in range(num_rows)])


def rate_answers(kind: str, rows: Sequence[Values], answers: Sequence[str]) -> TsvReport:
    """Rates the answers to rows.

    Accuracy is over the units of the data set, such as a question with all its rotations.
    """
    predicted = [
        {**row, PREDICTION: split_answer(answer).prediction}
        for row, answer in zip(rows, answers, strict=True)
    ]
    rating = KINDS[kind].rate(predicted, RatingOptions())
    rates: dict[str, Rate | Score] = {
        ACCURACY: rate_hits([verdict.correct for verdict in rating.verdicts])
    }
    for name in dict.fromkeys(name for unit in rating.units for name in unit.values):
        rates[f"answer/{name}"] = _average_units(rating, name)
    if OVERALL_F1 in rating.scores:
        score = rating.scores[OVERALL_F1]
        rates["answer/f1"] = Score(score.value, score.low, score.high).times(1 / PER_CENT)
    return TsvReport(rates, len(rating.unread) / len(rating.verdicts))


def _average_units(rating: Rating, name: str) -> Rate | Score:
    """Returns the mean of a score over the units: with Wilson's interval if it is 0 or 1."""
    values = [unit.values[name] for unit in rating.units if name in unit.values]
    if set(values) <= {0.0, 1.0}:
        return rate_hits([bool(value) for value in values])
    return Score.of([np.array(values)])
