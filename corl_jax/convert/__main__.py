"""Converts, inspects and compares checkpoints of policies and reward networks.

corl-jax convert to-jax SRC DST [--model KIND]
corl-jax convert to-torch SRC DST --format original|transformers [--base DIR]
corl-jax convert inspect SRC
corl-jax convert verify A B

SRC, A and B are directories of any layout (original, transformers or jax) or hub ids. All but
`to-torch` also take reward networks: KIND is janus, janus_flow, show_o, bert, blip, clip, vgg
(VGG16 with the heads of LPIPS), aesthetic, mask2former or sd_vae. It is needed only where
config.json does not state it. The folder of a Show-o has the folders magvitv2 and phi-1_5 in it or
beside it, that of a JanusFlow has its VAE in vae.
Exit codes: 0 done, 1 verify found a difference, 2 bad input.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from corl_jax.errors import exit_on_input_error
from corl_jax.input_files import parse_path, parse_place
from corl_jax.weights.hub import check_place


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
            "--model", metavar="KIND", help="kind of network (default: what config.json says)"
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


@exit_on_input_error
def run(argv: Sequence[str] | None = None) -> int:
    """Parses the arguments, runs the command and returns its exit code."""
    args = make_parser().parse_args(argv)
    for place in (getattr(args, name, None) for name in ("source", "base", "a", "b")):
        if place is not None:
            check_place(place)
    # Imported here, so that help and wrong options are answered before jax is loaded.
    from corl_jax.convert.command import run_command

    return run_command(args)


def main(argv: list[str] | None = None) -> None:
    """Runs the command."""
    sys.exit(run(argv))


if __name__ == "__main__":
    main()
