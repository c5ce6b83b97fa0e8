"""Runs the server: loads the model, compiles the usual programs, listens until it is stopped."""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import os
import signal
import socket
import sys
import time

from PIL import Image

from corl_jax.devices.exhausted_memory import explain_memory
from corl_jax.errors import InputError, Problems
from corl_jax.inference import TEXT_OPTIONS, load_model
from corl_jax.policies import inspect_policy
from corl_jax.sampling_options import complete_options
from corl_jax.serve.batcher import Batcher
from corl_jax.serve.engine import Engine, Job
from corl_jax.serve.requests import ChatRequest, read_image_request
from corl_jax.tasks import IMAGE_UNDERSTANDING

QUESTION, PROMPT = "What is in the image?", "a red circle"
REMEDY = "the server needs starlette and uvicorn: pip install 'corl-jax[serve]'"


def run_server(args: argparse.Namespace) -> None:
    """Serves the model of `args` until SIGTERM or Ctrl-C.

    Raises:
        InputError: listing every problem of the model and the address, before any device work.
    """
    problems = Problems()
    problems.attempt(_check_packages)
    with problems.collect("--model: "):
        folder = inspect_policy(args.model).folder
        _check_generation(folder, problems)
    # Now, because a port that is taken should not be found after minutes of compilation.
    listener = problems.attempt(open_listener, args.host, args.port)
    with listener or contextlib.nullcontext():
        problems.raise_any()
        assert listener is not None
        _warn_if_open(args)
        model, dtype = load_model(args.model, args.dtype)
        engine = Engine(model, dtype, args.batch_size)
        if args.warm_up:
            warm_up(engine)
        batcher: Batcher = Batcher(
            engine.draw, batch_size=args.batch_size, max_wait_s=args.max_wait_ms / 1000,
            max_queue=max(args.max_queue, args.batch_size),
        )  # fmt: skip
        try:
            _serve(args, engine, batcher, listener)
        finally:
            batcher.close()


def _check_packages() -> None:
    """Raises: InputError if the packages of the server are not installed."""
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise InputError(f"serve: {error}; {REMEDY}") from error


def _check_generation(folder: os.PathLike, problems: Problems) -> None:
    """Adds the problems of the checkpoint's sampling settings, which each request reads."""
    names = dict.fromkeys((*TEXT_OPTIONS, "cfg_scale"))
    args = argparse.Namespace(model=folder, greedy=None, **names)
    problems.add(complete_options(args, list(names)))


def open_listener(host: str, port: int) -> socket.socket:
    """Returns a socket that listens at the address. Raises: InputError if it cannot."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, UnicodeError) as error:  # UnicodeError: a name that no resolver takes
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"--host {host} --port {port}: cannot listen there ({reason}); choose another port, 0 "
            "for a free one, or end the program that has it"
        ) from error


def _warn_if_open(args: argparse.Namespace) -> None:
    """Warns of a server that others can reach and use without a key."""
    try:
        is_local = ipaddress.ip_address(args.host).is_loopback
    except ValueError:
        is_local = args.host == "localhost"
    if not is_local and args.api_key is None:
        print(f"warning: --host {args.host}: anyone who reaches this machine can use the model; "
              "give --api-key", file=sys.stderr)  # fmt: skip


def warm_up(engine: Engine) -> None:
    """Compiles the programs of a short prompt and a short question, for every batch size.

    Without the question for a model that answers none, with a warning.

    Raises:
        InputError: a batch does not fit into the memory of the device.
    """
    started, blank = time.monotonic(), Image.new("RGB", (8, 8))
    drawing = read_image_request({"prompt": PROMPT, "seed": 0}, engine.limits.image_side)
    options = argparse.Namespace(
        temperature=None, greedy=None, seed=0, samples=1, batch_size=1, max_new_tokens=None,
        top_p=None, top_k=None, instruction=None, system_prompt="",
    )  # fmt: skip
    question = ChatRequest(QUESTION, blank, options)
    jobs: list[Job] = [engine.prepare_images(drawing)]
    if lack := engine.model.family.find_lack(IMAGE_UNDERSTANDING, engine.model.sizes):
        print(f"warning: the model answers no questions: the task {lack}", file=sys.stderr)
    else:
        jobs.append(engine.prepare_answers(question))
    for size in engine.sizes:
        problem = (
            f"--batch-size: {size} samples at once do not fit into the memory of the device; give "
            "fewer, or --dtype bfloat16"
        )
        with explain_memory(problem):
            for job in jobs:
                engine.draw(job.program, job.rows * size)
    print(f"compiled {len(jobs) * len(engine.sizes)} programs in {time.monotonic() - started:.1f} "
          "s", file=sys.stderr)  # fmt: skip


def _serve(
    args: argparse.Namespace, engine: Engine, batcher: Batcher, listener: socket.socket
) -> None:
    import uvicorn

    from corl_jax.serve.app import Server

    name = args.name or str(args.model).rstrip("/").rpartition("/")[2]
    app = Server(engine, batcher, name, args.api_key, args.max_queue).make_app()
    config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False)
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"serving {name} at http://{shown}:{port}/v1", flush=True)
    server = uvicorn.Server(config)
    # uvicorn has handlers of its own while it runs. Afterwards it raises the signal again, which
    # must not end the process as a killed one.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: setattr(server, "should_exit", True))
    server.run(sockets=[listener])
    print("stopped", file=sys.stderr)
