"""Rewards that need no network: from Samples to the text, pixel and drawn-world scores."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np

from corl_jax.config.fields import Fraction
from corl_jax.data.drawn_world import checker
from corl_jax.data.drawn_world.scene import CATEGORIES, RELATIONS, Spec
from corl_jax.errors import InputError
from corl_jax.rewards import answers, image, text
from corl_jax.rewards.answers import QuestionType
from corl_jax.rewards.samples import Context, Samples, in_pieces

IMAGES_AT_ONCE = 16  # compared with their real ones; bounds float32 temporaries
MOST_OBJECTS = 2**16  # that a demand may count
LONGEST_SHOWN = 200  # characters of a value in a message

ImageTerm = Literal["rmse", "mse", "ssim", "psnr"]
Fit = Literal["squash", "centre_crop", "pad"]

# ---- answers


def well_formed(
    samples: Samples, context: Context, *, strip: bool = True, repeated_blocks: bool = False
) -> np.ndarray:
    """1 for one think block followed by one answer block; see `text.format_reward`.

    `strip` drops white space around both.
    """
    score = functools.partial(text.format_reward, strip=strip, repeated_blocks=repeated_blocks)
    return each(score, samples.written())


def tags(samples: Samples, context: Context) -> np.ndarray:
    """0.125 for each of the four tags that occurs exactly once."""
    return each(text.format_tag_reward, samples.written())


def qa_accuracy(
    samples: Samples,
    context: Context,
    *,
    multiline_answer: bool = True,
    answer_in_thoughts: bool = False,
    numbers_by_value: bool = True,
    mc: bool = True,
    default_type: QuestionType | None = None,
) -> np.ndarray:
    """How right the answers are; see `text.qa_accuracy` for the options.

    `default_type` is the type of rows without one, which count as OE where it is None.

    Raises:
        InputError: a type that is neither MC nor OE, by its row.
    """

    def score_answer(completion, solution, kind, problem) -> float:
        return text.qa_accuracy(
            completion, solution, kind or default_type,
            problem=problem, multiline_answer=multiline_answer,
            answer_in_thoughts=answer_in_thoughts, numbers_by_value=numbers_by_value, mc=mc,
        )  # fmt: skip

    solutions, problems = samples.column("qa_solution"), samples.column("qa_problem")
    return each(score_answer, samples.written(), solutions, question_types(samples), problems)


def question_types(samples: Samples) -> list[QuestionType | None]:
    """Each row's `qa_type` as MC or OE, None for null.

    Raises:
        InputError: listing the rows whose type is neither.
    """
    types, problems = [], []
    for row, value in enumerate(samples.column("qa_type")):
        try:
            types.append(answers.read_question_type(value))
        except InputError as error:
            problems += [f"row {row}: qa_type: {problem}" for problem in error.problems]
    if problems:
        raise InputError(problems)
    return types


def oc_accuracy(
    samples: Samples,
    context: Context,
    *,
    multiline_answer: bool = True,
    answer_in_thoughts: bool = False,
    substrings: bool = False,
) -> np.ndarray:
    """How well the answers name a class; see `text.oc_accuracy` for the options.

    Rows without `cls_solution` use `qa_solution`.
    """
    score = functools.partial(
        text.oc_accuracy,
        multiline_answer=multiline_answer,
        answer_in_thoughts=answer_in_thoughts,
        substrings=substrings,
    )
    _, solutions = classification(samples)
    return each(score, samples.written(), solutions)


def classification(samples: Samples) -> tuple[list, list]:
    """(questions, solutions): each row's `cls_` columns, or its `qa_` ones without a solution."""
    columns = {
        kind: (samples.column(f"{kind}_problem"), samples.column(f"{kind}_solution"))
        for kind in ("cls", "qa")
    }
    kinds = ["cls" if solution else "qa" for solution in columns["cls"][1]]
    questions = [columns[kind][0][row] for row, kind in enumerate(kinds)]
    return questions, [columns[kind][1][row] for row, kind in enumerate(kinds)]


def each(function: Callable[..., float], *lists: list) -> np.ndarray:
    """`function` of each row's values, [N] float32."""
    return np.array([function(*row) for row in zip(*lists, strict=True)], np.float32)


# ---- images


def pixel_mse(samples: Samples, context: Context, *, image_fit: Fit = "squash") -> np.ndarray:
    """1 - sliding-window RMSE to the real image, in [-1, 1]; NaN without one."""
    return compare_images(samples, context, "pixel_mse", image_fit)


def compare_images(samples: Samples, context: Context, score: str, fit: str) -> np.ndarray:
    """The images against their real ones [N], brought to size as `fit` says; NaN without one.

    `score` is `pixel_mse` or a key of `image.IMAGE_TERMS`.

    Raises:
        InputError: the images are too small for the score.
    """
    generated = samples.drawn()
    real = _real_images(samples.column("real_image"), generated.shape[1], fit)
    blank = np.zeros(generated.shape[1:], np.float32)  # keeps the program's shape; dropped below

    def take(index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        pictures = [real[i] for i in index]
        pixels = generated[index].astype(np.float32) / np.float32(255)
        return pixels, np.stack([blank if picture is None else picture for picture in pictures])

    program = functools.partial(_compare, score)
    (scores,) = in_pieces(program, take, len(samples), IMAGES_AT_ONCE, context.params)
    return np.where([picture is None for picture in real], np.float32(np.nan), scores)


@functools.partial(jax.jit, static_argnames=("score",))
def _compare(score: str, generated: jax.Array, real: jax.Array) -> jax.Array:
    if score == "pixel_mse":
        return image.pixel_mse_reward(generated, real)
    return image.image_term(score, generated, real)


def _real_images(pictures: list, size: int, fit: str) -> list[np.ndarray | None]:
    # The completions of a prompt share one picture object, so it is resized once.
    fitted: dict[int, np.ndarray] = {}
    for picture in pictures:
        if picture is not None and id(picture) not in fitted:
            fitted[id(picture)] = image.fit(picture, size, fit)
    return [fitted.get(id(picture)) for picture in pictures]


def shapes(
    samples: Samples, context: Context, *, strict: bool = True, partial_credit: Fraction = 0.0
) -> np.ndarray:
    """1 for a picture that holds what the row's `spec` demands, by the drawn world's checker.

    `strict`: and nothing else. A picture that fails earns `partial_credit` times the share of
    its objects that are demanded ones: objects found as demanded / the larger of the numbers
    found and demanded. NaN without a spec.

    Raises:
        InputError: a spec that cannot be read.
    """
    specs, problems = samples.column("spec"), []
    for row, spec in enumerate(specs):
        problem = None if spec is None else spec_problem(spec)
        if problem:
            problems.append(f"row {row}: spec: {problem}")
    if problems:
        raise InputError(problems)

    def one(picture: np.ndarray, spec: Spec | str | None) -> float:
        if spec is None:
            return float("nan")
        demand: Spec = json.loads(spec) if isinstance(spec, str) else spec
        found = checker.detect(picture)
        if checker.satisfies(found, demand, strict=strict):
            return 1.0
        return partial_credit * _share(found, demand)

    return each(one, list(samples.drawn()), specs)


def _share(found: list[checker.Detection], demand: Spec) -> float:
    right = 0
    for entry in demand["include"]:
        color = entry.get("color")
        same = [d for d in found if d.shape == entry["class"] and color in (None, d.color)]
        right += min(len(same), entry["count"])
    return right / max(len(found), sum(entry["count"] for entry in demand["include"]))


def column_problem(name: str, value: Any) -> str | None:
    """What is wrong with a row's value of a column that rewards read, None if nothing is.

    Null is a value everywhere: the reward then does not apply. Pictures are read elsewhere.
    """
    if value is None:
        return None
    if name == "spec":
        return spec_problem(value)
    if name == "od_solution" and isinstance(value, list):
        boxes = all(isinstance(box, list) and len(box) == 4 for box in value)
        sides = [side for box in value for side in box] if boxes else []
        boxes = boxes and all(type(one) in (int, float) and abs(one) < 2**31 for one in sides)
        return None if boxes else f"found {_shown(value)}, expected [[x1, y1, x2, y2], ..]"
    if not isinstance(value, str):
        return f"found {_shown(value)}, expected a text"
    if name == "qa_type":
        try:
            answers.read_question_type(value)
        except InputError as error:
            return str(error)
    return None


def is_blank(name: str, value: Any) -> bool:
    """Whether a row's value of a column says nothing, so that no reward applies by it.

    Null, a text of white space, a solution whose answer is empty, boxes that cannot be read.
    """
    if value is None:
        return True
    if not isinstance(value, str):
        return False
    if name == "od_solution":
        return answers.parse_detections(answers.true_answer(value)) is None
    return not (answers.true_answer(value) if name.endswith("_solution") else value.strip())


def spec_problem(value: Any) -> str | None:
    """What is wrong with a demand of the drawn world (dict or JSON), None if nothing is."""
    wanted = (
        "expected {category, include: [{class, count, color?, position?}, ..]}, count a whole "
        "number from 1, position [relation, index of an entry]"
    )
    try:
        spec = json.loads(value) if isinstance(value, str) else value
        include = spec["include"]
        known = spec["category"] in CATEGORIES and isinstance(include, list) and bool(include)
        for entry in include:
            relation, other = entry.get("position", (RELATIONS[0], 0))
            known = known and isinstance(entry["class"], str) and relation in RELATIONS
            known = known and isinstance(entry.get("color"), str | None)
            known = known and _whole(entry["count"], 1, MOST_OBJECTS)
            known = known and type(other) is int and 0 <= other < len(include)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        why = f"{type(error).__name__}: {error}"[:LONGEST_SHOWN]
        return f"found {_shown(value)} ({why}); {wanted}"
    return None if known else f"found {_shown(value)}; {wanted}"


def _whole(value: Any, least: int, most: int) -> bool:
    """Whether it is a whole number in these bounds; 2.0, as tables write it, is one."""
    return type(value) in (int, float) and least <= value <= most and value == int(value)


def _shown(value: Any) -> str:
    """A value from a file in a message: neither long nor deep."""
    try:
        text = repr(value)
    except RecursionError:
        return f"a {type(value).__name__} nested too deeply"
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}.."
