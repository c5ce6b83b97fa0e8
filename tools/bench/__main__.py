"""Measures the functions of the project, with random weights made on the device.

    python -m tools.bench --size 1b --out bench.jsonl
    python -m tools.bench --size 7b --parts image,text --prompts 1
    python -m tools.bench --parts image,text,train --peer transformers
    python -m tools.bench --size tiny                     # everything, on a CPU
    python -m tools.bench --size show-o-256 --peer transformers
    python -m tools.bench --size janus-flow-1.3b --peer transformers

Parts: rewards, image and text (rollouts), vq (codes to pixels), train (one optimizer step),
iteration (rollouts and step), correctness (do samplers and trainer agree), gradients (are log-probs
and gradients of the update's attention right); of Show-o, without rewards, also forward (one pass)
and logprobs. Of JanusFlow, without rewards, correctness and train, also unguided (image without
guidance), logprobs and train_image (an optimizer step on images alone). Only if named: these parts
of the other sizes, bits (does each call give the same bits), self_qa, self_sft and self_sft_through
(one optimizer step on own images), recipe (whole steps of a published recipe, rewards included; see
`tools/bench/recipe.py`), detector (GenEval's, in images/s), builds (the image sampler with each set
of compiler options), windows (passes that read several image codes), acceptance (how many of them
the shipped models draw in a pass), lengths (answers that end at different lengths) and, on a mesh
with fsdp, layouts (decoding with matrices
gathered, and split as in training).

Compute is bfloat16; training keeps float32. Each time is the median of --repeats calls after one
that compiles, on the host, until the results are there; `compile` is how much longer the first
call took. Every function explains its figures in its docstring. Roofline and MFU are relative to
rates of copying and of matrix products that are measured first, on one device. Memory peaks are
those of the process on its first device: run a part alone to get its own peak.

The benchmark uses one device, or those of --mesh, laid out as in the training command:

    python -m tools.bench --size 7b --parts train,iteration --mesh fsdp=4 --prompts 32

With --peer the same image, text, train and recipe are measured in PyTorch first, with
transformers' Janus or Phi and as the reference writes them; of JanusFlow image, unguided and
train_image, with transformers' Llama. `times_...` in this project's figures is PyTorch's seconds
over its own.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import math
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from corl_jax.devices import startup
from corl_jax.devices.mesh import AXES, BATCH, make_mesh
from corl_jax.errors import InputError, exit_on_input_error
from corl_jax.input_files import parse_path
from corl_jax.models.attention import KERNELS, AttentionKernel, can_run, choose_training_kernel
from corl_jax.nearest import nearest_multiples
from tools.bench import (
    bits,
    builds,
    correctness,
    detector,
    generation,
    gradients,
    layouts,
    lengths,
    own_images,
    passes,
    recipe,
    scoring,
    training,
    versus,
    windows,
)
from tools.bench.ceilings import measure_ceilings
from tools.bench.environment import describe_environment
from tools.bench.setting import COMPUTE, Setting
from tools.bench.sizes import SIZES, add_adapters
from tools.bench.timing import HEADER, Record, open_records

RUNS: dict[str, Callable[[Setting], Iterator[Record]]] = {
    "rewards": scoring.measure_rewards,
    "image": generation.measure_image,
    "text": generation.measure_text,
    "vq": generation.measure_vq,
    "unguided": generation.measure_unguided,
    "train": training.measure_train,
    "train_image": training.measure_image_update,
    "iteration": training.measure_iteration,
    "correctness": correctness.measure_correctness,
    "gradients": gradients.measure_gradients,
    "forward": passes.measure_forward,
    "logprobs": passes.measure_logprobs,
    "bits": bits.measure_bits,
    "builds": builds.measure_builds,
    "layouts": layouts.measure_layouts,
    "detector": detector.measure_detector,
    "windows": windows.measure_windows,
    "acceptance": windows.measure_acceptance,
    "recipe": recipe.measure_recipe,
    "lengths": lengths.measure_lengths,
    **own_images.RUNS,
}
ALONE = ("rewards", "correctness", "gradients", "detector", "acceptance")  # parts for one device
SPLIT = ("layouts",)  # parts for a mesh that splits matrices
WITH_ADAPTERS = ("train", "iteration", "image", "text", "gradients")  # parts that --lora changes
# --lora changes these too; they are no usual parts of every size
PASSES = ("forward", "logprobs", "unguided", "train_image", "recipe")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parses the command line; None reads the arguments of the process."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", choices=SIZES, default="1b", help="size of all networks")
    parser.add_argument("--parts", help="separated by commas; default: what fits on one device")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group", type=int, default=8, help="completions per prompt")
    parser.add_argument("--repeats", type=int, default=3, help="calls after the first")
    parser.add_argument("--plan", type=int, default=0, help="recipe: tokens before each image")
    _add_update_options(parser)
    parser.add_argument(
        "--mesh",
        default="",
        metavar="AXIS=N,...",
        help=f"devices along data, fsdp and tensor; not for {', '.join(ALONE)}",
    )
    parser.add_argument(
        "--windows", default="1,2,4,8,16,32", metavar="N,...",
        help="windows, acceptance: image codes that a pass reads (default: 1,2,4,8,16,32)",
    )  # fmt: skip
    parser.add_argument(
        "--trace",
        type=parse_path,
        metavar="DIR",
        help="profile one call of each thing, for Perfetto",
    )
    parser.add_argument(
        "--offload",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="rewards: measure networks that are kept in host memory too",
    )
    parser.add_argument(
        "--peer", choices=versus.PEERS, help="measure PyTorch with it on the same shapes too"
    )
    parser.add_argument(
        "--out", type=parse_path, metavar="FILE.json", help="one JSON object a line"
    )
    args = parser.parse_args(argv)
    usual = WITH_ADAPTERS if args.lora else SIZES[args.size].parts
    usual = [part for part in usual if not (args.mesh and part in ALONE)]
    args.parts = args.parts.split(",") if args.parts else usual
    return args


def _add_update_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--micro-batch", type=int, help="prompts of one backward pass; default: all"
    )
    parser.add_argument(
        "--batch-prompts", type=int, help="iteration, recipe: prompts sampled at once; default: all"
    )
    parser.add_argument(
        "--remat",
        choices=("none", "dots", "full"),
        default="full",
        help="values of a layer that the backward pass keeps, as model.remat (default: full)",
    )
    parser.add_argument(
        "--attention",
        choices=("auto", "xla", "cudnn", "splash"),
        default="auto",
        help="attention kernel of the update, as model.attention (default: auto)",
    )
    parser.add_argument(
        "--pixel-dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="dtype of codes to pixels in image, vq and bits (default: float32, as in training)",
    )
    parser.add_argument(
        "--lora",
        type=int,
        metavar="RANK",
        help="train adapters of that rank in all projections, and nothing else",
    )


def check_arguments(args: argparse.Namespace) -> None:
    """Checks the arguments. Raises: InputError listing every argument that cannot be used."""
    problems = [
        f"--parts: found {part!r}, expected some of {','.join(RUNS)}"
        for part in args.parts
        if part not in RUNS
    ]
    for name in ("lora", "prompts", "group", "repeats", "micro_batch", "batch_prompts", "plan"):
        least = {"group": 2, "plan": 0}.get(name, 1)
        value = getattr(args, name)
        if value is not None and value < least:
            option = name.replace("_", "-")
            problems.append(f"--{option}: found {value}, expected an integer of at least {least}")
    for name in ("micro_batch", "batch_prompts"):
        value, option = getattr(args, name), name.replace("_", "-")
        if not problems and value and args.prompts % value:
            problems.append(
                f"--{option}: found {value}, which does not divide {args.prompts} prompts"
            )
    if not all(x.isdecimal() and int(x) for x in args.windows.split(",")):
        problems.append(f"--windows: found {args.windows}, expected numbers from 1: 1,4,8")
    size = SIZES[args.size]
    problems += [
        f"--parts: found {part}, which no {size.model} has"
        for part in args.parts
        if part in size.measured.lacks
    ]
    adapted = (*WITH_ADAPTERS, *PASSES)
    without = [part for part in args.parts if args.lora and part not in adapted]
    if without:
        problems.append(
            f"--lora: has no effect on {', '.join(without)}; give --parts {','.join(WITH_ADAPTERS)}"
        )
    for name, readers in (("plan", ("recipe",)), ("batch_prompts", ("iteration", "recipe"))):
        if getattr(args, name) and not {*readers} & {*args.parts}:
            problems.append(
                f"--{name.replace('_', '-')}: has no effect on {', '.join(args.parts)}; "
                f"give --parts {','.join(readers)}"
            )
    problems += _list_mesh_problems(args)
    if args.peer:
        problems += versus.list_peer_problems(args)
    if problems:
        raise InputError(problems)


def choose_attention(args: argparse.Namespace) -> AttentionKernel:
    """Returns the attention kernel of the update; looks at the device.

    Raises: InputError for a kernel that the device cannot run.
    """
    head_dim = SIZES[args.size].limits.head_dim
    if args.attention == "auto":
        return choose_training_kernel(COMPUTE, head_dim)
    if not can_run(args.attention, COMPUTE, head_dim):
        raise InputError(
            f"--attention: found {args.attention}, which {jax.devices()[0].platform} with heads of "
            f"{head_dim} cannot run; expected {KERNELS[args.attention].needs}; give xla"
        )
    return args.attention


def parse_axes(mesh: str) -> dict[str, int]:
    """Returns the number of devices along each axis of --mesh.

    Raises: InputError for an unknown axis, or a number below 1.
    """
    parts = (part.partition("=") for part in mesh.split(",") if part)
    named = {name: value for name, _, value in parts}
    problems = [
        f"--mesh: found {name}={value}, expected {', '.join(AXES)} with numbers from 1: fsdp=4"
        for name, value in named.items()
        if name not in AXES or not value.isdecimal() or not int(value)
    ]
    if problems:
        raise InputError(problems)
    return dict.fromkeys(AXES, 1) | {name: int(value) for name, value in named.items()}


def _list_mesh_problems(args: argparse.Namespace) -> list[str]:
    try:
        axes = parse_axes(args.mesh)
    except InputError as error:
        return error.problems
    problems, shards = [], math.prod(axes[name] for name in BATCH)
    for option in ("prompts", "micro_batch", "batch_prompts"):
        value = getattr(args, option)
        if value is not None and value % shards:
            nearest = nearest_multiples(shards, value)
            problems.append(
                f"--{option.replace('_', '-')}: found {value}, no multiple of the {shards} parts "
                f"into which data and fsdp split prompts; nearest: {nearest}"
            )
    alone = [part for part in args.parts if part in ALONE]
    if args.mesh and alone:
        problems.append(
            f"--parts: found {', '.join(alone)}, measured on one device alone; leave out --mesh"
        )
    split = [part for part in args.parts if part in SPLIT]
    if split and axes["fsdp"] == 1:
        problems.append(f"--parts: found {', '.join(split)}; give --mesh fsdp=N, N 2 or more")
    if args.mesh and args.peer:
        problems.append("--peer: PyTorch runs on one device; leave out --mesh")
    return problems


def run_parts(args: argparse.Namespace, write: Callable[[Record], None]) -> list[str]:
    """Measures the parts one after another; returns those that did not fit into memory."""
    size, failed, axes = SIZES[args.size], [], parse_axes(args.mesh)
    attention = choose_attention(args)
    used = math.prod(axes.values())
    if used > jax.local_device_count():
        raise InputError(
            f"--mesh: found {args.mesh}, which asks for {used} devices of the "
            f"{jax.local_device_count()} here; give less"
        )
    # Before the mesh: the rates are of one device.
    rates, records = measure_ceilings(size.copied, size.product, args.repeats)
    for record in records:
        write(record)
    mesh = make_mesh(**axes, devices=jax.local_devices()[:used])
    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(mesh):
        setting = Setting(
            size=size, prompts=args.prompts, group=args.group, repeats=args.repeats,
            micro_batch=args.micro_batch, remat=args.remat, attention=attention,
            pixel_dtype=jnp.dtype(args.pixel_dtype), offload=args.offload, folder=Path(folder),
            processor=size.measured.write_processor(Path(folder) / "policy", size.policy),
            mesh=mesh, ceilings=rates, windows=tuple(map(int, args.windows.split(","))),
            trace=args.trace, batch_prompts=args.batch_prompts, plan=args.plan,
        )  # fmt: skip
        if args.lora:
            setting = dataclasses.replace(setting, size=add_adapters(size, args.lora))
        for part in args.parts:
            try:
                for record in RUNS[part](setting):
                    write(record)
            # The other parts may fit, and their results should not be lost.
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                failed.append(part)
                write(Record(part, "out of memory", None, {"error": str(error).splitlines()[0]}))
            gc.collect()  # so that the next part finds the memory free
    return failed


@exit_on_input_error
def main(argv: list[str] | None = None) -> None:
    """Runs the command."""
    args = parse_arguments(argv)
    check_arguments(args)
    startup.check_jax_settings()
    with contextlib.ExitStack() as stack:
        out = open_records(args.out, stack)
        # PyTorch first: JAX takes most of the memory of a device as soon as it uses it.
        peers = versus.measure_peers(args) if args.peer else versus.NOBODY
        startup.start_devices()

        def write_line(data: dict[str, Any]) -> None:
            if out is not None:
                print(json.dumps(data), file=out, flush=True)

        def write(record: Record) -> None:
            print(record.format_row(), flush=True)
            write_line({"record": "result", "size": args.size, **record.to_json()})

        details = describe_environment()
        said = shlex.join(
            ["python", "-m", "tools.bench", *(sys.argv[1:] if argv is None else argv)]
        )
        first = {"record": "environment", "command": said, "mesh": parse_axes(args.mesh)}
        write_line(first | details | {"peer": peers.environment})
        print(f"{details['device']}, {details['versions']}", flush=True)
        print(f"{peers.environment}\n{HEADER}" if args.peer else HEADER, flush=True)
        for record in peers.records:
            write(record)
        failed = run_parts(args, lambda record: write(peers.add_times(record)))
    errors = [f"{', '.join(failed)}: out of device memory; use fewer --prompts"] if failed else []
    errors += [f"{', '.join(peers.failed)}: see above"] if peers.failed else []
    if errors:
        sys.exit(f"error: {'; '.join(errors)}")


if __name__ == "__main__":
    main()
