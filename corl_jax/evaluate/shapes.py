"""Measures a policy on held-out rows of the drawn world: generated images and answers.

    corl-jax evaluate --model DIR [--suite shapes] [--data PATH | --world W] [--rows 256]
        [--batch-size 32] [--cfg-scale W] [--image-steps N] [--temperature T | --greedy]
        [--max-new-tokens N] [--seed 0] [--dtype float32|bfloat16] [--out DIR]

For every row, one image is generated with guidance and checked exactly. One question is answered
greedily and compared with its solution. Guidance, temperature and length that are not given are
those of the checkpoint. Without --data, the rows are of the split `test` of the drawn world, made
in memory from the seed. With --data, they are the first rows of files with the columns that
`corl-jax data` writes. Prints each rate with its 95% interval (Wilson).
--out writes report.json, scores.jsonl, grid.png and answers.jsonl.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corl_jax.atomic_files import check_output_folder, create_folder
from corl_jax.config.fields import MAX_IMAGE_STEPS
from corl_jax.errors import InputError, Problems
from corl_jax.inference import (
    DTYPES,
    MAX_SEED,
    add_image_steps_option,
    check_number,
    choose_dtype,
    choose_steps,
    find_unread_image_options,
)
from corl_jax.input_files import parse_path, parse_place
from corl_jax.sampling_options import (
    complete_options,
    describe_default,
    find_temperature_problems,
    spell_option,
    tell_sampling,
)
from corl_jax.tasks import TASKS

if TYPE_CHECKING:
    from corl_jax.policies import PolicyFiles

DEFAULT_ROWS = 256


def run(args: argparse.Namespace) -> None:
    """Checks the arguments, and runs the suite."""
    loader = check_arguments(args)
    from corl_jax.evaluation.intervals import format_rates

    tell_sampling(args)
    # From here on devices are in use; all problems of the arguments were reported before.
    started = time.monotonic()
    dtype, report = measure(args, loader)
    seconds = time.monotonic() - started
    print(format_rates(report.rates))
    if args.out is not None:
        settings = {
            "model": args.model,
            "suite": args.suite,
            "data": args.data,
            "seed": args.seed,
            "cfg_scale": args.cfg_scale,
            "image_steps": args.image_steps,
            "greedy": args.greedy,
            "temperature": args.temperature,
            "max_new_tokens": args.max_new_tokens,
            "dtype": dtype,
        }
        write_report(args.out, report, settings)
    where = f": {args.out}" if args.out else ""
    rows = len(report.prompts)
    print(
        f"{rows} rows in {seconds:.1f} s, loading and compilation included{where}", file=sys.stderr
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the suite."""
    add = parser.add_argument
    add(
        "--model",
        type=parse_place,
        required=True,
        help="model directory of any of the three kinds, or a hub id",
    )
    add("--world", choices=("full", "small"),
        help="world of rows made in memory (default: small for images under 48 px)")  # fmt: skip
    add("--data", type=parse_place, metavar="PATH",
        help="file or folder of rows (default: made in memory)")  # fmt: skip
    add("--rows", type=int, metavar="N",
        help=f"number of rows (default {DEFAULT_ROWS}, or all of --data if fewer)")  # fmt: skip
    add("--batch-size", type=int, default=32, help="number of rows at once (default %(default)s)")
    add(
        "--cfg-scale",
        type=float,
        help=f"scale of guidance; 1: none ({describe_default('cfg_scale')})",
    )
    add_image_steps_option(parser)
    add(
        "--temperature",
        type=float,
        help=f"temperature of images ({describe_default('temperature')})",
    )
    add(
        "--greedy",
        action=argparse.BooleanOptionalAction,
        help="take the most likely image codes (default: as the checkpoint states); answers always "
        "greedy",
    )
    add(
        "--max-new-tokens",
        type=int,
        help=f"most tokens of an answer ({describe_default('max_new_tokens')})",
    )
    add("--seed", type=int, default=0, help="seed of images and of rows (default %(default)s)")
    add(
        "--dtype",
        choices=DTYPES,
        help="compute dtype (default float32 on a CPU, bfloat16 elsewhere)",
    )
    add("--out", type=parse_path, metavar="DIR", help="a new or empty folder for the report")


# ---- checks


def check_arguments(args: argparse.Namespace) -> Any:
    """Checks all that needs no device; returns the Loader of the rows.

    Raises:
        InputError: listing all problems of options, files and model.
    """
    from corl_jax.policies import inspect_policy

    problems = Problems()
    problems.attempt(check_options, args)
    problems.add(complete_options(args, ("cfg_scale", "temperature", "max_new_tokens")))
    model = problems.attempt(inspect_policy, args.model)
    if model is not None:
        steps = argparse.Namespace(
            image_steps=args.image_steps, temperature=None, greedy=None, think=False
        )
        problems.add(find_unread_image_options(model, steps, spell_option))
    # With a wrong number of rows there are no rows to check.
    source = (
        None
        if any(p.startswith(("--rows", "--seed")) for p in problems)
        else problems.attempt(open_rows, args, model)
    )
    lengths = problems.attempt(check_rows, source, model, args) if source is not None else None
    problems.raise_any()
    assert model is not None and lengths is not None  # otherwise there was a problem
    return make_loader(source, model.processor, lengths, args)


def check_options(args: argparse.Namespace) -> None:
    """Checks the numbers and the output folder. Raises: InputError listing problems."""
    problems = Problems()
    for name in ("rows", "batch_size", "max_new_tokens"):
        if (value := getattr(args, name)) is not None and value < 1:
            problems.add(f"--{name.replace('_', '-')}: found {value}; expected at least 1")
    if not 0 <= args.seed <= MAX_SEED:
        problems.add(f"--seed: found {args.seed}; expected 0 to {MAX_SEED}")
    problems.add(check_number("--cfg-scale", args.cfg_scale, 0))
    problems.add(check_number("--image-steps", args.image_steps, 1, MAX_IMAGE_STEPS, whole=True))
    problems.add(find_temperature_problems(args.temperature))
    if args.greedy and args.temperature is not None:
        problems.add("--temperature: --greedy would ignore it; leave one of them out")
    if args.out is not None:
        # Checked now, because the folder is written at the end, after the sampling.
        problems.attempt(check_output_folder, args.out, "--out")
    problems.raise_any()


def open_rows(args: argparse.Namespace, model: PolicyFiles | None) -> Any:
    """Opens the rows of the evaluation. Raises: InputError for data that cannot be used.

    The image size of `model` chooses the drawn world. `model` is None if it cannot be read.
    """
    from corl_jax.data.dataset import Rows
    from corl_jax.data.drawn_world.scene import choose_world
    from corl_jax.data.sources import open_source
    from corl_jax.evaluation import SUITES

    suite = SUITES[args.suite]
    if args.data is None:
        assert suite.make_rows is not None
        side = model.family.limits(model.sizes).input_image_side if model else 64
        world = args.world or choose_world(side)
        return suite.make_rows(args.rows or DEFAULT_ROWS, args.seed, world)
    if args.world is not None:
        raise InputError("--world: --data has its own rows; leave one of the two out")
    source: Any = open_source(args.data, required=suite.columns)
    if args.rows is not None and args.rows > len(source):
        raise InputError(
            f"--rows: found {args.rows}, but {args.data} has {len(source)} rows; ask for at most "
            "these, or leave --rows out"
        )
    return Rows(source, 0, min(args.rows or DEFAULT_ROWS, len(source)))


def check_rows(source: Any, model: Any, args: argparse.Namespace) -> dict[str, int] | None:
    """Reads every row once; returns the padded prompt length of each task, None without a model.

    Raises:
        InputError: listing every row that cannot be generated, answered or scored.
    """
    from corl_jax.data.images import decode_image
    from corl_jax.evaluation import SUITES

    names = [source.where(row) for row in range(len(source))]
    suite, columns = SUITES[args.suite], list_scored_columns(args)
    assert suite.find_row_problems is not None
    problems = Problems()
    problems.add(suite.find_row_problems({name: source.column(name) for name in columns}, names))
    # Unlike training, an evaluation leaves out no row: the rates of two models must be comparable.
    longest = dict.fromkeys(suite.tasks, 1)
    for row, name in enumerate(names):
        columns = None
        with problems.collect(f"{name}: "):
            row_values = source[row]
            decode_image(row_values["real_image"])
            columns = row_values
        if columns is None:
            continue
        empty = [k for k in ("prompt", "qa_problem") if not (columns[k] or "").strip()]
        problems.add(f"{name}: {key} is empty; expected a text" for key in empty)
        if model is None or empty:
            continue
        lengths = count_prompt_tokens(suite.tasks, columns, model, args.max_new_tokens)
        for task, (length, room) in lengths.items():
            longest[task] = max(longest[task], length)
            if length > room:
                problems.add(
                    f"{name}: its {task} prompt has {length} tokens; expected at most {room}, "
                    "which leaves room for the completion in the model's positions; see "
                    "--max-new-tokens"
                )
    problems.raise_any()
    return model and {task: model.processor.bucket(length) for task, length in longest.items()}


def count_prompt_tokens(
    tasks: Sequence[str], columns: dict[str, Any], model: Any, max_new_tokens: int
) -> dict[str, tuple[int, int]]:
    """Counts, by task, the prompt's tokens and the most that leave room for a completion."""
    limits = model.family.limits(model.sizes)
    lengths = {}
    for name in tasks:
        task = TASKS[name]
        ids = model.processor.prompt_ids(task.turn.prompt, columns)
        completion = max_new_tokens if task.makes_text else limits.image_tokens
        lengths[name] = (len(ids), limits.positions - completion)
    return lengths


def list_scored_columns(args: argparse.Namespace) -> list[str]:
    """Lists the columns from which the suite computes scores, without images."""
    # These columns are read whole. Images are large, so they are read row by row.
    from corl_jax.data.columns import IMAGE_COLUMN
    from corl_jax.evaluation import SUITES

    return [name for name in SUITES[args.suite].columns if name != IMAGE_COLUMN]


def make_loader(
    source: Any, processor: Any, lengths: dict[str, int], args: argparse.Namespace
) -> Any:
    """Returns a loader of the rows in file order."""
    # With one padded length for all batches each task compiles once.
    from corl_jax.data.dataset import Loader, LoaderOptions
    from corl_jax.evaluation import SUITES

    options = LoaderOptions(
        tasks=SUITES[args.suite].tasks,
        batch_size=min(args.batch_size, len(source)),
        seed=0,
        required=list_scored_columns(args),
        shuffle=False,
        lengths=lengths,
        max_bad_fraction=0.0,  # a row that replaces another one would count twice
        max_long_fraction=0.0,
    )
    return Loader(source, processor, options)


# ---- measuring


def measure(args: argparse.Namespace, loader: Any) -> tuple[str, Any]:
    """Evaluates the model; returns the name of the compute dtype, and the report."""
    import jax
    from tqdm import tqdm

    from corl_jax.devices.mesh import batch_sharding, make_mesh
    from corl_jax.devices.startup import prepare_devices
    from corl_jax.evaluation import SUITES, EvaluationInputs
    from corl_jax.policies import load_policy
    from corl_jax.policies.family import SamplingOptions
    from corl_jax.rewards.samples import Policy

    prepare_devices()
    dtype = choose_dtype(args.dtype)
    # As many devices as divide a batch, each with the whole model: 6 rows, 4 devices -> 2.
    num_devices = math.gcd(loader.batch_size, jax.local_device_count())
    mesh = make_mesh(devices=jax.local_devices()[:num_devices])
    model = load_policy(args.model, dtype, mesh)
    steps = loader.steps_per_epoch
    batches = tqdm(loader.iterate(0, steps), total=steps, unit="batch", disable=None)
    options = SamplingOptions(
        special=model.processor.special,
        cfg_scale=args.cfg_scale,
        temperature=args.temperature or 1.0,  # None with --greedy
        max_new_tokens=args.max_new_tokens,
        dtype=dtype,
        **choose_steps(args.image_steps),
    )
    inputs = EvaluationInputs(
        policy=Policy(model.family, model.sizes, model.params, model.processor, dtype),
        batches=batches,
        sampling=options,
        seed=args.seed,
        greedy_images=args.greedy,
        rows=len(loader.source),
        place=lambda tree: jax.device_put(tree, batch_sharding(mesh)),
    )
    with jax.set_mesh(mesh):
        report = SUITES[args.suite].evaluate(inputs)
    return dtype.name, report


def write_report(out: Path, report: Any, settings: dict[str, Any]) -> None:
    """Writes report.json, scores.jsonl, grid.png and answers.jsonl; all of them or none."""
    from PIL import Image

    from corl_jax.data.questions import to_json_line
    from corl_jax.evaluation.units import REPORT_FILE, SCORES_FILE, format_units

    with create_folder(out) as folder:
        content = {"settings": settings, **report.as_json()}
        text = json.dumps(content, indent=1, ensure_ascii=False)
        (folder / REPORT_FILE).write_text(text + "\n", encoding="utf-8")
        (folder / SCORES_FILE).write_text(format_units(report.units()), encoding="utf-8")
        Image.fromarray(report.draw().pixels).save(folder / "grid.png")
        lines = [to_json_line({"row": row, **answer}) for row, answer in enumerate(report.answers)]
        (folder / "answers.jsonl").write_text("".join(lines), encoding="utf-8")
