"""Run directories for tests of reports, written by hand: no model is trained."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import yaml
from PIL import Image

from corl_jax.runs import pictures
from corl_jax.runs.pictures import Cell

PROMPTS = ("a red circle", "two blue squares", "a green cross", "<script>alert(1)</script>&\"'")
GREEN, RED = (20, 120, 50), (190, 30, 30)
STEPS = 6


def draw_images(seed: int, count: int, side: int = 32) -> np.ndarray:
    """Random images, [count, side, side, 3] uint8."""
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), np.uint8)


def write_evaluation_page(folder: Path, step: int, passed: list[bool], side: int = 32) -> Path:
    """The page of an evaluation: a verdict for each of PROMPTS."""
    images = draw_images(step, len(PROMPTS), side)
    cells = [
        Cell(image, frame=GREEN if good else RED, caption=prompt, passed=good)
        for image, prompt, good in zip(images, PROMPTS, passed, strict=True)
    ]
    page = pictures.draw_page(
        [cells], title=f"step {step}: {sum(passed) / 4:.1%} of 4 images match their prompt"
    )
    return pictures.save_png(
        folder / "images" / f"held_out_{step:06d}.png", page.pixels, page.format_notes()
    )


def write_fixed_page(folder: Path, step: int) -> Path:
    """The page of fixed prompts: two images for each of two prompts, with rewards."""
    images = draw_images(step + 100, 4).reshape(2, 2, 32, 32, 3)
    rewards = [[{"checker": 0.25, "<i>own</i>": float("nan")}] * 2] * 2
    page = pictures.draw_samples(images, PROMPTS[-2:], rewards, f"step {step}")
    path = folder / "images" / f"step_{step:06d}.png"
    return pictures.save_png(path, page.pixels, page.format_notes())


def evaluation_line(step: int, drawn: float, answered: float) -> dict[str, float]:
    """A line of an evaluation with intervals of 0.1 to both sides."""
    rates = {"draw/accuracy": drawn, "draw/counting": drawn / 2, "answer/accuracy": answered}
    line: dict[str, float] = {"step": step, "eval/seconds": 1.0}
    for name, rate in rates.items():
        line |= {f"eval/{name}": rate, f"eval/{name}_low": rate - 0.1,
                 f"eval/{name}_high": rate + 0.1}  # fmt: skip
    return line


def training_line(step: int) -> dict[str, Any]:
    """A line of a step of GRPO."""
    return {
        "step": step, "loss": 0.1, "reward": 0.1 * step, "t2i/reward": 0.1 * step,
        "t2i/reward_std": 0.2,
        "t2i/rewards/checker/mean": 0.1 * step, "mm2t/reward": 1.0, "t2i/entropy": 2.0,
        "step_time": 2.0, "phase/rollout_seconds": 0.5, "phase/reward_seconds": 0.25,
        "phase/update_seconds": 1.0, "phase/compile_seconds": 8.0 if step == 1 else 0.0,
        "perf/images_per_second": 640.0, "not_a_number": None, "a_text": "<b>",
    }  # fmt: skip


def write_lines(folder: Path, lines: list[dict[str, Any]]) -> None:
    """Writes metrics.jsonl."""
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")


def write_config(folder: Path, **changes: Any) -> None:
    """Writes config.yaml; `changes` replace blocks."""
    config = {
        "output_dir": str(folder), "stage": "rl", "model": {"path": "nano"},
        "rewards": [{"name": "shapes_checker", "weight": 1.0, "options": {}},
                    {"name": None, "use": "my.py:judge", "weight": 0.5, "options": {"a": 1}}],
        "algorithm": {"name": "grpo", "tasks": "unified", "kl_coef": 0.0},
        "optimizer": {"learning_rate": 0.0002}, "rollout": {"group_size": 2},
        "train": {"prompts_per_step": 4, "max_steps": STEPS},
    }  # fmt: skip
    (folder / "config.yaml").write_text(
        yaml.safe_dump(config | changes, sort_keys=False), encoding="utf-8"
    )


def encode_png(pixels: np.ndarray) -> dict[str, Any]:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return {"bytes": file.getvalue(), "path": None}


def write_samples(folder: Path, step: int, rows: int = 8, group: int = 4) -> Path:
    """Samples of both tasks; row r of t2i has the mean reward r / 10, of mm2t -r / 10."""
    records = []
    for task, sign in (("t2i", 1), ("mm2t", -1)):
        images = draw_images(step, rows * group)
        for at in range(rows * group):
            row, completion = divmod(at, group)
            asks = task == "mm2t"
            records.append({
                "step": step, "task": task, "row": row, "completion": completion,
                "prompt": f"{task} prompt {row} <b>", "image": encode_png(images[at]),
                "text": f"<answer>{completion}</answer>" if asks else None,
                "solution": "<answer>2</answer>" if asks else None, "length": 16,
                "reward": sign * row / 10 + (completion - 1.5) / 100,
                "reward_checker": None, "advantage": completion - 1.5,
            })  # fmt: skip
    path = folder / "samples" / f"step_{step:06d}.parquet"
    path.parent.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return path


def write_run(folder: Path, **changes: Any) -> Path:
    """A finished run of STEPS steps with three evaluations, images and samples."""
    folder.mkdir(parents=True)
    write_config(folder, **changes)
    lines = [evaluation_line(0, 0.2, 0.5)]
    for step in range(1, STEPS + 1):
        lines.append(training_line(step))
        if step % 3 == 0:
            lines.append(evaluation_line(step, 0.2 + 0.1 * step, 0.52))
            write_fixed_page(folder, step)
    write_lines(folder, lines)
    for step, passed in ((0, [False] * 3 + [True]), (3, [True] * 2 + [False] * 2), (6, [True] * 4)):
        write_evaluation_page(folder, step, passed)
    write_samples(folder, 3)
    write_samples(folder, 6)
    summary = {"steps": STEPS, "seconds": 3725.0}
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    given = {
        "config": "mini/unified", "files": ["mini/unified", "mini/<sft>"],
        "overrides": {"train.max_steps": STEPS, "seed": 7, "x.y": [1]},
        "replaced": {"train.max_steps": 90},
    }  # fmt: skip
    provenance = {
        "given": given,
        "steps": STEPS, "devices": "1 x cpu", "commit": "0123456789ab",
        "model": {"path": "nano", "family": "janus", "parameters": 958731, "trained": 500000},
        "versions": {"corl_jax": "0.1.0", "python": "3.11.7", "jax": "0.10.2"},
    }  # fmt: skip
    (folder / "provenance.json").write_text(json.dumps(provenance), encoding="utf-8")
    return folder
