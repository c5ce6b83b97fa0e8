"""Suite `own_answers`: what a model answers about its own images, and what they really show.

For each row one image is generated, and the row's question is asked about it, greedily. The same
question is asked about a blank image, where a right answer comes from habit, and about the row's
`real_image` if there is one. Rules judge the answers by what the prompt demanded. With the column
`spec` the exact checker of the drawn world judges the images too.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image

from corl_jax.data.columns import IMAGE_COLUMN
from corl_jax.data.dataset import Loader
from corl_jax.data.drawn_world.checker import check_all
from corl_jax.data.self_questions.objects import TAGS
from corl_jax.data.self_questions.records import QUESTIONS, find_include_problem
from corl_jax.errors import InputError, Problems
from corl_jax.estimates import Z_95
from corl_jax.evaluation.answer_summary import AnswerSummary, summarize_answers
from corl_jax.evaluation.imbalance import MEAN, Imbalance, Trial, measure_imbalance
from corl_jax.evaluation.intervals import Rate
from corl_jax.evaluation.suite import EvaluationInputs
from corl_jax.policies.turns import bind_sampler, decode_segment, list_tokens, sample_turn
from corl_jax.rewards.self_answers import judge_answer, read_demand
from corl_jax.runs import pictures
from corl_jax.tasks import IMAGE_GENERATION, IMAGE_UNDERSTANDING, SELF_QUESTIONING
from corl_jax.types import Prompts

TASKS = SELF_QUESTIONING
COLUMNS = ("prompt", "qa_problem", "tag", "include")
SPEC = "spec"
OWN, BLANK, FOREIGN = "own", "blank", "foreign"
"""Whose image a question is about."""
GREY = (127, 127, 127)
PROMPT_LINES, ANSWER_LINES = 3, 2  # below an image


@dataclasses.dataclass(frozen=True)
class OwnAnswersReport:
    """The results: rates and measures over all processes, the rest over this process's rows."""

    rates: dict[str, Rate]  # by name without `eval/`
    imbalance: dict[str, Imbalance]  # by tag and MEAN; empty without `spec`
    answers: dict[str, AnswerSummary]  # about own images, by tag and MEAN
    images: np.ndarray  # [rows, S, S, 3] uint8
    prompts: list[str]
    texts: list[str]
    correct: list[bool]  # the answer about the own image
    drawn: list[bool] | None  # the image shows what the prompt demands; None without `spec`

    def metrics(self) -> dict[str, float]:
        """Returns `eval/NAME`, `eval/NAME_low` and `eval/NAME_high` of what was tried."""
        measures: dict[str, Any] = {name: rate for name, rate in self.rates.items() if rate.n}
        for tag, row in self.imbalance.items():
            measures[f"imbalance/{tag}"] = row.gap
        if MEAN in self.imbalance:
            mean = self.imbalance[MEAN]
            measures |= {
                "imbalance/wrong_answers": mean.wrong_answers,
                "imbalance/wrong_drawings": mean.wrong_drawings,
                "imbalance/mean_wrong": mean.mean_wrong,
            }
        values = {
            f"eval/{name}{suffix}": value
            for name, x in measures.items()
            if not math.isnan(x.mean)
            for suffix, value in (("", x.mean), ("_low", x.low), ("_high", x.high))
        }
        if "draw/accuracy" in self.rates:
            gap = self.rates["own/accuracy"].mean - self.rates["draw/accuracy"].mean
            values["eval/hacking_gap"] = gap
        for tag, summary in self.answers.items():
            suffix = "" if tag == MEAN else f"/{tag}"
            values |= {
                f"eval/own/tokens{suffix}": summary.mean_length,
                f"eval/own/entropy{suffix}": summary.entropy,
                f"eval/own/empty{suffix}": summary.empty.mean,
                f"eval/own/cut{suffix}": summary.cut.mean,
            }
        return values

    def scores(self) -> dict[str, tuple[float, float]]:
        """Returns metric -> (mean, standard error) of the accuracies that should not fall."""
        # Half the width of a 95% interval is Z_95 standard errors. An answer about a blank image
        # is no ability.
        return {
            f"eval/{name}": (rate.mean, (rate.high - rate.low) / (2 * Z_95))
            for name, rate in self.rates.items()
            if name.endswith("/accuracy") and not name.startswith(BLANK) and rate.n
        }

    def draw(self, title: str = "", max_images: int = 64, columns: int = 8) -> pictures.Page:
        """Returns a page of the first images with prompt and answer below each.

        A frame is green for a right answer, else red. The rate is added to the title.
        """
        cells = []
        for row, pixels in enumerate(self.images[:max_images]):
            width = pictures.image_width(pixels)
            color = pictures.GOOD if self.correct[row] else pictures.BAD
            lines = []
            if self.drawn is not None:
                verdict = "image right" if self.drawn[row] else "image wrong"
                lines.append((verdict, pictures.INK))
            for text, most, ink in (
                (self.prompts[row], PROMPT_LINES, pictures.INK),
                (self.texts[row], ANSWER_LINES, color),
            ):
                lines += [(line, ink) for line in pictures.wrap(text, width, most)]
            cells.append(
                pictures.Cell(
                    pixels, lines, frame=color, caption=self.prompts[row],
                    passed=self.correct[row],
                )
            )  # fmt: skip
        rows = [cells[first : first + columns] for first in range(0, len(cells), columns)]
        if title:
            rate = self.rates["own/accuracy"]
            title = f"{title}: {rate.mean:.1%} of {rate.n} answers about own images are right"
        return pictures.draw_page(rows, title=title)


@dataclasses.dataclass(frozen=True)
class Answers:
    """The answers to the questions of a batch."""

    texts: list[str]
    lengths: list[int]  # in tokens, with the end token
    is_cut: list[bool]  # ended at the largest number of tokens

    def take(self, rows: np.ndarray) -> Answers:
        """Returns the answers of these row numbers."""
        return Answers(
            [self.texts[row] for row in rows],
            [self.lengths[row] for row in rows],
            [self.is_cut[row] for row in rows],
        )


@dataclasses.dataclass(frozen=True)
class Batch:
    """The rows of a batch that count, with their verdicts.

    Verdicts are [rows, 5] int32: number of the tag, image right, answers about own, blank and
    foreign image right; -1 where there is none.
    """

    images: np.ndarray
    answers: Answers
    prompts: list[str]
    verdicts: np.ndarray  # of this process's rows
    all_verdicts: np.ndarray  # of the rows of all processes


def evaluate_own_answers(inputs: EvaluationInputs) -> OwnAnswersReport:
    """Generates an image for each row, asks about it, and judges images and answers.

    Raises:
        InputError: a column is missing, a record cannot be read, or there are no rows.
    """
    batches, num_rows = inputs.batches, inputs.rows
    if isinstance(batches, Loader):
        available = len(batches.source)
        num_rows = available if num_rows is None else min(num_rows, available)
        batches = batches.iterate(0, -(-num_rows // batches.batch_size))
    size, done = 0, []
    for prompts in batches:
        counts = prompts.index < (np.inf if num_rows is None else num_rows)
        # With several processes another one may have rows left, and all must run the programs.
        if not counts.any() and jax.process_count() == 1:
            break
        # A smaller last batch is padded to the size of the others, so that no program is compiled.
        size = max(size, len(prompts))
        done.append(_judge_batch(inputs, prompts, counts, size))
    if not done:
        raise InputError("evaluation: found no rows; expected at least one batch")
    return _make_report(done)


def find_row_problems(columns: Mapping[str, Sequence], names: Sequence[str]) -> list[str]:
    """Lists rows whose record cannot be judged, or whose question is not that of their tag."""
    problems = Problems()
    for row, name in enumerate(names):
        tag, question = columns["tag"][row], columns["qa_problem"][row]
        if problem := find_include_problem(columns["include"][row], str(tag)):
            problems.add(f"{name}: {problem}")
        elif question != QUESTIONS[tag]:
            problems.add(
                f"{name}: qa_problem is {str(question)[:60]!r}, but its tag {tag} asks "
                f"{QUESTIONS[tag]!r}; write the rows with `corl-jax data --kind self_questions`, "
                "or name the right column in data.columns, as {qa_problem: question}"
            )
    return list(problems)


def check_batch(prompts: Prompts) -> None:
    """Checks that a batch has records. Raises: InputError listing columns or rows."""
    columns, problems = prompts.columns, Problems()
    problems.add(
        f"evaluation: column {name} is missing; found {', '.join(columns)}; the suite "
        "`own_answers` needs rows as `corl-jax data --kind self_questions` writes them"
        for name in COLUMNS
        if name not in columns
    )
    problems.raise_any()
    problems.add(find_row_problems(columns, [f"row {number}" for number in prompts.index]))
    problems.raise_any()


def _judge_batch(
    inputs: EvaluationInputs, prompts: Prompts, counts: np.ndarray, size: int
) -> Batch:
    check_batch(prompts)
    columns = prompts.columns
    images = _draw_images(inputs, prompts, size)
    side = inputs.policy.family.limits(inputs.policy.config).input_image_side
    blank = Image.new("RGB", (side, side), GREY)
    shown = {OWN: [Image.fromarray(x) for x in images], BLANK: [blank] * len(images)}
    foreign = columns.get(IMAGE_COLUMN)
    if foreign is not None:  # a row without its image is asked too, as all processes must ask
        shown[FOREIGN] = [blank if image is None else image for image in foreign]
    answers = {name: _ask(inputs, prompts, pictures, size) for name, pictures in shown.items()}
    tags = [str(tag) for tag in columns["tag"]]
    demands = [read_demand(*pair) for pair in zip(tags, columns["include"], strict=True)]
    verdicts = np.full((len(prompts), 5), -1, np.int32)
    verdicts[:, 0] = [TAGS.index(tag) for tag in tags]
    if SPEC in columns:
        verdicts[:, 1] = check_all(images, columns[SPEC])
    for place, name in enumerate((OWN, BLANK, FOREIGN), 2):
        if name in answers:
            verdicts[:, place] = [
                judge_answer(text, demand) == 1.0
                for text, demand in zip(answers[name].texts, demands, strict=True)
            ]
    if foreign is not None:
        verdicts[[image is None for image in foreign], 4] = -1
    rows = np.flatnonzero(counts)
    gathered = inputs.gather(np.where(counts[:, None], verdicts, -1))
    return Batch(
        images[rows], answers[OWN].take(rows), [columns["prompt"][row] for row in rows],
        verdicts[rows], gathered[gathered[:, 0] >= 0],
    )  # fmt: skip


def _draw_images(inputs: EvaluationInputs, prompts: Prompts, size: int) -> np.ndarray:
    """Returns the images of a batch [rows, S, S, 3] uint8."""
    policy = inputs.policy
    options = dataclasses.replace(inputs.sampling, greedy=inputs.greedy_images)
    program = policy.family.turns[IMAGE_GENERATION.turn_kinds]
    (task,) = TASKS
    encoded = dataclasses.replace(prompts.encoded[task], next=None)
    rollout = sample_turn(
        bind_sampler(program.sample, policy.config, options), policy.params, encoded,
        prompts.index, seed=inputs.seed, stream=IMAGE_GENERATION.stream, fill_to=size,
        place=inputs.place,
    )  # fmt: skip
    model = (policy.family, policy.config, policy.params, policy.processor)
    return decode_segment(*model, rollout.segments[-1])[: len(prompts)]


def _ask(
    inputs: EvaluationInputs, prompts: Prompts, images: Sequence[Image.Image], size: int
) -> Answers:
    """Returns the answers to the questions of a batch about some images."""
    policy, turn = inputs.policy, IMAGE_UNDERSTANDING.turn
    processor = policy.processor
    ids = [
        processor.prompt_ids(turn.prompt, {"qa_problem": question})
        for question in prompts.columns["qa_problem"]
    ]
    (task,) = TASKS
    questions = prompts.encoded[task].next
    assert questions is not None  # the task has two turns
    encoded = processor.encode(turn.prompt, ids, images, questions.input_ids.shape[1])
    options = dataclasses.replace(inputs.sampling, greedy=inputs.greedy_texts)
    program = policy.family.turns[IMAGE_UNDERSTANDING.turn_kinds]
    (segment,) = sample_turn(
        bind_sampler(program.sample, policy.config, options), policy.params, encoded,
        prompts.index, seed=inputs.seed, stream=IMAGE_UNDERSTANDING.stream, fill_to=size,
        place=inputs.place,
    ).segments  # fmt: skip
    tokens = list_tokens(segment)[: len(prompts)]
    eos = processor.special.eos
    return Answers(
        [processor.decode(row) for row in tokens],
        [len(row) for row in tokens],
        [eos not in row for row in tokens],
    )


def _make_report(batches: Sequence[Batch]) -> OwnAnswersReport:
    verdicts = np.concatenate([batch.verdicts for batch in batches])
    all_verdicts = np.concatenate([batch.all_verdicts for batch in batches])
    texts, lengths, is_cut = (
        [value for batch in batches for value in getattr(batch.answers, field.name)]
        for field in dataclasses.fields(Answers)
    )
    correct = [bool(verdict) for verdict in verdicts[:, 2]]
    tags = [TAGS[number] for number in verdicts[:, 0]]
    answers = [
        summarize_answers(texts, categories, correct, lengths, is_cut)
        for categories in ([MEAN] * len(texts), tags)
    ]
    is_judged = bool((verdicts[:, 1] >= 0).all())
    return OwnAnswersReport(
        compute_rates(all_verdicts), _measure_imbalance(all_verdicts), answers[0] | answers[1],
        np.concatenate([batch.images for batch in batches]),
        [prompt for batch in batches for prompt in batch.prompts], texts, correct,
        [bool(verdict) for verdict in verdicts[:, 1]] if is_judged else None,
    )  # fmt: skip


def compute_rates(verdicts: np.ndarray) -> dict[str, Rate]:
    """Computes rates by name, of all rows and of each tag; see `Batch`."""
    rates = {}
    for place, name in enumerate(("draw", OWN, BLANK, FOREIGN), 1):
        tried = verdicts[verdicts[:, place] >= 0]
        if not len(tried):
            continue
        rates[f"{name}/accuracy"] = Rate.of(int(tried[:, place].sum()), len(tried))
        for number, tag in enumerate(TAGS):
            values = tried[tried[:, 0] == number, place]
            rates[f"{name}/{tag}"] = Rate.of(int(values.sum()), len(values))
    return rates


def _measure_imbalance(verdicts: np.ndarray) -> dict[str, Imbalance]:
    """Returns the measures by tag; none if no image was judged."""

    def read_verdict(value: int) -> bool | None:
        return None if value < 0 else bool(value)

    return measure_imbalance(
        Trial(
            str(row), TAGS[tag], bool(drawn), read_verdict(own_right), read_verdict(foreign_right)
        )
        for row, (tag, drawn, own_right, _, foreign_right) in enumerate(verdicts.tolist())
        if drawn >= 0
    )
