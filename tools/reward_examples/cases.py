"""The cases: pictures and questions, written once and kept, so that later versions score the same.

A file that exists is never touched; delete it to have it made anew.
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
# what is seen -> (file, 0 for the row's prompt or 1 for the other one, number of the sample)
DRAWN = {
    "right": ("right.png", 0, 7),
    "both yellow": ("yellow.png", 0, 1),
    "colours swapped": ("swapped.png", 0, 3),
    "smudged": ("smudged.png", 0, 12),
    "of another prompt": ("other.png", 1, 6),
}
REAL = ("the real image", "real.png")
OD_SIDE = 384  # to which the published question's boxes refer
DETECTED = 1  # entry of the demand whose box t2i_od asks for

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


def write_missing() -> None:
    """Draws the pictures and writes the two files of cases, where they are not there yet."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    row = generator.make_row(ROW_SEED, ROW, split="test", encode=False)
    if not (FOLDER / REAL[1]).exists():
        save_png(FOLDER / REAL[1], row["real_image"])
    if not all((FOLDER / file).exists() for file, _, _ in DRAWN.values()):
        _draw(row["prompt"])
    if not DRAWINGS.exists():
        _write(DRAWINGS, _drawing_cases(row))
    if not ANSWERS.exists():
        _write(ANSWERS, _answer_cases())


def read(path: Path) -> list[dict[str, Any]]:
    """The cases of a file as they stand there."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _draw(prompt: str) -> None:
    """What the mini Janus draws for both prompts; of its samples the chosen ones are kept."""
    from corl_jax import startup
    from corl_jax.policies import batched

    startup.prepare_devices()
    model = startup.load_model(MODEL, np.float32)
    chosen = {(which, number): file for file, which, number in DRAWN.values()}
    samples = 1 + max(number for _, number in chosen)
    for sample in batched.draw_images(
        model, [prompt, OTHER_PROMPT], dtype=np.float32, samples=samples,
        batch_size=2 * samples, seed=DRAWING_SEED,
    ):  # fmt: skip
        file = chosen.get((sample.prompt, sample.number))
        if file and not (FOLDER / file).exists():
            save_png(FOLDER / file, np.asarray(sample.pixels))


def _drawing_cases(row: dict[str, Any]) -> list[dict[str, Any]]:
    """A case a picture; all share the row, so that one file does for every reward of drawings."""
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
        "od_problem": instructions.OD.format(category=_named(spec["include"][DETECTED])),
        "od_solution": _boxes(row["real_image"], spec["include"][DETECTED]),
    }
    pictures = [(REAL[0], REAL[1]), *((shown, file) for shown, (file, _, _) in DRAWN.items())]
    return [{"shows": shown, "image": file, **shared} for shown, file in pictures]


def _named(entry: dict[str, Any]) -> str:
    return f"{entry['color']} {entry['class']}"


def _boxes(image: np.ndarray, entry: dict[str, Any]) -> list[list[int]]:
    """Where the checker finds the entry in a picture, on the question's scale."""
    return [
        [round(side * OD_SIDE) for side in one.box]
        for one in checker.detect(image)
        if (one.color, one.shape) == (entry["color"], entry["class"])
    ]


def _answer_cases() -> list[dict[str, Any]]:
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


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")


def picture(case: dict[str, Any]) -> Image.Image:
    """A drawing case's picture."""
    return Image.open(FOLDER / case["image"]).convert("RGB")
