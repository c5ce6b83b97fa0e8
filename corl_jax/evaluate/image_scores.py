"""Scores the images of a drawn evaluation, and writes its report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

from corl_jax.devices import processes
from corl_jax.evaluate.draw_run import Drawing, write_report
from corl_jax.evaluate.preference import Scorer
from corl_jax.evaluation.image_store import remove_temporary, write_whole
from corl_jax.evaluation.preference import make_units, summarize_units
from corl_jax.evaluation.units import SCORES_FILE, format_units
from corl_jax.rewards import networks
from corl_jax.rewards.registry import Context, Samples

PROMPTS_AT_ONCE = 128  # whose images are in memory


def score_drawing(drawing: Drawing, scorers: Mapping[str, Scorer]) -> dict[str, np.ndarray]:
    """Returns each score of all images, [prompts, images]; every process gets all of them."""
    index, count = jax.process_index(), jax.process_count()
    rows = drawing.plan.rows
    # Gathered arrays have one shape: 5 prompts, 2 processes: [0, 1, 2] and [3, 4, 4].
    size = -(-rows // count)
    own_rows = np.minimum(np.arange(index * size, (index + 1) * size), rows - 1)
    scores = {}
    for name, scorer in scorers.items():
        values = _score_rows(drawing, name, scorer, own_rows)
        scores[name] = processes.all_gather(values).reshape(-1, drawing.plan.samples)[:rows]
    return scores


def _score_rows(drawing: Drawing, name: str, scorer: Scorer, rows: np.ndarray) -> np.ndarray:
    """Returns a score of the images of some prompts, [rows, images] float32."""
    plan, (reward, checked) = drawing.plan, scorer
    # One score's networks at a time: all of them need 13 GB in float32.
    loaded = {
        network.name: networks.load_frozen_network(network, drawing.mesh, offload=False)
        for network in checked
    }
    context = Context(
        family=None, config=None, params=None, processor=None, dtype=None, seed=0, step=0,
        networks=loaded,
    )  # fmt: skip
    paths: dict[int, list[Path]] = {}
    for file in plan.files:
        paths.setdefault(file.prompt, []).append(plan.args.out / file.path)
    pieces = []
    is_silent = True if jax.process_index() else None
    with tqdm(total=len(rows), unit=" prompts", desc=name, disable=is_silent) as bar:
        for first in range(0, len(rows), PROMPTS_AT_ONCE):
            numbers = rows[first : first + PROMPTS_AT_ONCE].tolist()
            texts = [plan.prompts.prompts[n].text for n in numbers for _ in range(plan.samples)]
            images = np.stack([_read_image(path) for n in numbers for path in paths[n]])
            samples = Samples({"prompt": texts}, images=images)
            pieces.append(np.asarray(reward.function(samples, context), np.float32))
            bar.update(len(numbers))
    return np.concatenate(pieces).reshape(len(rows), plan.samples)


def _read_image(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def write_scores(drawing: Drawing, scores: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Writes scores.jsonl and report.json; returns the means with their intervals."""
    out = drawing.plan.args.out
    units = make_units(drawing.plan.drawn.prompts, scores)
    summary = summarize_units(units)
    write_whole(out, SCORES_FILE, format_units(units).encode(errors="backslashreplace"))
    write_report(out, drawing.settings, drawing.summary, **summary)
    remove_temporary(out)
    return summary


def tell_scores(summary: Mapping[str, Any], out: Path) -> None:
    """Prints the mean of each score with its interval."""
    width = max(len("scores"), *map(len, summary["scores"]))
    for name, score in summary["scores"].items():
        print(
            f"{name:{width}}  {score['mean']:.4f} ({score['low']:.4f} - {score['high']:.4f}), "
            f"{score['prompts']:,} prompts"
        )
    print(f"{'scores':{width}}  {out / SCORES_FILE}")
