"""Held-out rates on the drawn world: how often a drawing is what was asked for, an answer right.

Each row is drawn once and answered once. Drawings are judged by the exact checker, answers by
whether they equal the solution. A row's samples depend on the seed and its position only, so
the batch size changes nothing but speed.
"""

from __future__ import annotations

import dataclasses
import json
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from corl_jax.data.column_values import find_spec_problem, read_question_type
from corl_jax.data.dataset import Loader
from corl_jax.data.drawn_world import generator
from corl_jax.data.drawn_world.checker import check
from corl_jax.data.drawn_world.scene import CATEGORIES
from corl_jax.devices.batches import pad_rows, to_host_rows
from corl_jax.errors import InputError
from corl_jax.fonts import make_drawable
from corl_jax.policies.janus import sampling
from corl_jax.policies.janus.network import JanusConfig
from corl_jax.rewards.answers import true_answer
from corl_jax.rewards.text import format_reward, qa_accuracy
from corl_jax.types import STREAMS, Params, Prompts

Z_95 = 1.959963984540054  # two-sided 95% quantile of the normal distribution
TASKS = ("t2i", "mm2t")
REQUIRED = ("prompt", "spec", "category", "qa_problem", "qa_solution", "qa_type")
HELD_OUT_SEEDS = 2**40
"""Added to the seed of `HeldOutShapes`: row i of a training set of the same seed is another."""
CELL, GAP, FONT_SIZE, LINE, PROMPT_LINES = 128, 8, 12, 15, 3  # of the contact sheet, pixels
FRAME = 4  # green around a drawing as demanded, red around another


@dataclasses.dataclass(frozen=True)
class Rate:
    """A share of `n` tries and its 95% Wilson interval; NaN in [0, 1] without any try.

    Source: Wilson 1927, JASA 22:209.
    """

    mean: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, hits: int, n: int) -> Rate:
        """The rate of `hits` in `n` tries."""
        if not n:
            return cls(math.nan, 0.0, 1.0, 0)
        mean, shrink = hits / n, 1 + Z_95**2 / n
        center = (mean + Z_95**2 / (2 * n)) / shrink
        half = Z_95 * math.sqrt(mean * (1 - mean) / n + Z_95**2 / (4 * n**2)) / shrink
        # At the ends the interval reaches the border exactly, which rounding may miss.
        low = 0.0 if hits == 0 else max(center - half, 0.0)
        high = 1.0 if hits == n else min(center + half, 1.0)
        return cls(mean, low, high, n)


@dataclasses.dataclass(frozen=True)
class Report:
    """What an evaluation found; rates are over all processes, the rest is this process's rows."""

    rates: dict[str, Rate]  # by name without `eval/`
    images: np.ndarray  # [rows, S, S, 3] uint8
    prompts: list[str]
    passed: list[bool]  # whether the drawing holds what its prompt demands
    answers: list[dict[str, Any]]  # question, answer, solution, qa_type, correct, format

    def metrics(self) -> dict[str, float]:
        """`eval/NAME`, `eval/NAME_low` and `eval/NAME_high` of every rate that has a try."""
        return {
            f"eval/{name}{suffix}": value
            for name, rate in self.rates.items()
            if rate.n
            for suffix, value in (("", rate.mean), ("_low", rate.low), ("_high", rate.high))
        }

    def as_json(self) -> dict[str, Any]:
        """Rates and verdicts as plain values; the mean of a rate without a try is None."""
        rates = {name: dataclasses.asdict(rate) for name, rate in self.rates.items()}
        for rate in rates.values():
            rate["mean"] = rate["mean"] if rate["n"] else None
        drawings = [
            {"prompt": prompt, "passed": passed}
            for prompt, passed in zip(self.prompts, self.passed, strict=True)
        ]
        return {"rows": len(self.prompts), "rates": rates, "drawings": drawings}


def evaluate_shapes(
    config: JanusConfig,
    params: Params,
    processor: Any,
    batches: Iterable[Prompts],
    *,
    seed: int,
    cfg_scale: float,
    temperature: float = 1.0,
    max_new_tokens: int,
    dtype: Any,
    greedy_text: bool = True,
    greedy_images: bool = False,
    rows: int | None = None,
    place: Callable[[Any], Any] = lambda tree: tree,
    total: Callable[[np.ndarray], np.ndarray] = lambda counts: counts,
) -> Report:
    """Draws and answers every row of `batches` once and scores both.

    `batches` is a Loader, of whose endless passes one is taken, or finite batches. Rows from
    position `rows` on do not count. `place` puts host arrays on the devices, a partial last batch
    pad_rows up; `total` adds up counts over processes. `greedy_..`: the likeliest tokens are taken.

    Raises:
        InputError: a batch lacks what it needs, before it is sampled; or there is no row.
    """
    if isinstance(batches, Loader):
        rows = min(len(batches.source), len(batches.source) if rows is None else rows)
        batches = batches.iterate(0, -(-rows // batches.batch_size))
    drawn = {"cfg_scale": cfg_scale, "greedy": greedy_images}
    answered = {"max_new_tokens": max_new_tokens, "greedy": greedy_text}
    samplers = {"t2i": (sampling.sample_images, drawn), "mm2t": (sampling.sample_text, answered)}
    common = {"special": processor.special, "temperature": temperature, "dtype": dtype}
    size, pieces = 0, []
    for prompts in batches:
        kept = np.flatnonzero(prompts.index < (np.inf if rows is None else rows))
        if not kept.size and jax.process_count() == 1:  # of several, another may have rows left
            break
        check_columns(prompts)
        size = max(size, len(prompts))
        found = {}
        for task, (sampler, options) in samplers.items():
            inputs = _inputs(prompts, task, size, seed, place)
            found[task] = sampler(config, params, *inputs, **options, **common)
        images = sampling.decode_images(config, params, found["t2i"].tokens)
        texts = _texts(processor, found["mm2t"], kept)
        pieces.append((to_host_rows(images)[kept], texts, _rows(prompts.columns, kept)))
    return _report(pieces, total)


def check_columns(prompts: Prompts) -> None:
    """Raises: InputError for all that drawings and answers of this batch could not be scored by."""
    problems = [
        f"evaluation: the batch has no {task} prompts; give the loader tasks=('t2i', 'mm2t')"
        for task in TASKS
        if getattr(prompts, task) is None
    ]
    problems += [
        f"evaluation: column {name} is missing; found {', '.join(prompts.columns)}; the suite "
        "`shapes` needs rows as `python -m corl_jax.data.drawn_world` writes them"
        for name in REQUIRED
        if name not in prompts.columns
    ]
    if problems:
        raise InputError(problems)
    problems = row_problems(prompts.columns, [f"row {i}" for i in prompts.index])
    if problems:
        raise InputError(problems)


def row_problems(columns: Mapping[str, Sequence], names: Sequence[str]) -> list[str]:
    """What is wrong with the columns that scores come from; `names` are the rows' for messages."""
    problems = []
    for row, name in enumerate(names):
        spec = columns["spec"][row]
        problem = find_spec_problem(spec)
        if problem:
            problems.append(
                f"{name}: spec: {problem}; write the rows with corl_jax.data.drawn_world"
            )
        category = columns["category"][row] if problem else _spec(spec)["category"]
        if columns["category"][row] not in CATEGORIES or columns["category"][row] != category:
            problems.append(
                f"{name}: category is {columns['category'][row]!r}, its spec's is {category!r}; "
                f"expected the same, one of {', '.join(CATEGORIES)}"
            )
        if not true_answer(columns["qa_solution"][row] or ""):
            problems.append(f"{name}: qa_solution is empty; expected <answer>..</answer>")
        try:
            if read_question_type(columns["qa_type"][row]) is None:
                problems.append(f"{name}: qa_type is empty; expected MC or OE")
        except InputError as error:
            problems += [f"{name}: qa_type: {problem}" for problem in error.problems]
    return problems


def score_drawings(images: np.ndarray, columns: Mapping[str, Sequence]) -> list[bool]:
    """Whether each image, uint8 [N, H, W, 3], holds what its row's `spec` demands, no more."""
    return [check(image, spec) for image, spec in zip(images, columns["spec"], strict=True)]


def score_answers(texts: Sequence[str], columns: Mapping[str, Sequence]) -> list[dict[str, Any]]:
    """Each answer beside its question and solution, whether it is right, and whether well formed.

    Right is an accuracy reward of 1: the true option, or the solution's very words.
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


def summarize(
    passed: Sequence[bool],
    categories: Sequence[str],
    answers: Sequence[Mapping[str, Any]],
    total: Callable[[np.ndarray], np.ndarray] = lambda counts: counts,
) -> dict[str, Rate]:
    """Rates by name; `total` adds up counts over processes."""
    right = [one["correct"] for one in answers]
    kinds = [one["qa_type"] for one in answers]
    tries = {"draw/accuracy": list(passed)}
    for category in CATEGORIES:
        tries[f"draw/{category}"] = [
            p for p, c in zip(passed, categories, strict=True) if c == category
        ]
    tries["answer/accuracy"] = right
    for kind in ("MC", "OE"):
        tries[f"answer/{kind.lower()}"] = [r for r, k in zip(right, kinds) if k == kind]
    tries["answer/format"] = [one["format"] for one in answers]
    counts = total(np.array([[sum(values), len(values)] for values in tries.values()], np.int32))
    return {name: Rate.of(int(hits), int(n)) for name, (hits, n) in zip(tries, counts)}


class HeldOutShapes:
    """Rows of the drawn world that no training set of any seed holds, drawn in memory.

    A data source for a Loader: the split `test`, whose demands `train` lacks where there are
    enough of them to do without, with pictures and questions of seeds of their own.
    """

    def __init__(self, rows: int, seed: int, world: str = "full"):
        self.names = {name: name for name in generator.FEATURES}
        self._rows = [
            generator.make_row(HELD_OUT_SEEDS + seed, i, split="test", world=world)
            for i in range(rows)
        ]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return dict(self._rows[row])

    def column(self, name: str) -> list:
        return [row[name] for row in self._rows]

    def where(self, row: int) -> str:
        return f"drawn row {row}"


def contact_sheet(report: Report, most: int = 64, columns: int = 8, title: str = "") -> np.ndarray:
    """The first `most` drawings, prompt and verdict under each: [H', W', 3] uint8."""
    count = min(most, len(report.prompts))
    columns = min(columns, count)
    side = CELL * max(1, round(report.images.shape[1] / CELL))
    width, height = side + 2 * GAP, side + 2 * GAP + PROMPT_LINES * LINE + LINE
    above = LINE + GAP if title else 0
    size = columns * width, above + -(-count // columns) * height
    page = Image.new("RGB", size, (255, 255, 255))
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(FONT_SIZE)
    draw.text((GAP, GAP), title, (20, 20, 20), font)
    letters = max(1, int(side / font.getlength("n")))
    for cell in range(count):
        x, y = cell % columns * width + GAP, above + cell // columns * height + GAP
        picture = Image.fromarray(report.images[cell])
        page.paste(picture.resize((side, side), Image.Resampling.NEAREST), (x, y))
        word, ink = ("pass", (20, 120, 50)) if report.passed[cell] else ("fail", (190, 30, 30))
        left, top, last = x - FRAME, y - FRAME, side + FRAME - 1
        draw.rectangle((left, top, x + last, y + last), outline=ink, width=FRAME)
        draw.text((x, y + side + 3), word, ink, font)
        prompt = make_drawable(report.prompts[cell], font)
        text = textwrap.wrap(prompt, letters, max_lines=PROMPT_LINES, placeholder="…")
        draw.multiline_text(
            (x, y + side + 3 + LINE), "\n".join(text), (20, 20, 20), font, spacing=2
        )
    return np.asarray(page)


def _report(pieces: list[tuple[np.ndarray, list[str], dict[str, list]]], total: Any) -> Report:
    if not pieces:
        raise InputError("evaluation: found no rows; expected at least one batch")
    images = np.concatenate([images for images, _, _ in pieces])
    texts = [text for _, some, _ in pieces for text in some]
    columns = {name: [v for _, _, c in pieces for v in c[name]] for name in REQUIRED}
    passed, answers = score_drawings(images, columns), score_answers(texts, columns)
    rates = summarize(passed, columns["category"], answers, total)
    return Report(rates, images, columns["prompt"], passed, answers)


def _inputs(prompts: Prompts, task: str, size: int, seed: int, place: Callable) -> tuple:
    """(encoded prompts, keys) of a batch pad_rows up to `size` rows, on the devices."""
    index = pad_rows(prompts.index, size)
    encoded = jax.tree.map(lambda x: pad_rows(x, size), getattr(prompts, task))
    keys = sampling.sample_keys(seed, index, 1, STREAMS[task])
    # Typed keys are no host arrays: `place` gets their bits.
    encoded, bits = place((encoded, np.asarray(jax.random.key_data(keys))))
    return encoded, jax.random.wrap_key_data(bits)


def _texts(processor: Any, rollout: Any, rows: np.ndarray) -> list[str]:
    tokens, mask = to_host_rows(rollout.tokens), to_host_rows(rollout.mask)
    return [processor.decode(tokens[row][mask[row]]) for row in rows]


def _rows(columns: Mapping[str, list], rows: np.ndarray) -> dict[str, list]:
    return {name: [values[row] for row in rows] for name, values in columns.items()}


def _spec(value: str | Mapping[str, Any]) -> Mapping[str, Any]:
    return json.loads(value) if isinstance(value, str) else value
