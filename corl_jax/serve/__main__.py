"""Serves a model by HTTP, as OpenAI's API: answers about images, and images from prompts.

corl-jax serve --model DIR [--host 127.0.0.1] [--port 8000] [--api-key KEY]

  POST /v1/chat/completions     a question about one image (a data: URL of a PNG, JPEG or WebP)
  POST /v1/images/generations   images of a prompt, as PNG in base64
  GET  /v1/models, /health

Requests that arrive together are sampled together. A sample equals the one that `corl-jax generate`
makes with the same seed, up to rounding. SIGTERM and Ctrl-C end the server after the requests that
it has accepted. Exit codes: 0 ended, 2 bad input.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence

from corl_jax.errors import Problems, exit_on_input_error
from corl_jax.inference import DTYPES, check_number
from corl_jax.input_files import parse_place

KEY_VARIABLE = "CORL_JAX_API_KEY"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="corl-jax serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", type=parse_place, required=True, metavar="DIR",
        help="model directory of any of the three kinds, or a hub id")  # fmt: skip
    add("--name", help="the model's name in requests (default: the last part of --model)")
    add("--host", default="127.0.0.1",
        help="address to listen at (default %(default)s: this machine alone)")  # fmt: skip
    add("--port", type=int, default=8000, help="0: a free one (default %(default)s)")
    add("--api-key", default=os.environ.get(KEY_VARIABLE), metavar="KEY",
        help="key that requests must give (default: that of the environment variable "
        f"{KEY_VARIABLE}, which no list of processes shows; else none)")  # fmt: skip
    add("--dtype", choices=DTYPES,
        help="compute dtype (default float32 on a CPU, bfloat16 elsewhere)")  # fmt: skip
    add("--batch-size", type=int, default=16, metavar="N",
        help="most samples generated at once (default %(default)s)")  # fmt: skip
    add("--max-wait-ms", type=float, default=20.0, metavar="MS",
        help="how long a request waits for others to join it (default %(default)g)")  # fmt: skip
    add("--max-queue", type=int, default=256, metavar="N",
        help="samples that may wait; further requests get status 429 (default "
        "%(default)s)")  # fmt: skip
    add("--warm-up", action=argparse.BooleanOptionalAction, default=True,
        help="compile the usual programs before the server listens (default: yes)")  # fmt: skip
    return parser


def check_options(args: argparse.Namespace) -> None:
    """Checks the options. Raises: InputError listing every problem."""
    problems = Problems()
    problems.add(check_number("--port", args.port, 0, 65535, whole=True))
    problems.add(check_number("--batch-size", args.batch_size, 1, 1024, whole=True))
    problems.add(check_number("--max-wait-ms", args.max_wait_ms, 0, 60_000))
    problems.add(check_number("--max-queue", args.max_queue, 1, whole=True))
    if args.api_key is not None and not re.fullmatch("[!-~]+", args.api_key):
        problems.add(
            f"--api-key (or {KEY_VARIABLE}): found an empty key, or one with spaces, line ends or "
            "letters beyond ASCII, which no header can hold"
        )
    if args.name is not None and not args.name.strip():
        problems.add("--name: found an empty text; expected a name, or leave it out")
    problems.raise_any()


@exit_on_input_error
def main(argv: Sequence[str] | None = None) -> None:
    """Parses the arguments and runs the server."""
    args = build_parser().parse_args(argv)
    check_options(args)
    # Imported here, so that help and wrong options are answered before jax is loaded.
    from corl_jax.serve.command import run_server

    run_server(args)


if __name__ == "__main__":
    main()
