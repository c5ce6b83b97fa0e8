"""Writes the page of what runs cost, from the results of `tools.bench.epoch`.

python -m tools.bench.epoch_page FILE.json ... > docs/measured/cost.md
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from corl_jax.errors import InputError, exit_on_input_error
from corl_jax.input_files import parse_path, read_text
from tools.bench.epoch import PHASES

MAX_BYTES = 2**26
ABSENT = "-"
HEADINGS = (
    "config", "prompts x completions", "s a step", f"of it {', '.join(PHASES)}, other",
    "peak GiB", "rollouts an hour", "GPU hours per 1,000 steps", "per 1,000 rollouts",
    "an epoch: rows, GPU hours", "the run: steps, GPU hours",
)  # fmt: skip
INTRODUCTION = """# What a run costs

Seconds of real steps of the shipped configs with random weights in the models' published sizes, and
the hours that follow from them. Each config was built as the training command builds it, on rows
made for the measurement. `python -m tools.bench.epoch_page` has written this page from results of

{commands}

Measured on {devices}.
"""
NOTES = """
- **s a step** is the mean of the steps behind those that compile, with reading rows, rewards and
  their networks, without evaluations, checkpoints and pictures of the log.
- **Rollouts** are images and answers; with both tasks a prompt gives a group of each. Supervised
  stages have none.
- Answers of random weights have all tokens that `rollout.max_new_tokens` allows. Those of trained
  models end earlier, so that answers cost less than here.
- **Peak** is what the process allocated on its first device. Without the memory that JAX reserves
  beyond it, it is the least that a device needs.
- **An epoch** reads each row of the data set that the config names once; the data sets of 16,000
  and 66,000 rows are known by these numbers alone. **The run** is as long as the config says.
- Hours are those of all devices used. Starting and compiling are not in them.
"""


def read_records(files: Iterable[Path]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Returns (environment, figures) of each measured config, in order.

    Raises: InputError for files without results, or with those of tiny networks.
    """
    results: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for file in files:
        environment: dict[str, Any] | None = None
        before = len(results)
        for line in read_text(file, "results of tools.bench.epoch", MAX_BYTES).splitlines():
            record = json.loads(line)
            if record.get("record") == "environment":
                environment = record
            elif record.get("record") == "epoch" and environment is not None:
                if environment["tiny"]:
                    raise InputError(f"{file}: results of --tiny, which say nothing of a run")
                results.append((environment, record))
        if len(results) == before:
            raise InputError(
                f"{file}: no results found; expected a file that `tools.bench.epoch --out` wrote"
            )
    return results


def format_page(results: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> str:
    """Returns the page as Markdown."""
    devices = dict.fromkeys(_describe_devices(environment) for environment, _ in results)
    commands = dict.fromkeys(_write_command(*result) for result in results)
    introduction = INTRODUCTION.format(
        devices="; ".join(devices), commands="\n".join(f"    {command}" for command in commands)
    )
    rows = [HEADINGS, ("---",) * len(HEADINGS), *(_list_cells(figures) for _, figures in results)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
    return f"{introduction}\n{table}\n{NOTES}"


def _describe_devices(environment: Mapping[str, Any]) -> str:
    versions = environment["versions"]
    return (
        f"{environment['devices']} x {environment['device']}, Python {versions['python']}, jax "
        f"{versions['jax']}, {environment['date'][:10]}"
    )


def _write_command(environment: Mapping[str, Any], figures: Mapping[str, Any]) -> str:
    words = (figures["config"], *environment["overrides"])
    return f"python -m tools.bench.epoch {' '.join(words)}"


def _list_cells(figures: Mapping[str, Any]) -> tuple[str, ...]:
    def show(name: str, digits: int = 1) -> str:
        value = figures.get(name)
        return ABSENT if value is None else f"{value:,.{digits}f}"

    def show_pair(count: str, hours: str) -> str:
        return f"{show(count, 0)}; {show(hours)}" if hours in figures else ABSENT

    lora = f", adapters of rank {figures['lora']}" if figures["lora"] else ""
    return (
        f"`{figures['config']}`{lora}",
        f"{figures['prompts']} x {figures['completions'] // figures['prompts'] or 1}",
        show("step_s", 2),
        ", ".join(show(f"{name}_s", 2) for name in (*PHASES, "other")),
        show("peak_gib", 0),
        show("rollouts_per_hour", 0),
        show("gpu_hours_per_1000_steps", 2),
        show("gpu_hours_per_1000_rollouts", 3),
        show_pair("epoch_rows", "gpu_hours_per_epoch"),
        show_pair("run_steps", "gpu_hours_per_run"),
    )


@exit_on_input_error
def main(argv: list[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench.epoch_page", description=__doc__)
    parser.add_argument("files", nargs="+", type=parse_path, metavar="FILE.json")
    args = parser.parse_args(argv)
    print(format_page(read_records(args.files)), end="")


if __name__ == "__main__":
    main()
