"""Converts, inspects and compares checkpoints of Janus and of reward networks.

corl-jax convert to-jax SRC DST [--model KIND]
corl-jax convert to-torch SRC DST --format original|transformers [--base DIR]
corl-jax convert inspect SRC
corl-jax convert verify A B

SRC, A and B are directories of any layout (original, transformers or jax) or hub ids. All but
`to-torch` also take reward networks: KIND is one of bert, blip, clip, vgg (VGG16 with the heads of
LPIPS) and aesthetic. It is needed only where config.json does not state it.
Exit codes: 0 done, 1 verify found a difference, 2 bad input.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from corl_jax.convert.compare import compare
from corl_jax.convert.describe import describe
from corl_jax.errors import InputError, exit_on_input_error, shorten
from corl_jax.input_files import parse_path, parse_place
from corl_jax.policies.janus.checkpoint import KIND as POLICY
from corl_jax.weights.checkpoint import open_checkpoint
from corl_jax.weights.export import convert
from corl_jax.weights.hub import resolve_model_dir, resolve_path
from corl_jax.weights.kinds import OWN_LAYOUT, NetworkKind
from corl_jax.weights.layouts import KINDS
from corl_jax.weights.recognise import recognise_kind

ALL_KINDS = {POLICY.name: POLICY, **KINDS}
MAX_LINES = 50  # of differences; a wrong config would print a thousand


def make_parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="corl-jax convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    to_jax = commands.add_parser("to-jax", help="a PyTorch checkpoint into our own layout")
    to_torch = commands.add_parser("to-torch", help="any checkpoint into a PyTorch layout")
    for sub in (to_jax, to_torch):
        _add_conversion_arguments(sub)
    inspect = commands.add_parser("inspect", help="sizes, types, files and special tokens")
    inspect.add_argument("source", type=parse_place, metavar="SRC")
    for sub in (to_jax, inspect):
        sub.add_argument(
            "--model",
            choices=tuple(ALL_KINDS),
            metavar="KIND",
            help=f"{', '.join(ALL_KINDS)} (default: what config.json says)",
        )
    to_torch.add_argument("--format", choices=("original", "transformers"), required=True)
    to_torch.add_argument(
        "--bin", action="store_true", help="write pytorch_model.bin files; needs PyTorch"
    )
    verify = commands.add_parser("verify", help="compare two checkpoints tensor by tensor")
    verify.add_argument("a", type=parse_place, metavar="A")
    verify.add_argument("b", type=parse_place, metavar="B")
    verify.add_argument(
        "--ignore-dtype", action="store_true", help="equal values of another type are the same"
    )
    return top


def _add_conversion_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("source", type=parse_place, metavar="SRC", help="model directory or hub id")
    sub.add_argument("out", metavar="DST", type=parse_path, help="folder to be made")
    sub.add_argument(
        "--dtype",
        choices=("keep", "float32", "bfloat16"),
        default="keep",
        help="element type of the output (default: %(default)s, exact to the bit)",
    )
    sub.add_argument(
        "--base",
        type=parse_place,
        metavar="DIR",
        help="original checkpoint for the tensors that transformers' layout drops",
    )
    sub.add_argument(
        "--max-shard-mb",
        type=parse_positive,
        default=4000,
        metavar="MB",
        help="largest file of weights, in 10^6 bytes (default: %(default)s)",
    )
    sub.add_argument("--overwrite", action="store_true", help="replace DST if it exists")


def parse_positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


@contextlib.contextmanager
def show_progress(what: str) -> Iterator[Callable[[int], None] | None]:
    """Shows a byte counter on a terminal; nothing elsewhere, so that logs stay readable."""
    if not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    with tqdm(desc=what, unit="B", unit_scale=True, unit_divisor=1000) as bar:

        def advance(count: int) -> None:
            bar.update(count)

        yield advance


def run_convert(args: argparse.Namespace) -> int:
    to_jax = args.command == "to-jax"
    # to-torch has no --model: only policies have a foreign layout that is written.
    source, kind = find_source(args.source, args.model if to_jax else POLICY.name)
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
    if kind is not POLICY:
        notes += describe_reward_network(args.out, kind)
    for note in notes:
        print(f"note: {note}")
    size = sum(file.stat().st_size for file in args.out.rglob("*") if file.is_file())
    print(f"wrote {args.out}, {size / 1e6:,.1f} MB")
    if kind is POLICY and args.dtype == "keep":
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
    """Returns a checkpoint's path and kind: `kind_name`, that of config.json, else a Janus.

    Raises: InputError if nothing tells the kind.
    """
    source = resolve_path(place)
    stated = recognise_kind(source, ALL_KINDS.values()) if source.is_dir() else None
    if not kind_name and not stated and not (source / "config.json").is_file():
        raise InputError(
            f"{source}: has no config.json that says what it is; give --model "
            f"{' or '.join(KINDS)}, or for a Janus the folder with its config.json"
        )
    kind = ALL_KINDS[kind_name] if kind_name else stated or POLICY
    # Only a kind without a config.json can be a single file of weights.
    return resolve_model_dir(place) if kind.needs_config else source, kind


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


@exit_on_input_error
def run(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    commands = {
        "to-jax": run_convert,
        "to-torch": run_convert,
        "inspect": run_inspect,
        "verify": run_verify,
    }
    return commands[args.command](args)


def main(argv: list[str] | None = None) -> None:
    """Runs the command."""
    sys.exit(run(argv))


if __name__ == "__main__":
    main()
