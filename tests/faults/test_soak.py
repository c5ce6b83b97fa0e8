"""T25: thousands of steps with flat memory, descriptors, threads and number of programs.

The runs are as long as they are because things that end, or are not ours, look like growth in a
shorter one: docs/measured/faults.md, "Memory over thousands of steps".
"""

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

from tests.support import tiny_runs
from tests.support.tiny_models import tiny_parquet, tiny_row
from tests.support.tiny_runs import metric_lines, write_config

ROOT = Path(__file__).resolve().parents[2]
ALLOCATOR = {
    # glibc keeps what is freed, in an arena per thread, and the resident set of a loop of nothing
    # but one jitted step then moves by 18 MB. With these it shows what is held, to 0.1 MB.
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**17),
    "MALLOC_TRIM_THRESHOLD_": str(2**17),
}
ENVIRONMENT = os.environ | ALLOCATOR
ENVIRONMENT |= {"PYTHONPATH": str(ROOT), "JAX_LOG_COMPILES": "1", "NPROC": "2"}
WARM = 0.3  # share of the run after which nothing may grow


@dataclasses.dataclass(frozen=True)
class Sample:
    """A look at a run when it printed a step."""

    step: int
    rss: float  # MB
    held: float  # MB that malloc gave out and did not get back
    blocks: int  # that Python's own allocator did
    descriptors: int
    threads: int
    programs: int  # compiled so far


def soak(tmp_path: Path, tree: dict) -> list[Sample]:
    """Runs the train command to its end and looks at it after each logged step."""
    config = write_config(tmp_path / "soak.yaml", tree)
    run = subprocess.Popen(
        [sys.executable, "-m", "tests.faults.weighed", "--config", str(config)],
        env=ENVIRONMENT, text=True, stderr=subprocess.PIPE, cwd=tmp_path,
    )  # fmt: skip
    watched, samples, programs, lines = psutil.Process(run.pid), [], 0, []
    held = blocks = 0
    for line in run.stderr:
        lines.append(line)
        programs += "Finished XLA compilation" in line
        if holds := re.match(r"holds (\d+) bytes, (\d+) blocks", line):
            held, blocks = map(int, holds.groups())
        if step := re.match(r"step (\d+)/", line):
            with watched.oneshot():
                sample = Sample(
                    int(step[1]), watched.memory_info().rss / 2**20, held / 2**20, blocks,
                    watched.num_fds(), watched.num_threads(), programs,
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
    names = [field.name for field in dataclasses.fields(Sample) if field.name != "step"]
    return {name: per_thousand(samples, name) for name in names}


def sft_run(model: Path, tmp_path: Path, steps: int) -> dict:
    """The cheapest steps: answers to two questions; one of the rows cannot be decoded."""
    bad = {3: {"real_image": {"bytes": b"no picture", "path": "3.png"}}}
    rows = [tiny_row(i, sft_answer="two", **bad.get(i, {})) for i in range(32)]
    return tiny_runs.options(
        model, tiny_parquet(tmp_path / "rows.parquet", rows), tmp_path / "run",
        stage="sft", rewards=[], export={"layout": "none"},
        sft={"t2i_weight": 0.0, "caption_column": None}, data={"max_bad_fraction": 0.1},
        train={"max_steps": steps, "prompts_per_step": 2},
        log={"every": max(1, steps // 100)}, checkpoint={"every": max(40, steps // 20)},
    )  # fmt: skip


def grpo_run(model: Path, tmp_path: Path, steps: int) -> dict:
    """Everything that a step can do, at its smallest; a reward of the user's, and evaluations."""
    (tmp_path / "mine.py").write_text("def size(texts):\n    return [len(t) for t in texts]\n")
    return tiny_runs.options(
        model, tiny_runs.rows_file(tmp_path / "rows.parquet", 16), tmp_path / "run",
        rewards=[{"use": "mine.py:size"}, {"name": "t2i_pixel_mse"}],
        rollout={"max_new_tokens": 4}, algorithm={"kl_coef": 0.01}, export={"layout": "none"},
        train={"max_steps": steps, "prompts_per_step": 2},
        eval={"suite": "rewards", "rows": 2, "batch_prompts": 2, "every": steps // 80},
        log={"every": max(1, steps // 100), "images_every": steps // 40},
        checkpoint={"every": steps // 40},
    )  # fmt: skip


def report(figure, samples: list[Sample], began: float, name: str, losses: int) -> None:
    found = growth(samples)
    note = (
        f"per 1,000: RSS {found['rss']:+.2f} MB, held {found['held']:+.2f} MB, "
        f"blocks {found['blocks']:+.0f}, descriptors {found['descriptors']:+.2f}, "
        f"threads {found['threads']:+.2f}, programs {found['programs']:+.2f}; "
        f"{1000 * (time.monotonic() - began) / samples[-1].step:.0f} s"
    )
    print(samples[0], samples[len(samples) // 3], samples[-1], note)
    figure("T25", fault=f"soak, {name}", tries=samples[-1].step, losses=losses, note=note)


def leaks(samples: list[Sample], megabytes: float, blocks: float) -> list[str]:
    """What grows; `megabytes` and `blocks` per 1,000 steps are let pass."""
    found = growth(samples)
    limits = {"rss": megabytes, "held": megabytes, "blocks": blocks}
    limits |= {"descriptors": 0.5, "threads": 0.5, "programs": 0.5}
    return [f"{name} {found[name]:+.2f}" for name, limit in limits.items() if found[name] > limit]


def test_two_hundred_steps(model, tmp_path, figure):
    """Short: the resident set settles for hundreds of steps, so only large leaks show in that."""
    began = time.monotonic()
    samples = soak(tmp_path, sft_run(model, tmp_path, 200))
    late = [sample for sample in samples if sample.step >= 100]
    grown, more = late[-1].rss - late[0].rss, late[-1].held - late[0].held
    programs = late[-1].programs - late[0].programs
    descriptors = late[-1].descriptors - late[0].descriptors
    threads = late[-1].threads - late[0].threads
    report(figure, samples, began, "sft, short", int(programs > 0))
    assert samples[-1].programs > 0, "no compilation was seen, so none could be counted"
    assert grown < 30 and late[0].held > 0 and more < 8  # MB; tensorstore's buffers have 3.5 each
    assert programs == 0 and abs(descriptors) <= 4 and abs(threads) <= 4
    line = metric_lines(tmp_path / "run")[-1]
    assert line["data/bad_rows"] == 1 and line["update/skipped_total"] == 0
    events = b"".join(path.read_bytes() for path in (tmp_path / "run/tensorboard").iterdir())
    # Numbers that have never been above 0 are left out of TensorBoard.
    assert b"data/bad_rows" in events and b"update/skipped_total" not in events
    figure("T8", fault="bad rows in metrics and TensorBoard", tries=1, losses=0)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "steps", "blocks"), [("sft", 20_000, 1500), ("grpo", 4000, 7000)])
def test_thousands_of_steps(model, tmp_path, kind, steps, blocks, figure):
    """`blocks`: tensorstore keeps 500 at each save, ten of which fall on 1,000 steps of GRPO."""
    make = {"sft": sft_run, "grpo": grpo_run}[kind]
    began = time.monotonic()
    samples = soak(tmp_path, make(model, tmp_path, steps))
    found = leaks(samples, 2.0, blocks)
    report(figure, samples, began, kind, len(found))
    assert samples[-1].programs > 0, "no compilation was seen, so none could be counted"
    assert samples[-1].held > 0, "the run did not say what it holds"
    assert not found
