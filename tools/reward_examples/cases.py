"""Writes the cases, images and questions, once: later versions must score the same ones.

An existing file is never changed; delete it to make it again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from corl_jax.data import instructions
from corl_jax.data.drawn_world import checker, generator
from corl_jax.runs.pictures import save_png

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "examples" / "rewards"
DRAWINGS, ANSWERS = FOLDER / "drawings.jsonl", FOLDER / "answers.jsonl"
MODEL = ROOT / "corl_jax" / "assets" / "mini_janus"

ROW_SEED, ROW = 7, 189  # of the drawn world's test split: two shapes, a colour each
DRAWING_SEED = 1
OTHER_PROMPT = "a photo of a green circle"
# what the image shows -> (file, 0 for the row's prompt or 1 for the other one, sample's number)
DRAWN = {
    "right": ("right.png", 0, 7),
    "both yellow": ("yellow.png", 0, 1),
    "colours swapped": ("swapped.png", 0, 3),
    "smudged": ("smudged.png", 0, 12),
    "of another prompt": ("other.png", 1, 6),
}
REAL = ("the real image", "real.png")
OD_SIDE = 384  # image side of the boxes in the published question
DETECTED = 1  # entry of the spec whose box t2i_od asks for

CHOICES = ("cross", "triangle", "ring", "circle")
THOUGHT = "the purple object is a triangle, option B."
ANSWER_TEXTS = {
    "MC": (
        f"<think>{THOUGHT}</think><answer>B</answer>",
        "B. triangle",
        "<think>the purple object is a cross, option A.</think><answer>A</answer>",
        f" <think>{THOUGHT}</think><answer>B</answer>",
        f"<think>{THOUGHT}</think><answer>B",
        f"{THOUGHT} <answer>B</answer>",
    ),
    "OE": (
        "<think>the purple object is a triangle.</think><answer>triangle</answer>",
        "<think>the purple object is a triangle.</think><answer>a purple triangle</answer>",
    ),
}

# Answers about an own image: what the prompt demanded (tag, objects), and answers.
OWN_ANSWERS = (
    ("counting", [{"class": "sheep", "count": 2}],
     ("two sheep", "2", "There are two hundred sheep", "two or three sheep")),
    ("two_object", [{"class": "hot dog", "count": 1}, {"class": "oven", "count": 1}],
     ("There is a hot dog and a oven", "a dog in an oven")),
    ("color_attr",
     [{"class": "car", "count": 1, "color": "red"}, {"class": "dog", "count": 1, "color": "blue"}],
     ("a red car and a blue dog", "The car is red and the dog is red",
      "The car is blue and the dog is red")),
    ("position",
     [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}],
     ("The dog is left of the cat", "a cat to the right of a dog", "The cat is left of the dog")),
)  # fmt: skip


def write_missing() -> None:
    """Generates the images and writes the two files of cases, where they are missing."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    row = generator.make_row(ROW_SEED, ROW, split="test", encode=False)
    if not (FOLDER / REAL[1]).exists():
        save_png(FOLDER / REAL[1], row["real_image"])
    if not all((FOLDER / file).exists() for file, _, _ in DRAWN.values()):
        _generate_images(row["prompt"])
    if not DRAWINGS.exists():
        _write_rows(DRAWINGS, _make_image_cases(row))
    if not ANSWERS.exists():
        _write_rows(ANSWERS, _make_answer_cases())


def load_cases(path: Path) -> list[dict[str, Any]]:
    """Reads the cases of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _generate_images(prompt: str) -> None:
    """Generates images of both prompts with the mini Janus and saves the chosen samples."""
    from corl_jax.devices.startup import prepare_devices
    from corl_jax.policies import batched, load_policy
    from corl_jax.policies.family import SamplingOptions

    prepare_devices()
    model = load_policy(MODEL, np.float32)
    options = SamplingOptions(special=model.processor.special, dtype=np.float32)
    # {(prompt, sample): file}: the samples of one run were looked at once, and these were chosen.
    chosen = {(which, number): file for file, which, number in DRAWN.values()}
    samples = 1 + max(number for _, number in chosen)
    for sample in batched.generate_images(
        model, [prompt, OTHER_PROMPT], options, samples=samples,
        batch_size=2 * samples, seed=DRAWING_SEED,
    ):  # fmt: skip
        file = chosen.get((sample.prompt, sample.number))
        if file and not (FOLDER / file).exists():
            save_png(FOLDER / file, np.asarray(sample.pixels))


def _make_image_cases(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns a case for each image, with the columns of one row for every image reward."""
    spec = json.loads(row["spec"])
    shared = {
        "prompt": row["prompt"],
        "real_image": REAL[1],
        "spec": spec,
        "qa_problem": row["qa_problem"],
        "qa_solution": row["qa_solution"],
        "qa_type": row["qa_type"],
        "cls_problem": instructions.ask_open_ended("Which shape is yellow?"),
        "cls_solution": "<answer>cross</answer>",
        "od_problem": instructions.OD.format(category=_describe_entry(spec["include"][DETECTED])),
        "od_solution": _find_boxes(row["real_image"], spec["include"][DETECTED]),
    }
    images = [(REAL[0], REAL[1]), *((shown, file) for shown, (file, _, _) in DRAWN.items())]
    return [{"shows": shown, "image": file, **shared} for shown, file in images]


def _describe_entry(entry: dict[str, Any]) -> str:
    return f"{entry['color']} {entry['class']}"


def _find_boxes(image: np.ndarray, entry: dict[str, Any]) -> list[list[int]]:
    """Returns the boxes of an entry in an image, by the checker, on the question's scale."""
    # The checker's boxes are in [0, 1]; 0.5 -> 192 of the question's 384 pixels.
    return [
        [round(side * OD_SIDE) for side in detection.box]
        for detection in checker.detect(image)
        if (detection.color, detection.shape) == (entry["color"], entry["class"])
    ]


def _make_answer_cases() -> list[dict[str, Any]]:
    question = "Which shape is purple?"
    columns = {
        "MC": (instructions.ask_multiple_choice(question, CHOICES), "<answer>B</answer>"),
        "OE": (instructions.ask_open_ended(question), "<answer>triangle</answer>"),
    }
    return [
        {"completion": text, "problem": columns[kind][0], "solution": columns[kind][1],
         "type": kind}
        for kind, texts in ANSWER_TEXTS.items()
        for text in texts
    ]  # fmt: skip


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")


def open_image(case: dict[str, Any]) -> Image.Image:
    """Returns the image of a case."""
    return Image.open(FOLDER / case["image"]).convert("RGB")
