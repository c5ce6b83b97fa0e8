"""Runs of the small second family, docs/examples/bag_family.py: a checkpoint, rows and a config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
from PIL import Image

from corl_jax.models import modules
from corl_jax.weights.export import save_checkpoint
from docs.examples.bag_family import KIND, Bag, BagSizes
from tests.support import tiny_runs
from tests.support.tiny_models import encode, tiny_parquet

RED = "def red(images):\n    return [image.getpixel((0, 0))[0] / 255 for image in images]\n"


def write_files(folder: Path) -> tuple[Path, Path, Path]:
    """Writes a checkpoint of the family, rows, and a file with a reward of images."""
    params = modules.init_params(Bag, BagSizes(), jax.random.key(0))
    save_checkpoint(folder / "model", KIND, BagSizes(), params)
    image = {"bytes": encode(Image.new("RGB", (4, 4), "red")), "path": "red.png"}
    rows = [
        {
            "prompt": f"a red picture {i}", "real_image": image, "qa_problem": f"how many? {i}",
            "qa_solution": "<answer>two</answer>", "qa_type": "OE",
        }
        for i in range(16)
    ]  # fmt: skip
    (folder / "rewards.py").write_text(RED)
    return folder / "model", tiny_parquet(folder / "rows.parquet", rows), folder / "rewards.py"


def options(files: tuple[Path, Path, Path], output: Path, **changes: Any) -> dict[str, Any]:
    """A config of a run of both tasks that learns within 12 steps."""
    model, rows, rewards = files
    tree = tiny_runs.options(
        model, rows, output,
        rewards=[{"use": f"{rewards}:red"}, {"name": "qa_accuracy"}],
        data={"max_prompt_length": 64},
        rollout={"group_size": 8},
        train={"prompts_per_step": 8, "max_steps": 12},
        optimizer={"learning_rate": 0.3, "schedule": "constant"},
        eval={"suite": "rewards", "rows": 8, "batch_prompts": 8, "every": 6},
        checkpoint={"every": 6}, log={"images_every": 6},
    )  # fmt: skip
    for key, value in changes.items():
        tree[key] = tree.get(key, {}) | value if isinstance(value, dict) else value
    return tree
