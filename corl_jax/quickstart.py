"""The whole story at small size: a mini Janus learns to draw and to answer, in minutes on a CPU.

    python -m corl_jax.quickstart [--out runs/quickstart] [--rows 104] [key=value ...]

Converts the mini Janus that this package carries, draws a dataset, runs unified GRPO on it with
an evaluation before and after, and exports the result for PyTorch. Each step is a command that
is printed before it runs, the same that trains a large Janus. Run from the root of the
repository, where configs/ is; a rerun takes up what is there. `key=value` goes to the training.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from corl_jax.errors import InputError, exit_on_input_error
from corl_jax.input_files import parse_path
from corl_jax.train import gallery
from corl_jax.train.metrics import read_lines
from corl_jax.train.rundir import RunDir, jsonable

PACKAGE = Path(__file__).resolve().parent
MINI_JANUS = PACKAGE / "assets" / "mini_janus"
CONFIG = Path("configs") / "quickstart.yaml"
DATA_SEED = 1
ROWS = 104  # 8 to learn from, the same in every step, and 96 to evaluate
QUESTION = "How many objects are there?"
DRAWING = "a photo of three green triangles"


@exit_on_input_error
def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m corl_jax.quickstart",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=parse_path, default=Path("runs/quickstart"), metavar="DIR")
    parser.add_argument(
        "--rows",
        type=int,
        default=ROWS,
        help="of the drawn dataset; the last eval.rows are held out",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. seed=1")
    args = parser.parse_intermixed_args(argv)
    work = Work(args.out, find_config(), args.rows, args.overrides)
    for title, command, result in work.steps():
        if result is not None and result.exists():
            say(f"{title}: {result} is there already")
            continue
        say(title)
        run(command)
    finish(work)


@dataclasses.dataclass(frozen=True)
class Work:
    """The folders of a quickstart and the commands that fill them."""

    out: Path
    config: Path
    rows: int
    overrides: Sequence[str] = ()

    @property
    def model(self) -> Path:
        return self.out / "mini_janus"

    @property
    def data(self) -> Path:
        return self.out / "data"

    @property
    def train(self) -> RunDir:
        return RunDir(self.out / "train")

    def steps(self) -> list[tuple[str, list[str], Path | None]]:
        """(title, command, what it makes) in order; None: the command sees itself what is done."""
        paths = {"output_dir": self.train.root, "model.path": self.model, "data.path": self.data}
        named = [f"{key}={path}" for key, path in paths.items()]
        data = ["--out", self.data, "--rows", self.rows, "--seed", DATA_SEED, "--split", "train"]
        return [
            (
                "1. The mini Janus, from transformers' layout to ours",
                python("tools.convert_weights", "to-jax", shown(MINI_JANUS), self.model),
                self.model,
            ),
            ("2. A small drawn dataset", python("corl_jax.data.shapes", *data), self.data),
            (
                "3. Evaluation, unified GRPO, evaluation, export (compiling takes half a minute)",
                python("corl_jax.train", "--config", self.config, *named, *self.overrides),
                None,
            ),
        ]


def find_config() -> Path:
    """configs/quickstart.yaml of the working directory, or of the clone this package lies in.

    Raises:
        InputError: it is in neither, as after an installation from a wheel.
    """
    for root in (Path(), PACKAGE.parent):
        if (root / CONFIG).is_file():
            return shown(root / CONFIG)
    raise InputError(
        f"{CONFIG}: not found in {Path.cwd()} nor in {PACKAGE.parent}; clone the repository and "
        "run this command in its root"
    )


def shown(path: Path) -> Path:
    """The path relative to the working directory, if it lies below it."""
    path, here = path.absolute(), Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def python(module: str, *arguments: Any) -> list[str]:
    # Not resolved: a virtual environment's python is a link, which must not be followed.
    return [str(shown(Path(sys.executable))), "-m", module, *map(str, arguments)]


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def run(command: list[str]) -> None:
    """Prints and runs a command; ends the process with its exit code if it fails."""
    print(f"$ {shlex.join(command)}", flush=True)
    again = "run the same quickstart again to go on from here"
    try:
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
    """Means of the first and the last quarter of steps, standard errors of both and between.

    A step's mean counts as one observation; with a single step a quarter errors are NaN.
    """

    first: float
    last: float
    first_error: float
    last_error: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Rise:
        """Of one number per step, in order of steps, at least two."""
        quarter = max(1, len(values) // 4)
        first, last = values[:quarter], values[-quarter:]
        return cls(statistics.fmean(first), statistics.fmean(last), _stderr(first), _stderr(last))

    @property
    def in_errors(self) -> float:
        """The difference in units of its own standard error."""
        error = math.hypot(self.first_error, self.last_error)
        return (self.last - self.first) / error if error else math.nan


def _stderr(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def finish(work: Work) -> None:
    """Pictures side by side, a summary as JSON and as text."""
    records = [record for _, record in read_lines(work.train.metrics)]
    rewards = [r["reward"] for r in records if r.get("reward") is not None]
    evaluations = [r for r in records if "eval/draw/accuracy" in r]
    if len(rewards) < 2 or len(evaluations) < 2:
        raise InputError(
            f"{work.train.metrics}: found {len(rewards)} steps and {len(evaluations)} "
            "evaluations; expected at least two of each; leave train.max_steps, "
            "train.stop_after, log.every and eval.suite as configs/quickstart.yaml has them"
        )
    rise = Rise.of(rewards)
    before, after = evaluations[0], evaluations[-1]
    pictures = before_and_after(work)
    numbers = {
        "steps": len(rewards),
        "reward": dataclasses.asdict(rise) | {"difference_in_standard_errors": rise.in_errors},
        "before": {key: value for key, value in before.items() if key.startswith("eval/")},
        "after": {key: value for key, value in after.items() if key.startswith("eval/")},
    }
    RunDir(work.out).write_json("summary.json", jsonable(numbers))
    say("What came out")
    print("\n".join(result_lines(rise, len(rewards), before, after)))
    say("What to look at")
    print("\n".join(place_lines(work, pictures)))
    say("What to try next")
    print("\n".join(next_lines(work)))


def before_and_after(work: Work) -> list[Path]:
    """Writes the first grid of fixed prompts beside the last; the three files."""
    grids = sorted(work.train.images.glob("step_*.png"))
    if len(grids) < 2:
        return grids
    pages = []
    for path in (grids[0], grids[-1]):
        with Image.open(path) as picture:
            pages.append(np.asarray(picture.convert("RGB")))
    beside = gallery.save_png(work.out / "before_after.png", gallery.side_by_side(*pages))
    return [beside, grids[0], grids[-1]]


def result_lines(rise: Rise, steps: int, before: dict, after: dict) -> list[str]:
    quarter = max(1, steps // 4)
    lines = [
        f"unified reward, mean of {quarter} steps   first quarter {rise.first:.3f} "
        f"(se {rise.first_error:.3f})   last quarter {rise.last:.3f} (se {rise.last_error:.3f})",
        f"  difference {rise.last - rise.first:+.3f}: {rise.in_errors:.1f} standard errors",
        f"{'on held-out rows (95% interval)':34}{'before':>22}{'after':>26}",
    ]
    names = {
        "drawings as demanded": "draw/accuracy",
        "answers right": "answer/accuracy",
        "  choice questions": "answer/mc",
        "  open questions": "answer/oe",
        "answers well formed": "answer/format",
    }
    for label, name in names.items():
        if f"eval/{name}" in before and f"eval/{name}" in after:
            lines.append(f"{label:34}{_rate(before, name):>22}{_rate(after, name):>26}")
    return lines


def _rate(record: dict, name: str) -> str:
    mean, low, high = (100 * record[f"eval/{name}{end}"] for end in ("", "_low", "_high"))
    return f"{mean:.1f} % ({low:.0f} .. {high:.0f})"


def place_lines(work: Work, pictures: list[Path]) -> list[str]:
    places = {
        "drawings": pictures,
        "curves": [f"tensorboard --logdir {work.train.tensorboard}  (pip install tensorboard)"],
        "numbers": [work.train.metrics, work.out / "summary.json"],
        "the model, for PyTorch": [work.train.export],
    }
    return [
        f"{label if not number else '':24}{place}"
        for label, listed in places.items()
        for number, place in enumerate(listed)
    ]


def next_lines(work: Work) -> list[str]:
    """Commands with the trained model; the second looks at a drawing of the first."""
    model, out = ["--model", work.train.export], work.out / "drawings"
    commands = [
        python("corl_jax.generate", "image", *model, "--prompt", DRAWING, "--out", out,
               "--images-per-prompt", 8),
        python("corl_jax.generate", "text", *model, "--image", out / "00000_00.png",
               "--question", QUESTION, "--greedy"),
        python("corl_jax.evaluate", *model),
    ]  # fmt: skip
    return [f"$ {shlex.join(command)}" for command in commands]


if __name__ == "__main__":
    main()
