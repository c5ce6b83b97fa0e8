"""Measures what a shipped config costs: seconds of its steps by phase, memory, hours of an epoch.

    python -m tools.bench.epoch janus_pro_1b/unified janus_pro_7b/unified --out epoch.jsonl
    python -m tools.bench.epoch janus_pro_1b/t2i --steps 5 train.micro_batch=4
    python -m tools.bench.epoch_page epoch.jsonl > docs/measured/cost.md

Each config is resolved and built as by the training command, from files that are made for it:
random weights in the model's published size, random reward networks, rows with images and
questions. Its own prompts, groups, lengths, rewards, micro-batches and optimizer stay; data,
evaluation, warm-up and export are left out. Each runs --steps steps in a process of its own, on all
devices. The first step compiles and is not counted; a config that alternates between tasks makes as
many steps of each.

Seconds are means over steps, and those of the whole step, with reading its rows. Random weights
write answers of `rollout.max_new_tokens`, where trained models end earlier: times of texts are
upper bounds. Hours are those of the devices used, without start, evaluations and checkpoints. An
epoch is as long as the data set that the config names; without such a set the figure is absent.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import yaml

from corl_jax.config.chains import has_stages, load_stages
from corl_jax.config.schema import Config
from corl_jax.config.shipped import find_config
from corl_jax.data.self_questions.generator import make_generated_record, write_records
from corl_jax.errors import InputError, exit_on_input_error
from corl_jax.input_files import parse_path
from corl_jax.plan.command import find_sizes
from corl_jax.rewards import registry
from corl_jax.runs.pace import COMPILE_SECONDS, COMPILING, STEP_SECONDS
from corl_jax.tasks import SELF_QUESTIONING
from corl_jax.train.stages import STAGES, Stage
from tools.bench.families import FAMILIES
from tools.bench.random_files import write_policy, write_reward_network
from tools.bench.sizes import SIZES
from tools.bench.start import write_rows
from tools.bench.timing import open_records

PHASES = ("rollout", "reward", "update")
# Of a prompt or a question: the small tokenizer makes some 40 tokens of it, with the template.
WORDS = 6
# Two data sets are known by their published round numbers alone.
DATA_ROWS = {
    "mm-vl/x2x_rft_22k": 22_479, "mm-vl/x2x_rft_16k": 16_000,
    "mm-vl/mcot_r1_mcq_66k": 66_000, "mm-vl/mcot_r1_vqa_66k": 66_000,
}  # fmt: skip
LEFT_OUT = {
    "data.name": "null", "data.split": "null", "data.revision": "null", "eval.suite": "none",
    "eval.every": 0, "eval.suites": "[]", "log.images_every": 0, "log.samples_every": 0,
    "export.layout": "none", "optimizer.warmup_steps": 0,
}  # fmt: skip
TINY = {"janus": "tiny", "show_o": "show-o-tiny", "janus_flow": "janus-flow-tiny"}
"""Family -> the size that stands for the published one with --tiny."""


def load_config(name: str, overrides: Sequence[str] = ()) -> Config:
    """Returns a config of one stage. Raises: InputError."""
    stages = load_stages(find_config(name), overrides)
    if has_stages(stages):
        raise InputError(
            f"{name}: found the stages {', '.join(stages)}; give the configs of single stages"
        )
    return stages[""]


class Files:
    """The files that configs need, each written once."""

    def __init__(self, folder: Path, is_tiny: bool):
        self.is_tiny, self._folder = is_tiny, folder

    def write_model(self, path: str) -> Path:
        """Returns a folder with random weights in the size that a path names."""
        family, sizes = find_sizes(path, None)
        (name,) = (name for name, row in FAMILIES.items() if row.family is family)
        if self.is_tiny:
            sizes = SIZES[TINY[name]].policy
        number = [preset for preset, of in family.presets.items() if of == sizes]
        folder = self._folder / f"model-{name}-{''.join(number)}"
        return folder if folder.exists() else write_policy(folder, FAMILIES[name], sizes)

    def write_network(self, name: str) -> Path:
        """Returns a folder with a random reward network."""
        folder = self._folder / f"network-{name}"
        config = SIZES["tiny" if self.is_tiny else "1b"].networks[name]
        return folder if folder.exists() else write_reward_network(folder, name, config)

    def write_rows(self, count: int, tasks: Sequence[str]) -> Path:
        """Returns a place with so many rows of a task."""
        if set(tasks) & set(SELF_QUESTIONING):
            place = self._folder / f"questions-{count}"
            if not place.exists():
                write_records(place, (make_generated_record(0, row) for row in range(count)))
            return place
        place = self._folder / f"rows-{count}.parquet"
        if not place.exists():
            write_rows(place, count, WORDS)
        return place

    def write_config(self, config: Config) -> Path:
        """Returns the file of a config."""
        file = self._folder / "run.yaml"
        text = yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True))
        file.write_text(text, encoding="utf-8")
        return file


def list_networks(config: Config) -> list[str]:
    """Returns the networks of the rewards that the training of a config scores."""
    stage = STAGES[config.stage]
    if not stage.samples:
        return []
    bound = registry.bind_rewards(config.rewards, config.compat)
    by_task = registry.group_by_task(bound, stage.tasks(config))
    rewards = (reward for of_task in by_task.values() for reward in of_task)
    return [*dict.fromkeys(name for reward in rewards for name in reward.networks)]


def count_period(config: Config) -> int:
    """Returns after how many steps each task of a config has been trained as often as the others.

    1: each step trains all tasks.
    """
    stage, every = STAGES[config.stage], config.algorithm.alternate_every
    tasks = stage.tasks(config)
    return every * len(tasks) if stage.compares and every and len(tasks) > 1 else 1


def prepare(name: str, overrides: Sequence[str], steps: int, files: Files) -> Config:
    """Returns the config with files of its own shape in the place of its data and weights."""
    config, period = load_config(name, overrides), count_period(load_config(name, overrides))
    tasks = STAGES[config.stage].tasks(config)
    # As many as a step has prompts: then all steps have prompts of the same length.
    rows = files.write_rows(config.train.prompts_per_step, tasks)
    changed: dict[str, Any] = LEFT_OUT | {
        "output_dir": str(rows.parent / "run"),
        "data.path": str(rows),
        "model.path": str(files.write_model(config.model.path)),
        # As many steps that compile as tasks take turns, then whole periods.
        "train.max_steps": period + period * -(-(steps - 1) // period),
    }
    changed |= {
        f"networks.{network}.path": str(files.write_network(network))
        for network in list_networks(config)
    }
    reserved = [override for override in overrides if override.partition("=")[0] in changed]
    if reserved:
        raise InputError(
            f"{override}: the measurement sets this option; leave it out" for override in reserved
        )
    return load_config(name, [*overrides, *(f"{key}={value}" for key, value in changed.items())])


def run_steps(file: Path) -> Iterator[dict[str, Any]]:
    """Yields what `tools.bench.few_steps` prints of the config in a file.

    Raises: InputError if it fails.
    """
    command = [sys.executable, "-m", "tools.bench.few_steps", str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        for line in run.stdout:
            if line.startswith("{"):  # libraries may print other lines
                yield json.loads(line)
    if run.returncode:
        raise InputError(f"{file}: the steps ended with exit code {run.returncode}; see above")


def count_completions(config: Config, stage: Stage) -> int:
    """Returns the completions of a step: images, answers, or images with answers; 0 if none."""
    if not stage.samples:
        return 0
    tasks = 1 if count_period(config) > 1 else len(stage.tasks(config))
    return config.train.prompts_per_step * config.rollout.group_size * tasks


def count_data_rows(config: Config) -> int | None:
    """Returns the rows that a config trains on; None if its data has no known number of them."""
    held_out = config.eval
    rows = DATA_ROWS.get(str(config.data.path))
    if rows is None or held_out.suite == "none" or held_out.path or held_out.split:
        return rows
    return rows - held_out.rows


def average_seconds(steps: Sequence[Mapping[str, Any]], period: int) -> dict[str, float]:
    """Returns mean seconds of the steps behind the first `period`, whole and by phase.

    A later step that compiles for more than a tenth of its time is left out.

    Raises: InputError if none is left, or one of a period is missing.
    """
    later = steps[period:]
    typical = [row for row in later if row[COMPILE_SECONDS] < COMPILING * row[STEP_SECONDS]]
    if not typical or (period > 1 and len(typical) < len(later)):
        raise InputError(
            f"--steps: {len(later) - len(typical)} of {len(later)} steps behind the first "
            f"{period} compiled, so that their times are not those of a run; give more steps"
        )
    phases = {
        f"{name}_s": statistics.fmean(row.get(f"phase/{name}_seconds", 0.0) for row in typical)
        for name in PHASES
    }
    whole = statistics.fmean(row[STEP_SECONDS] for row in typical)
    return {"step_s": whole, **phases, "other_s": whole - sum(phases.values())}


def summarise(
    name: str, config: Config, started: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Returns the figures of a config from the records of its steps; `config` is as shipped."""
    seconds = average_seconds(steps, count_period(config))
    stage, prompts = STAGES[config.stage], config.train.prompts_per_step
    completions, rows = count_completions(config, stage), count_data_rows(config)
    hours = seconds["step_s"] * started["devices"] / 3600
    figures: dict[str, Any] = {
        "config": name, "stage": config.stage, "tasks": list(stage.tasks(config)),
        "prompts": prompts, "group": config.rollout.group_size if completions else 1,
        "completions": completions, "prompt_tokens": steps[-1]["prompt_tokens"],
        "lora": config.lora.rank, "devices": started["devices"], **seconds,
        "peak_gib": steps[-1].get("process_peak_gib"), "build_s": started["seconds"],
        "compile_s": sum(row[COMPILE_SECONDS] for row in steps),
        "gpu_hours_per_1000_steps": 1000 * hours,
    }  # fmt: skip
    if completions:
        figures["rollouts_per_hour"] = 3600 * completions / seconds["step_s"]
        figures["gpu_hours_per_1000_rollouts"] = 1000 * hours / completions
    if rows is not None:
        figures |= {"epoch_rows": rows, "gpu_hours_per_epoch": rows / prompts * hours}
    run_steps = config.train.max_steps
    if run_steps is None and rows is not None:
        run_steps = round(config.train.epochs * rows / prompts)
    if run_steps is not None:
        figures |= {"run_steps": run_steps, "gpu_hours_per_run": run_steps * hours}
    return figures


def measure(
    name: str, overrides: Sequence[str], steps: int, files: Files
) -> Iterator[dict[str, Any]]:
    """Yields the environment of a config's steps, and its figures."""
    original = load_config(name, overrides)
    prepared = prepare(name, overrides, steps, files)
    started, made = None, list[dict[str, Any]]()
    for record in run_steps(files.write_config(prepared)):
        if record["record"] == "built":
            started = record
            details = {"overrides": list(overrides), "tiny": files.is_tiny}
            yield record | details | {"record": "environment"}
            continue
        made.append(record)
        spent, compiling = record[STEP_SECONDS], record[COMPILE_SECONDS]
        said = f"{name}, step {len(made)}: {spent:.2f} s, of which {compiling:.2f} s compiling"
        print(said, file=sys.stderr, flush=True)
    assert started is not None, "a run that ends well has been built"
    yield {"record": "epoch", **summarise(name, original, started, made)}


def format_figures(figures: Mapping[str, Any]) -> str:
    """Returns a line of a config's figures."""
    shown = {name: value for name, value in figures.items() if name not in ("record", "config")}
    parts = (
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in shown.items()
    )
    return f"{figures['config']}: {', '.join(parts)}"


def parse_arguments(argv: list[str] | None) -> tuple[argparse.Namespace, list[str], list[str]]:
    """Returns the options, the names of configs, and the overrides of all of them."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.epoch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("words", nargs="+", metavar="CONFIG or key=value")
    parser.add_argument("--steps", type=int, default=3, help="with the first; default: 3")
    parser.add_argument("--tiny", action="store_true", help="tiny networks, for a CPU")
    parser.add_argument("--out", type=parse_path, metavar="FILE.json", help="one object a line")
    args = parser.parse_intermixed_args(argv)
    if args.steps < 2:
        raise InputError(f"--steps: found {args.steps}, expected at least 2: the first compiles")
    configs = [word for word in args.words if "=" not in word]
    if not configs:
        raise InputError("CONFIG: missing; give one or more of `corl-jax configs`")
    return args, configs, [word for word in args.words if "=" in word]


@exit_on_input_error
def main(argv: list[str] | None = None) -> None:
    """Runs the command."""
    args, configs, overrides = parse_arguments(argv)
    jax_config: Any = jax.config
    jax_config.update("jax_platforms", "cpu")  # the devices are those of the steps
    failed: list[str] = []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        out = open_records(args.out, stack)
        files = Files(folder, args.tiny)
        for name in configs:
            try:
                for record in measure(name, overrides, args.steps, files):
                    if out is not None:
                        print(json.dumps(record), file=out, flush=True)
                    if record["record"] == "epoch":
                        print(format_figures(record), flush=True)
            # The other configs may fit, and their results should not be lost.
            except InputError as error:
                print(f"{name}: {error}", file=sys.stderr, flush=True)
                failed.append(name)
    if failed:
        sys.exit(f"error: {', '.join(failed)}: not measured, see above")


if __name__ == "__main__":
    main()
