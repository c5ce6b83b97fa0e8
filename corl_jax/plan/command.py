"""Runs `corl-jax plan`: compiles the programs of a config and prints what they need."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

import jax

from corl_jax.assets import SHIPPED
from corl_jax.config.schema import Config
from corl_jax.devices import startup
from corl_jax.errors import InputError
from corl_jax.hub_headers import read_headers_only
from corl_jax.input_files import expand_path
from corl_jax.plan import chips, programs, tables
from corl_jax.policies import FAMILIES, find_family
from corl_jax.policies.family import Family, Limits
from corl_jax.tasks import name_turns
from corl_jax.train import resolve
from corl_jax.train.loaders import make_loaders, open_sources
from corl_jax.train.memory import (
    PROMPT_OPTIONS,
    add_up_memory,
    count_turn_tokens,
    describe_counted,
    describe_prompts,
    estimate_outline,
    list_prompt_lengths,
)
from corl_jax.train.stages import STAGES
from corl_jax.types import DTYPES, Sizes
from corl_jax.weights.checkpoint import load_config
from corl_jax.weights.folders import refuse_adapter

PRESETS: dict[str, tuple[Family, Sizes]] = {
    name: (family, sizes) for family in FAMILIES.values() for name, sizes in family.presets.items()
}
"""Published sizes by name."""
DOES_NOT_FIT_EXIT_CODE = 1


def find_sizes(path: str, preset: str | None) -> tuple[Family, Sizes]:
    """Returns the sizes of a preset, of a directory's config.json, or of the preset in a name.

    Raises:
        InputError: none of them says what the model is.
    """
    if preset is not None:
        if preset not in PRESETS:
            raise InputError(f"--model: found {preset!r}; expected one of {', '.join(PRESETS)}")
        return PRESETS[preset]
    folder = find_model_folder(path)
    refuse_adapter(folder)
    if (folder / "config.json").is_file():
        family = find_family(folder)
        return family, load_config(folder, family.kind)
    # deepseek-ai/Janus-1.3B and a folder my_janus_1_3b both name janus-1.3b. The longest name
    # counts: show-o is a part of show-o-512x512.
    plain = _simplify_name(path)
    named = max((name for name in PRESETS if _simplify_name(name) in plain), key=len, default=None)
    if named is None:
        raise InputError(
            f"model.path: found {path!r}, which is no directory with a config.json and names none "
            f"of {', '.join(PRESETS)}; give one by --model"
        )
    return PRESETS[named]


def _simplify_name(text: str) -> str:
    return text.lower().replace("_", "-").replace(".", "-")


def find_model_folder(path: str) -> Path:
    """Returns the folder of a shipped model or of a path, which may be absent; asks no hub."""
    folder = Path(expand_path(path))
    return SHIPPED.get(path, folder) if not folder.exists() else folder


def measure_first_batch(config: Config, family: Family) -> tuple[dict[str, int], str]:
    """Returns (the padded prompt length of each task in the first batch, where it comes from).

    The lengths are empty if tokenizer or data cannot be read here.
    """
    stage, folder = STAGES[config.stage], find_model_folder(config.model.path)
    limit = f"as long as data.max_prompt_length allows, {config.data.max_prompt_length:,}"
    if not folder.is_dir():
        return {}, f"{limit} (the tokenizer of {config.model.path} is not on this machine)"
    try:
        with read_headers_only():
            processor = family.open_processor(folder)
            sources = open_sources(config, stage, {})
            loader, _ = make_loaders(config, stage, processor, (0, 1), [], sources)
            encoded = loader.batch(0).encoded
    except InputError as error:
        return {}, f"{limit} ({error.problems[0]})"
    return list_prompt_lengths(encoded), f"as in the first batch of {config.data.path}"


def resolve_prompt_lengths(
    args: argparse.Namespace, config: Config, limits: Limits, family: Family
) -> tuple[dict[str, int], str]:
    """Returns (the padded length of each turn's longest prompt in tokens, where it comes from).

    Without an option it is the length in the first batch, as `--check` counts it.

    Raises:
        InputError: a length that the config or the model does not allow.
    """
    limit, bucket, problems = config.data.max_prompt_length, family.prompt_bucket, []
    option_tokens = {
        name: getattr(args, option.removeprefix("--").replace("-", "_"))
        for name, option in PROMPT_OPTIONS.items()
    }
    lengths, source = {}, "as the options say"
    if None in option_tokens.values():
        lengths, source = measure_first_batch(config, family)
        named = [PROMPT_OPTIONS[name] for name, tokens in option_tokens.items() if tokens]
        source = " and ".join([source, *dict.fromkeys(named)])
    for name, option in PROMPT_OPTIONS.items():
        tokens = option_tokens[name]
        if tokens is None and name in lengths:
            continue  # as measured, and padded
        longest = limit
        if option == "--image-prompt" and limits.image_prompt is not None:
            longest = min(limit, limits.image_prompt)
        tokens = longest if tokens is None else tokens
        # An image stands between a begin and an end token.
        shortest = limits.input_image_tokens + 2 if option == "--text-prompt" else 1
        if not shortest <= tokens <= limit:
            problems.append(
                f"{option}: found {tokens}; expected {shortest} to data.max_prompt_length, {limit}"
            )
        # bucket = 32: 40 tokens -> 64
        lengths[name] = math.ceil(tokens / bucket) * bucket
    if problems:  # two tasks may share an option
        raise InputError([*dict.fromkeys(problems)])
    return lengths, source


def select_programs(
    planned: list[programs.Program], names: list[str] | None
) -> list[programs.Program]:
    """Returns the programs whose name starts with one of `names`; None selects all.

    Raises:
        InputError: no program of this config has a name.
    """
    if names is None:
        return planned
    known = [program.name for program in planned]
    unknown = [name for name in names if not any(program.startswith(name) for program in known)]
    if unknown:
        raise InputError(
            f"--only: found {', '.join(unknown)}; this config's programs are {', '.join(known)}"
        )
    return [program for program in planned if program.name.startswith(tuple(names))]


def find_devices(topology: str, hbm: float | None) -> tuple[list, chips.Chip]:
    """Returns the devices of a topology and their chip; `hbm` in GiB replaces its memory."""
    if topology == "local":
        startup.start_devices()
    devices, chip = (
        chips.find_local_chip() if topology == "local" else chips.describe_slice(topology)
    )
    return devices, chip if hbm is None else dataclasses.replace(chip, hbm=hbm * chips.GIB)


def format_heading(
    outline: resolve.RunOutline, chip: chips.Chip, lengths: dict[str, int], source: str
) -> str:
    """Returns the lines about model, devices and iteration."""
    config, shapes = outline.config, outline.family.abstract(outline.sizes)
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    train, rollout = config.train, config.rollout
    tasks = ", ".join(
        f"{name} {lengths[name]} + {count_turn_tokens(outline, turn)} tokens"
        for task in outline.tasks
        for name, turn in name_turns(task).items()
    )
    at_once = rollout.batch_prompts or train.prompts_per_step
    return "\n".join([
        f"model: {count:,} parameters, {config.model.dtype} compute",
        f"devices: {outline.mesh.size} x {chip.name}, mesh {dict(outline.mesh.shape)}",
        f"iteration: {train.prompts_per_step} prompts x {rollout.group_size} completions in "
        f"{outline.micro_batches} micro-batch(es), {at_once} prompts sampled at once; {tasks}",
        describe_prompts(outline, lengths, source),
    ])  # fmt: skip


def format_estimate(
    outline: resolve.RunOutline, lengths: dict[str, int], stored: Any, reserve: float,
    chip: chips.Chip,
) -> str:  # fmt: skip
    """Returns the estimate of `--check` for the same prompts, and why it differs."""
    estimate = estimate_outline(outline, lengths, lambda path: stored, reserve)
    _, totals = add_up_memory(estimate)
    sizes = ", ".join(f"{size:.2f} GiB {program}" for program, size in totals.items())
    return "\n".join([
        f"estimate of `train --check` for the same prompts: at least {sizes}",
        f"  {describe_counted(outline, estimate)}",
        f"  The table has every buffer of a program as the compiler of {chip.name} lays it out: "
        "also logits, scores while sampling, decoded images and the compiler's copies.",
    ])  # fmt: skip


def run_plan(args: argparse.Namespace, config: Config) -> bool:
    """Prints memory, cost and time; returns whether it fits, as far as that is known.

    Raises:
        InputError: the config does not fit the arguments, or one of them is wrong.
    """
    startup.check_jax_settings()
    if args.topology != "local":
        # Otherwise libtpu would look for chips on this machine.
        jax.config.update("jax_platforms", "cpu")
    if not STAGES[config.stage].samples:
        sampling = ", ".join(name for name, stage in STAGES.items() if stage.samples)
        raise InputError(
            f"stage: found {config.stage}; expected one that samples completions: {sampling}"
        )
    family, sizes = find_sizes(config.model.path, args.model)
    lengths, source = resolve_prompt_lengths(args, config, family.limits(sizes), family)
    devices, chip = find_devices(args.topology, args.hbm)
    outline = resolve.outline_run(config, family, sizes, family.stand_in_tokens, devices)
    print(format_heading(outline, chip, lengths, source), flush=True)
    compiled, reserve = [], args.reserve * chips.GIB
    # Outside of the mesh: helper computations run on this machine, not on absent devices.
    resident, planned = programs.make_programs(outline, lengths, DTYPES[args.stored])
    planned = select_programs(planned, args.only)
    print(f"\n{tables.format_resident_table(resident, reserve)}", flush=True)
    if reason := tables.explain_overflow(resident, chip, reserve):
        print(f"  {reason}")
        return False
    with jax.set_mesh(outline.mesh):
        for program in planned:
            print(f"compiling: {program.name}", file=sys.stderr, flush=True)
            compiled.append(tables.compile_program(program, resident))
    for part in (
        tables.format_memory_table(compiled, chip, reserve),
        format_estimate(outline, lengths, DTYPES[args.stored], reserve, chip),
        tables.format_cost_table(compiled, chip),
        tables.format_iteration(compiled, chip),
    ):
        print(f"\n{part}")
    return tables.fits(compiled, chip, reserve) is not False
