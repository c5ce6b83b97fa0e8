"""Writes an untrained mini or nano Janus in transformers' layout, for the supervised stages.

    python -m tools.mini_janus --out DIR [--size mini|nano] [--seed 0]
    python -m tools.mini_janus roundtrip --model DIR [--rows 1000] [--seed 0]

`roundtrip` encodes and decodes held-out images of the drawn world with a model's image
tokenizer, and prints the share that the exact checker still accepts, with a 95% Wilson interval.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import jax

from corl_jax.atomic_files import create_folder
from corl_jax.devices import startup
from corl_jax.errors import exit_on_input_error
from corl_jax.input_files import parse_path
from corl_jax.params import flatten
from corl_jax.policies.janus import network
from corl_jax.policies.janus.checkpoint import KIND
from corl_jax.weights.export_folder import Export, write_export
from corl_jax.weights.kinds import Assets
from corl_jax.weights.sources import MemoryLeaves
from tools.mini_janus import roundtrip
from tools.mini_janus import tokenizer as tokenizers
from tools.mini_janus.config import CONFIGS, MAX_POSITIONS, WORLDS


def create_model(out: Path, seed: int, size: str = "mini") -> int:
    """Writes the directory, completely or not at all, and returns the number of parameters.

    Raises: InputError if the directory holds files.
    """
    with create_folder(out) as folder, tempfile.TemporaryDirectory() as assets:
        tokenizer = tokenizers.train_tokenizer(seed, WORLDS[size])
        tokenizers.write_tokenizer(Path(assets), tokenizer, MAX_POSITIONS[size])
        config = CONFIGS[size](tokenizers.count_embedding_rows(tokenizer))
        params = network.init(config, jax.random.key(seed))
        export = Export(
            kind=KIND,
            layout="transformers",
            config=config,
            leaves=MemoryLeaves(flatten(jax.device_get(params))),
            # Named `original`, so that the export makes transformers' files and does not copy.
            assets=Assets(Path(assets), "original", Path(assets) / "config.json"),
            carried={},
        )
        write_export(folder, export)
    return sum(leaf.size for leaf in jax.tree.leaves(params))


@exit_on_input_error
def main(argv: list[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.mini_janus",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=parse_path, help="new or empty directory")
    parser.add_argument("--size", choices=tuple(CONFIGS), default="mini", help="see config.py")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the weights and the text, or of the images"
    )
    commands = parser.add_subparsers(dest="command", metavar="roundtrip")
    measured = commands.add_parser("roundtrip", help="what a model's image tokenizer loses")
    measured.add_argument("--model", required=True, type=parse_path, help="in any of the layouts")
    measured.add_argument("--rows", type=int, default=1000, help="held-out images")
    measured.add_argument("--seed", type=int, default=argparse.SUPPRESS, help="of the images")
    args = parser.parse_args(argv)
    # argparse has no group of an option and a subcommand that exclude each other.
    if (args.command is None) == (args.out is None):
        parser.error("expected either --out DIR or roundtrip")
    startup.check_jax_settings()
    startup.start_devices()
    if args.command == "roundtrip":
        rate = roundtrip.measure_roundtrip(args.model, args.rows, args.seed)
        print(
            f"{rate.mean:.2%} ({rate.low:.2%} - {rate.high:.2%}) of {rate.n:,} images pass the "
            f"checker after encoding and decoding: {args.model}"
        )
    else:
        print(f"{create_model(args.out, args.seed, args.size):,} parameters: {args.out}")


if __name__ == "__main__":
    main()
