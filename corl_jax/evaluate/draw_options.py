"""Options and checks of the suites that draw images. No device is used here."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corl_jax.config.fields import MAX_IMAGE_STEPS
from corl_jax.errors import InputError, Problems
from corl_jax.inference import (
    DTYPES,
    MAX_SEED,
    add_image_steps_option,
    check_number,
    find_unread_image_options,
)
from corl_jax.input_files import parse_path, parse_place
from corl_jax.sampling_options import (
    DEFAULTS,
    choose_cfg_scale,
    find_temperature_problems,
    spell_option,
)

if TYPE_CHECKING:
    from corl_jax.evaluation.writers.writer import ImageFile, PromptList, Writer
    from corl_jax.policies import PolicyFiles

# The setting of the public script that measures Janus-Pro-1B at 0.725 on GenEval.
SEED, TEMPERATURE = 20, 1.0
IMAGES_AT_ONCE = 64  # on each shard of the batch; docs/measured/performance.md has their speed
BYTES_PER_PIXEL = 2.0  # of a PNG: 0.25 MB at 384 x 384 is 1.7, without compression it is 3
MESH_AXES = ("data", "fsdp", "tensor")
MEGABYTE = 1e6


def add_arguments(parser: argparse.ArgumentParser, *, needs_prompts: bool = True) -> None:
    """Adds the options that all suites with images share."""
    add = parser.add_argument
    add("--model", type=parse_place, required=True,
        help="model directory of any of the three kinds, or a hub id")  # fmt: skip
    add("--prompts", type=parse_path, required=needs_prompts, nargs="+", metavar="PATH",
        help="the prompts: a file or folder of the harness, or its clone")  # fmt: skip
    add("--out", type=parse_path, required=True, metavar="DIR",
        help="folder of the images; the same command continues what it holds")  # fmt: skip
    add("--images-per-prompt", type=int, metavar="N",
        help="images of each prompt (default: as the harness expects)")  # fmt: skip
    add("--rows", type=int, metavar="N", help="draw only the first N prompts (default: all)")
    add("--seed", type=int, default=SEED, help="seed of all images (default %(default)s)")
    add("--cfg-scale", type=float,
        help=f"scale of guidance; 1: none (default {DEFAULTS['cfg_scale']:g} for every checkpoint, "
        "2 for a JanusFlow)")  # fmt: skip
    add_image_steps_option(parser)
    add("--temperature", type=float, default=TEMPERATURE,
        help="divides the logits (default %(default)g for every checkpoint)")  # fmt: skip
    add("--roles", metavar="pro|old",
        help="chat roles of the prompt: pro for <|User|>, old for User (default those of "
        "the checkpoint)")  # fmt: skip
    add("--batch-size", type=int, metavar="N",
        help=f"images drawn at once by a process (default {IMAGES_AT_ONCE} for each part into "
        "which its devices split a batch)")  # fmt: skip
    add("--dtype", choices=DTYPES,
        help="compute dtype (default float32 on a CPU, bfloat16 elsewhere)")  # fmt: skip
    add("--mesh", metavar="AXIS=N,..",
        help="split the model over the devices of a process, such as fsdp=4 or data=2,tensor=4 "
        "(default: each device has the whole model)")  # fmt: skip
    add_process_options(parser)


def add_process_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of several processes; a cluster such as Slurm needs none of them."""
    add = parser.add_argument
    add("--coordinator-address", metavar="HOST:PORT", help="address of process 0")
    add("--num-processes", type=int, metavar="N", help="number of processes")
    add("--process-id", type=int, metavar="I", help="number of this process, from 0")


@dataclasses.dataclass(frozen=True)
class DrawPlan:
    """A checked evaluation: what is drawn, with which model, and where to."""

    args: argparse.Namespace
    writer: Writer
    prompts: PromptList  # all of the harness
    rows: int  # prompts that are drawn
    samples: int  # images of each prompt
    files: list[ImageFile]  # of the prompts that are drawn
    model: PolicyFiles  # with the processor of the chosen roles
    settings: dict[str, Any]  # that decide the images; the dtype comes with the devices
    longest: int  # tokens of the longest prompt
    mesh: dict[str, int]

    @property
    def drawn(self) -> PromptList:
        """The prompts that are drawn."""
        return dataclasses.replace(self.prompts, prompts=self.prompts.prompts[: self.rows])


def check_arguments(args: argparse.Namespace) -> DrawPlan:
    """Checks all that needs no device.

    Raises:
        InputError: listing all problems of options, prompts, model, folder and disk.
    """
    from corl_jax.evaluation.manifest import find_folder_problems, read_manifest
    from corl_jax.evaluation.writers import WRITERS, read_prompt_list

    problems, writer = Problems(), WRITERS[args.suite]
    samples = writer.images_per_prompt if args.images_per_prompt is None else args.images_per_prompt
    problems.add(find_option_problems(args, writer, samples))
    mesh = problems.attempt(parse_mesh, args.mesh)
    problems.attempt(make_distributed, args)
    prompts = None
    with problems.collect("--prompts "):
        prompts = read_prompt_list(args.suite, args.prompts)
    rows = check_rows(args, prompts, problems)
    model, template = check_model(args, problems)
    longest = check_lengths(model, prompts, problems) if model and prompts else 0
    manifest = problems.attempt(read_manifest, args.out)
    files: list[ImageFile] = []
    # With a wrong number of images there is no list of files to look for.
    if prompts and 1 <= samples <= (writer.max_images or samples):
        everything = writer.list_files(prompts.prompts, samples)
        files = [file for file in everything if file.prompt < rows]
        if manifest is not None:
            problems.add(find_folder_problems(args.out, manifest, everything, rows))
        if model:
            side = model.family.limits(model.sizes).image_side
            problems.add(find_disk_problems(args.out, files, side))
    settings: dict[str, Any] = {}
    if model and prompts:
        settings = describe_settings(args, samples, prompts, template)
        problems.add(find_setting_problems(args.out, manifest or {}, settings, model))
    problems.raise_any()
    assert prompts and model and mesh is not None
    return DrawPlan(args, writer, prompts, rows, samples, files, model, settings, longest, mesh)


def find_option_problems(args: argparse.Namespace, writer: Writer, samples: int) -> list[str]:
    """Lists wrong numbers among the options."""
    problems = Problems()
    for name in ("rows", "batch_size"):
        problems.add(check_number(spell_option(name), getattr(args, name), 1))
    problems.add(check_number("--images-per-prompt", samples, 1))
    if writer.max_images is not None and samples > writer.max_images:
        problems.add(
            f"--images-per-prompt: found {samples}; {writer.title} reads at most "
            f"{writer.max_images} of each prompt"
        )
    problems.add(check_number("--seed", args.seed, 0, MAX_SEED))
    problems.add(check_number("--cfg-scale", args.cfg_scale, 0))
    problems.add(check_number("--image-steps", args.image_steps, 1, MAX_IMAGE_STEPS, whole=True))
    # Not greedy: a benchmark takes samples.
    problems.add(find_temperature_problems(args.temperature, takes_greedy=False))
    return list(problems)


def parse_mesh(text: str | None) -> dict[str, int]:
    """Returns the sizes of the axes of --mesh. Raises: InputError for unknown axes and sizes."""
    sizes, problems = {}, Problems()
    for part in text.split(",") if text is not None else ():
        name, _, value = part.partition("=")
        is_size = value.isascii() and value.isdigit() and int(value) > 0
        if name not in MESH_AXES or name in sizes or not (is_size or value == "-1"):
            problems.add(
                f"--mesh: found {part!r}; expected AXIS=N, each axis of {', '.join(MESH_AXES)} at "
                "most once, and N from 1 or -1 for the devices that are left"
            )
        else:
            sizes[name] = int(value)
    problems.raise_any()
    # An axis that is not named is 1; data takes what the others leave.
    return {"data": -1 if -1 not in sizes.values() else 1, "fsdp": 1, "tensor": 1, **sizes}


def make_distributed(args: argparse.Namespace) -> Any:
    """Returns the options of the processes. Raises: InputError for wrong numbers."""
    from corl_jax.config.schema import Distributed

    problems = Problems()
    problems.add(check_number("--num-processes", args.num_processes, 1))
    problems.add(check_number("--process-id", args.process_id, 0))
    problems.raise_any()
    return Distributed(
        coordinator_address=args.coordinator_address,
        num_processes=args.num_processes,
        process_id=args.process_id,
    )


def check_rows(args: argparse.Namespace, prompts: PromptList | None, problems: Problems) -> int:
    """Returns the number of prompts that are drawn; adds a problem if there are fewer."""
    count = len(prompts.prompts) if prompts else 0
    if prompts and args.rows is not None and args.rows > count:
        problems.add(
            f"--rows: found {args.rows}, but there are {count} prompts; ask for at most these, or "
            "leave --rows out"
        )
    return count if args.rows is None else args.rows


def check_model(
    args: argparse.Namespace, problems: Problems
) -> tuple[PolicyFiles | None, dict[str, Any]]:
    """Returns the model with the processor of the chosen roles, and roles and template."""
    from corl_jax.policies import inspect_policy

    model = None
    described: dict[str, Any] = {"roles": None, "template": None}
    with problems.collect("--model: "):
        model = inspect_policy(args.model)
    if model is None:
        return None, described
    args.cfg_scale = choose_cfg_scale(args.cfg_scale, model.family)
    chosen = argparse.Namespace(
        image_steps=args.image_steps, temperature=args.temperature, greedy=False, think=False
    )
    problems.add(find_unread_image_options(model, chosen, spell_option))
    choose_roles = model.family.choose_roles
    if choose_roles is None:
        if args.roles is not None:
            problems.add(f"--roles: has no effect on {model.family.name}; leave it out")
        return model, described
    with problems.collect("--roles: "):
        roles = choose_roles(model.processor, args.roles)
        model = dataclasses.replace(model, processor=roles.processor)
        described = {"roles": roles.name, "template": roles.template}
    return model, described


def check_lengths(model: PolicyFiles, prompts: PromptList, problems: Problems) -> int:
    """Returns the tokens of the longest prompt; adds a problem for each that is too long."""
    from corl_jax.data.questions import replace_surrogates
    from corl_jax.tasks import IMAGE_GENERATION

    limits, kind = model.family.limits(model.sizes), IMAGE_GENERATION.turn.prompt
    room, longest = limits.positions - limits.image_tokens, 0
    for prompt in prompts.prompts:
        text, length = replace_surrogates(prompt.text), 0
        with problems.collect(f"--prompts: prompt {prompt.name}: "):
            length = len(model.processor.prompt_ids(kind, {"prompt": text}))
        longest = max(longest, length)
        if length > room:
            problems.add(
                f"--prompts: prompt {prompt.name}: found {length} tokens; expected at most {room}, "
                f"which leaves room for an image in the model's {limits.positions} positions; "
                "prompts are never cut: remove it from the list, or take a model with more"
            )
    return longest


def find_disk_problems(out: Path, files: list[ImageFile], side: int) -> list[str]:
    """Returns a problem if the images that are missing may not fit on the disk."""
    missing = sum(len(file.samples) for file in files if not (out / file.path).exists())
    needed = missing * side * side * BYTES_PER_PIXEL
    parent = next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(parent).free
    if needed <= free:
        return []
    return [
        f"--out {out}: {missing:,} images of {side} x {side} pixels need about "
        f"{needed / MEGABYTE:,.0f} MB, and {free / MEGABYTE:,.0f} MB are free; make room, or name "
        "a folder on another disk"
    ]


def describe_settings(
    args: argparse.Namespace, samples: int, prompts: PromptList, template: dict[str, Any]
) -> dict[str, Any]:
    """Returns the settings that decide the images, without hash of the weights and dtype."""
    from corl_jax.evaluation.writers.writer import hash_prompts

    return {
        "suite": args.suite,
        "seed": args.seed,
        "cfg_scale": args.cfg_scale,
        "image_steps": args.image_steps,
        "temperature": args.temperature,
        "images_per_prompt": samples,
        "system_prompt": "",
        **template,
        "model": args.model,
        "prompts": ", ".join(map(str, args.prompts)),
        "prompts_sha256": hash_prompts(prompts.files),
    }


def find_setting_problems(
    out: Path, manifest: dict[str, Any], settings: dict[str, Any], model: PolicyFiles
) -> list[str]:
    """Adds the hash of the weights to the settings; returns conflicts with the folder's."""
    from corl_jax.evaluation.manifest import OPTIONS, find_conflicts
    from corl_jax.weights.hashing import hash_weights

    try:
        settings["model_sha256"] = hash_weights(model.folder, model.family.kind)
    except InputError as error:
        return error.problems
    return find_conflicts(out, manifest, settings, [name for name in OPTIONS if name != "dtype"])
