"""Converts, inspects and compares checkpoints of Janus and of reward networks.

python -m tools.convert_weights to-jax SRC DST [--model KIND]
python -m tools.convert_weights to-torch SRC DST --format original|transformers [--base DIR]
python -m tools.convert_weights inspect SRC
python -m tools.convert_weights verify A B

SRC, A and B are directories of any layout (original, transformers or jax) or hub ids. `to-jax` and
`inspect` also take the networks that rewards ask: KIND is one of bert, blip, clip, vgg (VGG16 with
the heads of LPIPS) and aesthetic, and need not be given where config.json tells it.
Exit codes: 0 done, 1 verify found a difference, 2 bad input.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from corl_jax.errors import InputError, exit_on_input_error, shorten
from corl_jax.input_files import parse_path, parse_place
from corl_jax.weights.files import convert, resolve_model_dir
from corl_jax.weights.hub import resolve_path
from corl_jax.weights.networks import KINDS, convert_network, open_network, recognise
from tools.convert_weights.compare import compare
from tools.convert_weights.describe import describe, describe_network

MAX_LINES = 50  # of differences; a wrong config would print a thousand


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="corl-convert-weights",
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
            choices=("janus", *KINDS),
            metavar="KIND",
            help=f"janus, {', '.join(KINDS)} (default: what config.json says)",
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
        type=_positive,
        default=4000,
        metavar="MB",
        help="largest file of weights, in 10^6 bytes (default: %(default)s)",
    )
    sub.add_argument("--overwrite", action="store_true", help="replace DST if it exists")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


@contextlib.contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int], None] | None]:
    """A byte counter on a terminal; nothing elsewhere, so that logs stay readable."""
    if not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    with tqdm(desc=what, unit="B", unit_scale=True, unit_divisor=1000) as bar:

        def advance(count: int) -> None:
            bar.update(count)

        yield advance


def run_to_jax(args: argparse.Namespace) -> int:
    source = resolve_path(args.source)
    kind = _kind(source, args.model)
    if kind == "janus":
        return run_convert(args)
    from corl_jax.rewards.networks import find_missing_assets

    if args.base:
        raise InputError(
            f"--base: found {args.base}, but a {kind} network carries nothing; drop it"
        )
    with progress_bar("to-jax") as progress:
        opened = convert_network(
            source,
            args.out,
            kind,
            dtype=args.dtype,
            max_shard_bytes=args.max_shard_mb * 10**6,
            overwrite=args.overwrite,
            progress=progress,
            say=lambda note: print(f"note: {note}"),
        )
    print(f"{kind}, layout {opened.layout}: {opened.parameters:,} parameters")
    with open_network(args.out, kind) as written:
        for note in find_missing_assets(kind, written):
            print(f"note: {note}")
    print(f"wrote {args.out}")
    return 0


def _kind(source: Path, asked: str | None) -> str:
    """What a directory holds: as asked, as its config.json says, else a Janus.

    Raises: InputError where nothing tells it.
    """
    stated = recognise(source) if source.is_dir() else None
    if not asked and not stated and not (source / "config.json").is_file():
        raise InputError(
            f"{source}: has no config.json that says what it is; give --model "
            f"{' or '.join(KINDS)}, or for a Janus the folder with its config.json"
        )
    return asked or stated or "janus"


def run_convert(args: argparse.Namespace) -> int:
    source = resolve_model_dir(args.source)
    with progress_bar(args.command) as progress:
        notes = convert(
            source,
            args.out,
            layout="jax" if args.command == "to-jax" else args.format,
            base=resolve_model_dir(args.base) if args.base else None,
            dtype=args.dtype,
            max_shard_bytes=args.max_shard_mb * 10**6,
            as_bin=args.command == "to-torch" and args.bin,
            overwrite=args.overwrite,
            progress=progress,
        )
    for note in notes:
        print(f"note: {note}")
    print(f"wrote {args.out}")
    return 0


def run_inspect(args: argparse.Namespace) -> int:
    source = resolve_path(args.source)
    kind = _kind(source, args.model)
    lines = (
        describe(resolve_model_dir(source)) if kind == "janus" else describe_network(source, kind)
    )
    for line in lines:
        print(line)
    return 0


def run_verify(args: argparse.Namespace) -> int:
    a, b = resolve_model_dir(args.a), resolve_model_dir(args.b)
    with progress_bar("verify") as progress:
        result = compare(a, b, ignore_dtype=args.ignore_dtype, progress=progress)
    for line in result.notes:
        print(f"note: {line}")
    lines = [f"differs: {line}" for line in result.differences]
    for line in shorten(lines, MAX_LINES, "differences"):
        print(line)
    verdict = f"{len(result.differences)} differences" if result.differences else "equal"
    print(f"{result.tensors} tensors compared: {verdict}")
    return 1 if result.differences else 0


@exit_on_input_error
def run(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    commands = {
        "to-jax": run_to_jax,
        "to-torch": run_convert,
        "inspect": run_inspect,
        "verify": run_verify,
    }
    return commands[args.command](args)


def main() -> None:
    """The installed command."""
    sys.exit(run())


if __name__ == "__main__":
    main()
