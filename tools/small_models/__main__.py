"""Writes an untrained mini or nano model of a family, for the supervised stages.

    python -m tools.small_models --out DIR [--family janus|janus-flow|show-o] [--size mini|nano]
        [--seed 0] [--image-tokenizer MODEL]
    python -m tools.small_models roundtrip --model DIR [--rows 1000] [--seed 0]

A Janus is written in transformers' layout, the others as their original files. The image tokenizer
of a Show-o can begin as that of a small Janus, in place of random numbers, that of a JanusFlow as
another's. `roundtrip` encodes and decodes held-out images of the drawn world with a model's image
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
from corl_jax.policies import load_policy
from corl_jax.weights.export_folder import Export, write_export
from corl_jax.weights.kinds import Assets
from corl_jax.weights.sources import MemoryLeaves
from tools.small_models import roundtrip
from tools.small_models.families import FAMILIES, WORLDS


def create_model(
    out: Path, seed: int, size: str = "mini", family: str = "janus",
    image_tokenizer: str | Path | None = None,
) -> int:  # fmt: skip
    """Writes the directory, completely or not at all, and returns the number of parameters.

    Raises: InputError if the directory holds files, or for an image tokenizer that does not fit.
    """
    made = FAMILIES[family]
    trained = load_policy(image_tokenizer) if image_tokenizer else None
    with create_folder(out) as folder, tempfile.TemporaryDirectory() as assets:
        tokenizer = made.train_tokenizer(seed, WORLDS[size])
        made.write_tokenizer(Path(assets), tokenizer, size)
        config = made.make_sizes(tokenizer, size)
        params = made.init(config, jax.random.key(seed))
        if trained:
            assert made.begin is not None, family
            params |= made.begin(trained, config, seed, WORLDS[size])
        export = Export(
            kind=made.kind,
            layout=made.layout,
            config=config,
            leaves=MemoryLeaves(flatten(jax.device_get(params))),
            # Named `original`, so that a Janus's files are made for transformers and not copied.
            assets=Assets(Path(assets), "original", Path(assets) / "config.json"),
            carried={},
        )
        write_export(folder, export)
    return sum(leaf.size for leaf in jax.tree.leaves(params))


@exit_on_input_error
def main(argv: list[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.small_models",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=parse_path, help="new or empty directory")
    parser.add_argument("--family", choices=tuple(FAMILIES), default="janus")
    parser.add_argument("--size", choices=tuple(WORLDS), default="mini", help="see *_sizes.py")
    parser.add_argument(
        "--image-tokenizer",
        metavar="MODEL",
        help="begins as that of this Janus (Show-o) or JanusFlow (JanusFlow)",
    )
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
    if args.image_tokenizer and FAMILIES[args.family].begin is None:
        able = [name for name, made in FAMILIES.items() if made.begin]
        parser.error(f"--image-tokenizer: expected --family {' or '.join(able)}")
    startup.check_jax_settings()
    startup.start_devices()
    if args.command == "roundtrip":
        rate = roundtrip.measure_roundtrip(args.model, args.rows, args.seed)
        print(
            f"{rate.mean:.2%} ({rate.low:.2%} - {rate.high:.2%}) of {rate.n:,} images pass the "
            f"checker after encoding and decoding: {args.model}"
        )
    else:
        count = create_model(args.out, args.seed, args.size, args.family, args.image_tokenizer)
        print(f"{count:,} parameters: {args.out}")


if __name__ == "__main__":
    main()
