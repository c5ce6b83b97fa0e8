"""T25: thousands of steps with flat memory, descriptors, threads and number of programs."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests import tiny_train
from tests.tiny import tiny_parquet, tiny_row
from tests.tiny_train import metric_lines, write_config

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "JAX_LOG_COMPILES": "1", "NPROC": "2"}
WARM = 0.3  # share of the run after which nothing may grow


@dataclasses.dataclass(frozen=True)
class Sample:
    """A look at a run when it printed a step."""

    step: int
    rss: float  # MB
    descriptors: int
    threads: int
    programs: int  # compiled so far


def soak(tmp_path: Path, tree: dict) -> list[Sample]:
    """Runs the train command to its end and looks at it after each logged step."""
    config = write_config(tmp_path / "soak.yaml", tree)
    run = subprocess.Popen(
        [sys.executable, "-m", "corl_jax.train", "--config", str(config)],
        env=ENVIRONMENT, text=True, stderr=subprocess.PIPE, cwd=tmp_path,
    )  # fmt: skip
    watched, samples, programs, lines = psutil.Process(run.pid), [], 0, []
    for line in run.stderr:
        lines.append(line)
        programs += "Finished XLA compilation" in line
        if step := re.match(r"step (\d+)/", line):
            with watched.oneshot():
                sample = Sample(
                    int(step[1]), watched.memory_info().rss / 2**20, watched.num_fds(),
                    watched.num_threads(), programs,
                )  # fmt: skip
            samples.append(sample)
    assert run.wait() == 0, "".join(lines[-40:])
    return samples


def per_thousand(samples: list[Sample], name: str) -> float:
    """The slope of a straight line through the second part of the run, per 1,000 steps."""
    steps = np.array([sample.step for sample in samples], float)
    values = np.array([getattr(sample, name) for sample in samples], float)
    late = steps >= WARM * steps[-1]
    return 1000 * float(np.polyfit(steps[late], values[late], 1)[0])


def growth(samples: list[Sample]) -> dict[str, float]:
    names = ("rss", "descriptors", "threads", "programs")
    return {name: per_thousand(samples, name) for name in names}


def sft_run(model: Path, tmp_path: Path, steps: int) -> dict:
    """The cheapest steps: answers to two questions; one of the rows cannot be decoded."""
    bad = {3: {"real_image": {"bytes": b"no picture", "path": "3.png"}}}
    rows = [tiny_row(i, sft_answer="two", **bad.get(i, {})) for i in range(32)]
    return tiny_train.options(
        model, tiny_parquet(tmp_path / "rows.parquet", rows), tmp_path / "run",
        objective="sft", rewards=[], export={"layout": "none"},
        sft={"t2i_weight": 0.0, "caption_column": None}, data={"max_bad_fraction": 0.1},
        train={"max_steps": steps, "prompts_per_step": 2},
        log={"every": max(1, steps // 100)}, checkpoint={"every": steps // 5},
    )  # fmt: skip


def grpo_run(model: Path, tmp_path: Path, steps: int) -> dict:
    """Everything that a step can do, at its smallest; a reward of the user's, and evaluations."""
    (tmp_path / "mine.py").write_text("def size(texts):\n    return [len(t) for t in texts]\n")
    return tiny_train.options(
        model, tiny_train.rows_file(tmp_path / "rows.parquet", 16), tmp_path / "run",
        rewards=[{"use": "mine.py:size"}, {"name": "t2i_pixel_mse"}],
        rollout={"max_new_tokens": 4}, grpo={"kl_coef": 0.01}, export={"layout": "none"},
        train={"max_steps": steps, "prompts_per_step": 2},
        eval={"suite": "rewards", "rows": 2, "batch_prompts": 2, "every": steps // 20},
        log={"every": max(1, steps // 100), "images_every": steps // 10, "fixed_prompts": 2},
        checkpoint={"every": steps // 10},
    )  # fmt: skip


def report(figure, samples: list[Sample], began: float, name: str, losses: int) -> None:
    found = growth(samples)
    note = (
        f"per 1,000: RSS {found['rss']:+.2f} MB, descriptors {found['descriptors']:+.2f}, "
        f"threads {found['threads']:+.2f}, programs {found['programs']:+.2f}; "
        f"{1000 * (time.monotonic() - began) / samples[-1].step:.0f} s"
    )
    print(samples[0], samples[len(samples) // 3], samples[-1], note)
    figure("T25", fault=f"soak, {name}", tries=samples[-1].step, losses=losses, note=note)


def leaks(samples: list[Sample], megabytes: float) -> list[str]:
    """What grows; `megabytes` of RSS per 1,000 steps are let pass."""
    found = growth(samples)
    limits = {"rss": megabytes, "descriptors": 0.5, "threads": 0.5, "programs": 0.5}
    return [f"{name} {found[name]:+.2f}" for name, limit in limits.items() if found[name] > limit]


def test_two_hundred_steps(model, tmp_path, figure):
    """Short: memory settles for hundreds of steps, so only large leaks show in it."""
    began = time.monotonic()
    samples = soak(tmp_path, sft_run(model, tmp_path, 200))
    late = [sample for sample in samples if sample.step >= 100]
    grown = late[-1].rss - late[0].rss
    programs = late[-1].programs - late[0].programs
    descriptors = late[-1].descriptors - late[0].descriptors
    threads = late[-1].threads - late[0].threads
    report(figure, samples, began, "sft, short", int(programs > 0))
    assert samples[-1].programs > 0, "no compilation was seen, so none could be counted"
    assert grown < 30 and programs == 0 and abs(descriptors) <= 4 and abs(threads) <= 4
    line = metric_lines(tmp_path / "run")[-1]
    assert line["data/bad_rows"] == 1 and line["update/skipped_total"] == 0
    events = b"".join(path.read_bytes() for path in (tmp_path / "run/tensorboard").iterdir())
    assert b"data/bad_rows" in events and b"update/skipped_total" in events
    figure("T8", fault="bad rows in metrics and TensorBoard", tries=1, losses=0)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "steps"), [("sft", 5000), ("grpo", 1000)])
def test_thousands_of_steps(model, tmp_path, kind, steps, figure):
    make = {"sft": sft_run, "grpo": grpo_run}[kind]
    began = time.monotonic()
    samples = soak(tmp_path, make(model, tmp_path, steps))
    found = leaks(samples, megabytes=2.0)
    report(figure, samples, began, kind, len(found))
    assert samples[-1].programs > 0, "no compilation was seen, so none could be counted"
    assert not found
