"""Runs the commands of the quickstart one after the other, and sums up what came out."""

from __future__ import annotations

import dataclasses
import math
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from corl_jax.config import files as config_files
from corl_jax.config.schema import Config
from corl_jax.config.shipped import find_config
from corl_jax.errors import InputError, Problems
from corl_jax.estimates import read_estimate
from corl_jax.quickstart.models import DEFAULT, STARTS, Start
from corl_jax.report.figures import draw_before_after
from corl_jax.runs import pictures
from corl_jax.runs.directory import RunDir, to_json
from corl_jax.runs.json_lines import read_lines

WORLD = "small"
# Fresh seeds: neither was used when the options of the configs were chosen.
TRAIN_SEED, TEST_SEED = 21, 22


def run_quickstart(out: Path, overrides: Sequence[str], start: Start) -> None:
    """Runs what is not done yet in `out`, and prints what came out.

    Raises:
        InputError: an override is wrong, or the run is too short to compare anything.
    """
    work = Work(out, overrides, start)
    for title, command, result in work.list_steps():
        if result is not None and result.exists():
            print_title(f"{title}: {result} is there already")
            continue
        print_title(title)
        run_command(command)
    summarize(work)


@dataclasses.dataclass(frozen=True)
class Work:
    """The folders of a quickstart and the commands that fill them."""

    out: Path
    overrides: Sequence[str] = ()
    start: Start = STARTS[DEFAULT]

    @property
    def model(self) -> Path:
        return self.out / self.start.folder

    @property
    def train_data(self) -> Path:
        return self.out / "data" / "train"

    @property
    def test_data(self) -> Path:
        return self.out / "data" / "test"

    @property
    def train(self) -> RunDir:
        return RunDir(self.out / "train")

    @property
    def training(self) -> list[str]:
        """The arguments of the training command."""
        named = [f"{key}={path}" for key, path in self.paths.items()]
        return [self.start.config, *named, *self.overrides]

    @property
    def paths(self) -> dict[str, Path]:
        """The options that say where the quickstart has made what the training reads."""
        return {
            "output_dir": self.train.root,
            "model.path": self.model,
            "data.path": self.train_data,
            "eval.path": self.test_data,
        }

    def check_overrides(self) -> None:
        """Checks that what the other steps make is used. Raises: InputError."""
        keys = [override.removeprefix("--").partition("=")[0] for override in self.overrides]
        problems = Problems()
        problems.add(
            f"{key}: found in the command line, but the quickstart sets it to {path}; leave it out "
            f"(--out names another folder), or run `corl-jax train {self.start.config}`"
            for key, path in self.paths.items()
            if key in keys
        )
        problems.add(
            f"{key}: found in the command line, but the quickstart compares the results of the "
            f"evaluation that its config has; leave it out, or run `corl-jax train "
            f"{self.start.config}`"
            for key in ("stage", "eval.suite")
            if key in keys
        )
        problems.raise_any()

    def list_steps(self) -> list[tuple[str, list[str], Path | None]]:
        """Returns (title, command, what it makes) of each step.

        Raises: InputError for overrides that make no config.
        """
        # The training has no result in the list: its command resumes by itself.
        start = self.start
        self.check_overrides()
        config = config_files.load(find_config(start.config), self.training[1:])
        draw_train = draw_rows(self.train_data, num_train_rows(config), TRAIN_SEED, "train")
        draw_test = draw_rows(self.test_data, config.eval.rows, TEST_SEED, "test")
        return [
            (
                f"1. {start.title}, from the layout of {start.source} to ours",
                make_command("convert", "to-jax", start.model, self.model),
                self.model,
            ),
            ("2. Rows to train on, each used once", draw_train, self.train_data),
            ("3. Held-out rows, with demands that no training row has", draw_test, self.test_data),
            (
                "4. Unified GRPO, with evaluations on the held-out rows, and the export",
                make_command("train", *self.training),
                None,
            ),
        ]


def num_train_rows(config: Config) -> int:
    """Returns the number of rows that the run reads if it reads none twice.

    Raises: InputError for a run without train.max_steps, whose length depends on these rows.
    """
    if config.train.max_steps is None:
        raise InputError(
            "train.max_steps: found null; expected a number, by which the quickstart draws as many "
            "rows as the run reads"
        )
    return config.train.max_steps * config.train.prompts_per_step


def draw_rows(out: Path, rows: int, seed: int, split: str) -> list[str]:
    """Returns the command that writes rows of the small drawn world."""
    numbers = ["--rows", rows, "--seed", seed, "--split", split]
    return make_command("data", "--world", WORLD, "--out", out, *numbers)


def shorten_path(path: Path) -> Path:
    """Returns a path relative to the working directory, if it is inside of it."""
    path, here = path.absolute(), Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def make_command(name: str, *arguments: Any) -> list[str]:
    """Returns the command that runs `corl-jax NAME` with this Python."""
    # Links are not followed: the python of a virtual environment is a link to the system's.
    return [str(shorten_path(Path(sys.executable))), "-m", "corl_jax", name, *map(str, arguments)]


def print_title(text: str) -> None:
    print(f"\n== {text}", flush=True)


def run_command(command: list[str]) -> None:
    """Prints and runs a command; ends the process with its exit code if it fails."""
    print(f"$ {shlex.join(command)}", flush=True)
    again = "run the same quickstart again to go on from here"
    try:
        # Another process, as the user would run it; JAX starts anew in each.
        code = subprocess.run(command, check=False).returncode
    except KeyboardInterrupt:
        print(f"\ninterrupted; {again}", file=sys.stderr)
        sys.exit(130)
    if code:
        print(f"the command above ended with exit code {code}; {again}", file=sys.stderr)
        sys.exit(code)


# ---- what came out


@dataclasses.dataclass(frozen=True)
class Rise:
    """Means of the first and the last quarter of steps, with their standard errors.

    A step's mean counts as one observation; with a single step a quarter errors are NaN.
    """

    first: float
    last: float
    first_error: float
    last_error: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Rise:
        """Compares the first and the last quarter of at least two numbers, one per step."""
        quarter = max(1, len(values) // 4)
        first, last = values[:quarter], values[-quarter:]
        return cls(
            statistics.fmean(first),
            statistics.fmean(last),
            _standard_error(first),
            _standard_error(last),
        )

    @property
    def in_errors(self) -> float:
        """The difference in units of its own standard error."""
        # Of independent means: the root of the summed squares.
        error = math.hypot(self.first_error, self.last_error)
        return (self.last - self.first) / error if error else math.nan


def _standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def summarize(work: Work) -> None:
    """Writes images before and after and summary.json; prints a summary."""
    records = [record for _, record in read_lines(work.train.metrics)]
    rewards = [r["reward"] for r in records if r.get("reward") is not None]
    evaluations = [r for r in records if "eval/draw/accuracy" in r]
    if len(rewards) < 2 or len(evaluations) < 2:
        raise InputError(
            f"{work.train.metrics}: found {len(rewards)} steps and {len(evaluations)} "
            "evaluations; expected at least two of each; leave train.max_steps, train.stop_after, "
            f"log.every and eval.suite as the config {work.start.config} has them"
        )
    rise = Rise.of(rewards)
    before, after = evaluations[0], evaluations[-1]
    picture = work.out / "before_after.png"
    pictures.save_png(picture, draw_before_after(work.train.root))
    numbers = {
        "steps": len(rewards),
        "reward": dataclasses.asdict(rise) | {"difference_in_standard_errors": rise.in_errors},
        "before": {key: value for key, value in before.items() if key.startswith("eval/")},
        "after": {key: value for key, value in after.items() if key.startswith("eval/")},
    }
    RunDir(work.out).write_json("summary.json", to_json(numbers))
    print_title("What came out")
    print("\n".join(describe_results(rise, len(rewards), before, after)))
    print_title("What to look at")
    print("\n".join(list_places(work, picture)))


def describe_results(rise: Rise, steps: int, before: dict, after: dict) -> list[str]:
    quarter = max(1, steps // 4)
    lines = [f"{'on held-out rows (95% interval)':34}{'before':>22}{'after':>26}"]
    names = {
        "images that match their prompt": "draw/accuracy",
        "answers right": "answer/accuracy",
        "  choice questions": "answer/mc",
        "  open questions": "answer/oe",
        "answers well formed": "answer/format",
    }
    for label, name in names.items():
        if f"eval/{name}" in before and f"eval/{name}" in after:
            lines.append(
                f"{label:34}{_format_rate(before, name):>22}{_format_rate(after, name):>26}"
            )
    lines.append(
        f"unified reward, mean of {quarter} steps: first quarter {rise.first:.3f} "
        f"(se {rise.first_error:.3f}), last quarter {rise.last:.3f} (se {rise.last_error:.3f})"
    )
    return lines


def _format_rate(record: dict, name: str) -> str:
    estimate = read_estimate(record, f"eval/{name}")
    return estimate.format() if estimate else "none"


def list_places(work: Work, picture: Path) -> list[str]:
    places = {
        "images, before and after": f"{picture}  (green: the image matches its prompt)",
        "all of it on one page": str(work.train.path("report.html")),
        "numbers": f"{work.train.metrics}, {work.out / 'summary.json'}",
        "curves, and what to try next": "the commands that the training printed last, above",
    }
    return [f"{label:30}{place}" for label, place in places.items()]
