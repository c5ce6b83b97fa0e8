"""Measures the same work in PyTorch, and how many times as fast this project is.

PyTorch runs first, in another process that ends before JAX starts. JAX takes most of the memory of
a device as soon as it uses it.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import jax

from corl_jax.errors import InputError
from tools.bench import recipe
from tools.bench.sizes import SIZES
from tools.bench.timing import Record, Timing

PEERS = ("transformers",)
_SAME = {"image": "tokens and pixels", "text": "answers", "train": "optimizer step"}
OURS = {
    "janus": _SAME | {recipe.PART: recipe.NAME},
    "show_o": _SAME | {"image": "tokens"},
    "janus_flow": {"image": "latents", "unguided": "latents", "train_image": "optimizer step"},
}
"""Family -> part -> the record that holds the same work."""


@dataclasses.dataclass(frozen=True)
class Peers:
    """The results of PyTorch."""

    environment: dict[str, Any]
    records: tuple[Record, ...]
    failed: tuple[str, ...]  # what did not run to its end
    model: str = "janus"  # a key of OURS

    def add_times(self, record: Record) -> Record:
        """Returns the record with each peer's seconds over its own, if the work is the same."""
        times = {
            f"times_{theirs.name.replace(' ', '_')}": theirs.timing.median / record.timing.median
            for theirs in self.records
            if theirs.part == record.part and OURS[self.model][theirs.part] == record.name
            if theirs.timing and record.timing
        }
        return dataclasses.replace(record, figures=record.figures | times)


NOBODY = Peers({}, (), ())


def list_peer_problems(args: argparse.Namespace) -> list[str]:
    """Lists what keeps the peer from running."""
    problems, compared = [], OURS[SIZES[args.size].model]
    whole = [part for part in args.parts if part in compared and part != recipe.PART]
    if args.lora and whole:
        problems.append(
            f"--peer: of {', '.join(whole)} PyTorch has no adapters; leave out --lora, or give "
            f"--parts {recipe.PART}"
        )
    if not set(compared) & set(args.parts):
        problems.append(
            f"--peer: --parts names none of {','.join(compared)}, which alone are compared"
        )
    if importlib.util.find_spec("torch") is None:
        problems.append("--peer: needs PyTorch; install torch for this device")
    return problems


def measure_peers(args: argparse.Namespace) -> Peers:
    """Runs `python -m tools.bench.peer`; on the CPU if JAX uses it.

    Raises: InputError where torch cannot use the device; its message is on stderr.
    """
    parts = [part for part in args.parts if part in OURS[SIZES[args.size].model]]
    jax_config: Any = jax.config
    device = "cpu" if jax_config.jax_platforms == "cpu" else "cuda"
    command = [
        sys.executable, "-m", "tools.bench.peer", "--size", args.size, "--parts", ",".join(parts),
        "--prompts", str(args.prompts), "--group", str(args.group),
        "--repeats", str(args.repeats), "--device", device,
    ]  # fmt: skip
    for option in ("micro_batch", "batch_prompts", "lora", "plan"):
        if getattr(args, option):
            command += [f"--{option.replace('_', '-')}", str(getattr(args, option))]
    # It imports the project's inputs and with them JAX, which must not touch the device.
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    if recipe.PART in parts:
        # A growing cache asks for a larger piece of memory at each token, and a recipe of 7B has
        # no room for the pieces that are left over.
        environment = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"} | environment
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=environment)
    # Libraries may print other lines.
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if len(lines) < 2:
        raise InputError(f"--peer: PyTorch measured nothing, exit code {done.returncode}")
    peers = parse_peers(lines, complete=not done.returncode)
    return dataclasses.replace(peers, model=SIZES[args.size].model)


def parse_peers(lines: list[dict[str, Any]], complete: bool) -> Peers:
    """Parses the lines of the peer: the first is the environment, each other one kind of work."""
    environment, *results = lines
    failed = [f"peer {line['part']} ({line['name']})" for line in results if "failed" in line]
    if not complete and not failed:  # it was ended from outside
        failed.append("peer")
    return Peers(environment, tuple(map(_parse_record, results)), tuple(failed))


def _parse_record(line: dict[str, Any]) -> Record:
    part, name = line["part"], line["name"]
    if "failed" in line:
        return Record(part, name, None, {"failed": line["failed"]}, memory={})
    timing = Timing(0.0, tuple(line["calls_s"]))  # it warms up before
    return Record(part, name, timing, line["figures"], memory=line["memory"])
