"""Runs the commands of `corl-jax convert`."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from corl_jax.console import show_progress
from corl_jax.convert.compare import compare
from corl_jax.convert.describe import describe
from corl_jax.errors import InputError, shorten
from corl_jax.policies import FAMILIES, find_family
from corl_jax.weights.checkpoint import open_checkpoint
from corl_jax.weights.export import convert
from corl_jax.weights.hub import resolve_model_dir, resolve_path
from corl_jax.weights.kinds import OWN_LAYOUT, NetworkKind
from corl_jax.weights.layouts import KINDS
from corl_jax.weights.recognise import recognise_kind

POLICIES = {name: family.kind for name, family in FAMILIES.items()}
ALL_KINDS = {**POLICIES, **KINDS}
MAX_LINES = 50  # of differences; a wrong config would print a thousand


def run_convert(args: argparse.Namespace) -> int:
    to_jax = args.command == "to-jax"
    source, kind = find_source(args.source, args.model) if to_jax else find_policy(args.source)
    with show_progress(args.command) as progress:
        notes = convert(
            source,
            args.out,
            kind,
            layout=OWN_LAYOUT if to_jax else args.format,
            base=resolve_model_dir(args.base) if args.base else None,
            dtype=args.dtype,
            max_shard_bytes=args.max_shard_mb * 10**6,
            as_bin=not to_jax and args.bin,
            overwrite=args.overwrite,
            progress=progress,
        )
    if kind not in POLICIES.values():
        notes += describe_reward_network(args.out, kind)
    for note in notes:
        print(f"note: {note}")
    size = sum(file.stat().st_size for file in args.out.rglob("*") if file.is_file())
    print(f"wrote {args.out}, {size / 1e6:,.1f} MB")
    if kind in POLICIES.values() and args.dtype == "keep":
        command = ["corl-jax", "convert", "verify", str(args.source), str(args.out)]
        print(f"to compare: {shlex.join(command)}")
    return 0


def describe_reward_network(folder: Path, kind: NetworkKind) -> list[str]:
    """Prints the converted network; returns the files that rewards with this network would lack."""
    # Imported here: the module imports all rewards, which the conversion of a policy does not need.
    from corl_jax.rewards.networks import find_missing_assets

    with open_checkpoint(folder, kind) as written:
        print(f"{kind.name}, layout {written.source_layout}: {written.parameters:,} parameters")
        return find_missing_assets(kind.name, written)


def find_source(place: str, kind_name: str | None = None) -> tuple[Path, NetworkKind]:
    """Returns path and kind of a checkpoint: `kind_name`, config.json's, or the first family.

    Raises:
        InputError: nothing tells the kind, or there is none of that name.
    """
    if kind_name and kind_name not in ALL_KINDS:
        raise InputError(f"--model: found {kind_name!r}; expected one of {', '.join(ALL_KINDS)}")
    source = resolve_path(place)
    stated = recognise_kind(source, ALL_KINDS.values()) if source.is_dir() else None
    if not kind_name and not stated and not (source / "config.json").is_file():
        raise InputError(
            f"{source}: has no config.json that says what it is; give --model "
            f"{' or '.join(KINDS)}, or for a unified model the folder with its config.json"
        )
    kind = ALL_KINDS[kind_name] if kind_name else stated or find_family(source).kind
    # Only a kind without a config.json can be a single file of weights.
    return resolve_model_dir(place) if kind.needs_config else source, kind


def find_policy(place: str) -> tuple[Path, NetworkKind]:
    """Returns path and kind of a unified model; only these have a foreign layout to be written."""
    folder = resolve_model_dir(place)
    return folder, find_family(folder).kind


def run_inspect(args: argparse.Namespace) -> int:
    for line in describe(*find_source(args.source, args.model)):
        print(line)
    return 0


def run_verify(args: argparse.Namespace) -> int:
    a, kind = find_source(args.a)
    b, _ = find_source(args.b, kind.name)
    with show_progress("verify") as progress:
        result = compare(a, b, kind, ignore_dtype=args.ignore_dtype, progress=progress)
    for line in result.notes:
        print(f"note: {line}")
    lines = [f"differs: {line}" for line in result.differences]
    for line in shorten(lines, MAX_LINES, "differences"):
        print(line)
    verdict = f"{len(result.differences)} differences" if result.differences else "equal"
    note = ""
    if set(result.stored) != {result.tensors}:
        stored = " and ".join(map(str, result.stored))
        note = f" (the files have {stored}; the layers of a part are compared as one tensor)"
    print(f"{result.tensors} tensors compared: {verdict}{note}")
    return 1 if result.differences else 0


def run_command(args: argparse.Namespace) -> int:
    """Runs the command of `args` and returns its exit code.

    Raises:
        InputError: a file or an argument is wrong.
    """
    commands = {
        "to-jax": run_convert,
        "to-torch": run_convert,
        "inspect": run_inspect,
        "verify": run_verify,
    }
    return commands[args.command](args)
