"""T2I-CompBench: means of its scorers' answers, 0 to 1.

A scorer writes vqa_result.json: a list of `{"question_id": N, "answer": "0.1234"}`, an entry for
each image of a category. The images of a prompt stand together.

Source: Huang et al. 2023 (arXiv 2307.06350); T2I-CompBench, BLIPvqa_eval/BLIP_vqa.py and
3_in_1_eval/3_in_1.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from corl_jax.errors import InputError, Problems
from corl_jax.evaluation.units import Unit
from corl_jax.input_files import read_text

RESULT_FILE = "vqa_result.json"
BLIP, CLIP = "annotation_blip", "annotation_clip"
SPATIAL = (
    "labels/annotation_obj_detection_2d", "annotation_obj_detection_2d",
    "annotation_obj_detection", "labels/annotation_obj_detection",
)  # fmt: skip
"""Folders of the spatial scorer, which differ between its versions."""
SPATIAL_3D = ("labels/annotation_obj_detection_3d", "annotation_obj_detection_3d")
NUMERACY = ("annotation_num", "labels/annotation_num")
COMPLEX, COMPLEX_RESULT = "complex", "annotation_3_in_1"
FOLDERS: dict[str, tuple[str, ...]] = {
    "color": (BLIP,), "shape": (BLIP,), "texture": (BLIP,), "spatial": SPATIAL,
    "3d_spatial": SPATIAL_3D, "non_spatial": (CLIP,), "numeracy": NUMERACY,
    COMPLEX: (COMPLEX_RESULT,),
}  # fmt: skip
"""Category -> folders that may hold its result."""


def read_result(path: Path) -> np.ndarray:
    """Returns the answers of a result file, [images]. Raises: InputError if it is another file."""
    expected = (
        f'expected a list of {{"question_id": NUMBER, "answer": NUMBER}}, as in {RESULT_FILE}'
    )
    text = read_text(path, RESULT_FILE)
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error}); {expected}") from None
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{path}: found no list of answers; {expected}")
    problems, answers = Problems(), []
    for place, row in enumerate(rows):
        with problems.collect(f"{path}: entry {place}: "):
            answers.append(_parse_answer(row))
    problems.raise_any()
    return np.array(answers)


def multiply_chunks(answers: Sequence[np.ndarray], is_asked: Sequence[np.ndarray]) -> np.ndarray:
    """Returns BLIP-VQA's score of each image: the product over its noun chunks, [images].

    `answers` and `is_asked` have an array [images] for each chunk. A chunk that a prompt does not
    have is not asked, and counts 1. Products are of float32 and rounded to four decimals, as the
    scorer writes them.
    """
    product = np.ones(len(answers[0]), np.float32)
    for values, has_chunk in zip(answers, is_asked, strict=True):
        product *= np.where(has_chunk, values, 1.0).astype(np.float32)
    return np.array([float(f"{value:.4f}") for value in product.tolist()])


def read_chunks(folder: Path) -> np.ndarray | None:
    """Returns `multiply_chunks` of a category's folder; None if it holds no chunks.

    Raises: InputError if files of a chunk are missing or do not fit.
    """
    answers, is_asked = [], []
    number = 1
    while (chunk := folder / f"annotation{number}_blip").is_dir():
        answers.append(read_result(chunk / "VQA" / "result" / RESULT_FILE))
        is_asked.append(_read_asked(chunk / "color_test.json"))
        number += 1
    if not answers:
        return None
    sizes = {len(values) for values in (*answers, *is_asked)}
    if len(sizes) > 1:
        raise InputError(
            f"{folder}: its chunks have {' and '.join(map(str, sorted(sizes)))} images; expected "
            "the same number in each annotation*_blip"
        )
    return multiply_chunks(answers, is_asked)


def combine_complex(
    attribute: np.ndarray, spatial: np.ndarray, action: np.ndarray,
    prompts: Sequence[str], spatial_prompts: Sequence[str], action_prompts: Sequence[str],
    images_per_prompt: int = 10,
) -> np.ndarray:  # fmt: skip
    """Returns the 3-in-1 score of each image of `complex`, [images].

    It is the mean of attribute and spatial if the prompt is one of `spatial_prompts`, else of
    attribute and action (CLIP) if it is one of `action_prompts`, else of all three.
    Raises: InputError if the numbers of images do not fit.
    """
    expected = len(prompts) * images_per_prompt
    sizes = {"attribute": len(attribute), "spatial": len(spatial), "action": len(action)}
    wrong = [f"{name} {size}" for name, size in sizes.items() if size != expected]
    if wrong:
        raise InputError(
            f"complex: found answers of {', '.join(wrong)}; expected {expected}, "
            f"{images_per_prompt} for each of {len(prompts)} prompts"
        )
    spatial_names, action_names = set(spatial_prompts), set(action_prompts)
    kinds = np.array(
        [0 if text in spatial_names else 1 if text in action_names else 2 for text in prompts]
    ).repeat(images_per_prompt)
    means = (
        (spatial + attribute) * 0.5,
        (action + attribute) * 0.5,
        (attribute + spatial + action) / 3,
    )
    return np.choose(kinds, means)


def read_prompts(path: Path) -> list[str]:
    """Reads a prompt file as the 3-in-1 scorer does: up to the first full stop, in lower case.

    Carriage returns at line ends are dropped, which the scorer's `open` does too.
    """
    text = read_text(path, "prompts, one a line").replace("\r\n", "\n").replace("\r", "\n")
    return [line.split(".")[0].lower() for line in text.removesuffix("\n").split("\n")]


def find_result(folder: Path, category: str) -> np.ndarray:
    """Returns the answers of a category's folder, [images].

    Raises: InputError if no scorer has written them.
    """
    for name in FOLDERS[category]:
        if (path := folder / name / RESULT_FILE).is_file():
            return read_result(path)
    chunks = read_chunks(folder) if BLIP in FOLDERS[category] else None
    if chunks is None:
        names = ", ".join(f"{name}/{RESULT_FILE}" for name in FOLDERS[category])
        raise InputError(f"{folder}: found no {names}; run the scorer of {category} first")
    return chunks


def find_complex(folder: Path, prompts_folder: Path, images_per_prompt: int) -> np.ndarray:
    """Returns the 3-in-1 scores of the folder of `complex` from its three scorers, [images].

    Raises: InputError listing scorers and prompt files that are missing or do not fit.
    """
    problems = Problems()
    parts = [problems.attempt(find_result, folder, name) for name in ("color", "spatial")]
    parts.append(problems.attempt(find_result, folder, "non_spatial"))
    lists = [
        problems.attempt(read_prompts, prompts_folder / f"complex_val{part}.txt")
        for part in ("", "_spatial", "_action")
    ]
    problems.raise_any()
    return combine_complex(*parts, *lists, images_per_prompt)  # type: ignore[arg-type]


def make_units(answers: np.ndarray, category: str, images_per_prompt: int) -> list[Unit]:
    """Returns a unit for each prompt, the mean of its images, in the order of the prompt file.

    Raises: InputError if the images are no multiple of `images_per_prompt`.
    """
    if len(answers) % images_per_prompt:
        raise InputError(
            f"{category}: found {len(answers)} images; expected a multiple of {images_per_prompt} "
            "(see --images-per-prompt)"
        )
    means = answers.reshape(-1, images_per_prompt).mean(axis=1)
    return [
        Unit(f"{category}/{number:03}", category, {"score": float(mean)})
        for number, mean in enumerate(means)
    ]


def _parse_answer(row: Any) -> float:
    try:
        answer = float(row["answer"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"found {str(row)[:60]}; expected an `answer` that is a number") from error
    if not math.isfinite(answer):
        raise InputError(f"answer is {answer}; expected a finite number")
    return answer


def _read_asked(path: Path) -> np.ndarray:
    text = read_text(path, "JSON")
    try:
        return np.array([row["question"] != "" for row in json.loads(text)])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: {type(error).__name__} {error}; expected a list of objects with `question`, "
            "as BLIP_vqa.py writes it"
        ) from None
