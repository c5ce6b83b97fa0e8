"""Measures PyTorch on the shapes of `python -m tools.bench`, which starts this; JSON on stdout.

Weights are random. Warm-up comes first. Sampling is timed once, the training step and the steps of
a recipe --repeats times.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.metadata
import json
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tools.bench.peer import generation, janus_flow, model, recipe, show_o, training
from tools.bench.peer.model import Peer
from tools.bench.sizes import SIZES
from tools.bench.timing import GIB

Measured = tuple[list[float], dict[str, Any]]  # seconds of the calls, figures
BUILDERS: dict[str, Callable[..., Any]] = {
    "janus": model.build, "show_o": show_o.build, "janus_flow": janus_flow.build,
}  # fmt: skip
RUNS: dict[str, dict[tuple[str, str], Callable[[Peer], Measured]]] = {
    "janus": {
        ("image", "transformers generate"): generation.time_generated_images,
        ("image", "eager loop"): generation.time_looped_images,
        ("text", "transformers generate"): generation.time_generated_texts,
        ("train", "eager step"): training.time_steps,
        ("recipe", "eager loop"): recipe.time_steps,
    },
    "show_o": {
        ("image", "eager loop"): functools.partial(show_o.time_images, True),
        ("image", "eager float32 loop"): functools.partial(show_o.time_images, False),
        ("text", "eager loop"): show_o.time_answers,
        ("train", "eager step"): show_o.time_steps,
    },
    "janus_flow": {
        ("image", "eager loop"): functools.partial(janus_flow.time_images, True),
        ("unguided", "eager loop"): functools.partial(janus_flow.time_images, False),
        ("train_image", "eager step"): janus_flow.time_steps,
    },
}
"""Family -> (part, name) -> the work of PyTorch."""


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parses the command line; None reads the arguments of the process."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench.peer", description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="1b")
    parser.add_argument("--parts", default="image,text,train")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    for option in ("--micro-batch", "--batch-prompts", "--lora"):
        parser.add_argument(option, type=int, help="recipe, as of tools.bench")
    parser.add_argument("--plan", type=int, default=0, help="recipe, as of tools.bench")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    return parser.parse_args(argv)


def describe_environment(device: str) -> dict[str, Any]:
    """Returns the device and the versions of the peer."""
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    versions = {package: importlib.metadata.version(package) for package in ("transformers",)}
    return {"device": name, "versions": {"torch": torch.__version__, **versions}}


def measure_memory(device: str) -> dict[str, float]:
    """Returns the peak GiB since the last reset, as torch counts them."""
    if device == "cpu":
        return {}
    return {"peak_gib": torch.cuda.max_memory_allocated() / GIB}


def attempt(peer: Peer, run: Callable[[Peer], Measured]) -> dict[str, Any]:
    """Returns the results of a run, or its error, so that the others can still be measured."""
    if peer.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        calls, figures = run(peer)
    except Exception as error:
        # With an unknown version of transformers one run may fail. The others keep their results,
        # and the command still ends with an error.
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {error}"[:200]}
    return {"calls_s": calls, "figures": figures, "memory": measure_memory(peer.device)}


def main(argv: list[str] | None = None) -> None:
    """Runs the command."""
    args = parse_arguments(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: --peer: torch sees no CUDA device; JAX_PLATFORMS=cpu compares on the CPU")
    # cuDNN's attention is off: it plans anew for each new length of the cache, about 30 ms a step.
    # Only the first rollout of a process pays that (PyTorch 2.11, H200).
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.manual_seed(0)
    print(json.dumps(describe_environment(args.device)), flush=True)
    size = SIZES[args.size]
    with tempfile.TemporaryDirectory() as folder:
        special = size.measured.write_processor(Path(folder) / "policy", size.policy).special
    network = BUILDERS[size.model](size, special, args.device)
    peer = Peer(
        size, special, args.prompts, args.group, args.repeats, args.device, network,
        args.micro_batch, args.batch_prompts, args.lora, args.plan,
    )  # fmt: skip
    failed = False
    for (part, name), run in RUNS[size.model].items():
        if part not in args.parts.split(","):
            continue
        print(f"measuring {part}: {name}", file=sys.stderr, flush=True)
        result = attempt(peer, run)
        failed |= "failed" in result
        print(json.dumps({"part": part, "name": name, **result}), flush=True)
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
