"""Generates images, or answers questions about images, with a checkpoint.

A sample depends only on the seed, the position of its prompt in the input and its number. Batch
size, the other prompts and the number of devices change a sample only by rounding.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from corl_jax.atomic_files import check_output_folder, create_folder, replace_file
from corl_jax.console import write_json_lines
from corl_jax.data.instructions import INSTRUCTIONS
from corl_jax.errors import InputError, Problems, exit_on_input_error
from corl_jax.inference import (
    DTYPES,
    TEXT_OPTIONS,
    add_image_steps_option,
    check_image_options,
    check_text_options,
    cut_given_image,
    find_long_prompts,
    find_long_questions,
    find_unread_image_options,
    list_image_options,
    load_model,
    sample_answers,
    sample_images,
)
from corl_jax.input_files import parse_path, parse_place
from corl_jax.sampling_options import (
    complete_options,
    describe_default,
    spell_option,
    tell_sampling,
)
from corl_jax.tasks import PLAN_COLUMN

if TYPE_CHECKING:
    from corl_jax.data.questions import ImageQuestion

GRID_PROMPTS, GRID_SAMPLES = 16, 8
OUTPUT_KEYS = ("text", "tokens", "truncated", "seed", "index", "sample")  # of an answer
Records = dict[tuple[int, int], dict[str, Any]]


# ---- image


def read_image_prompts(args: argparse.Namespace, problems: Problems) -> list[str]:
    """Reads the prompts of images; adds their problems to `problems`."""
    from corl_jax.data import questions

    if args.prompts is not None:
        return questions.read_prompts(args.prompts, "--prompts", problems)
    for number, prompt in enumerate(args.prompt, 1):
        if prompt.strip():
            problems.add(questions.find_text_problems(f"--prompt: number {number}", prompt))
        else:
            problems.add(f"--prompt: number {number} is empty; expected a text")
    return args.prompt


def check_image(args: argparse.Namespace) -> list[str]:
    """Checks the arguments of `image`; returns the prompts.

    Raises:
        InputError: listing all problems of options, files and model.
    """
    from corl_jax.policies import inspect_policy

    problems, model = Problems(), None
    with problems.collect("--model: "):
        model = inspect_policy(args.model)
    check_image_options(args, spell_image_option, problems, model.family if model else None)
    problems.attempt(check_output_folder, args.out, "--out")
    prompts = read_image_prompts(args, problems)
    user_options = argparse.Namespace(**vars(args))
    problems.add(complete_options(args, list_image_options(args)))
    if model:
        problems.add(find_unread_image_options(model, user_options, spell_image_option))
        problems.add(find_long_prompts(model, args, prompts, spell_image_option))
        problems.attempt(cut_given_image, model, args, spell_image_option)
    problems.raise_any()
    return prompts


def spell_image_option(name: str) -> str:
    """Returns an option of images as it is given."""
    return "--images-per-prompt" if name == "samples" else spell_option(name)


def generate_images(args: argparse.Namespace) -> None:
    """Runs the `image` subcommand."""
    from PIL import Image

    prompts = check_image(args)
    tell_sampling(args)
    started, records = time.monotonic(), {}
    model, dtype = load_model(args.model, args.dtype)
    # The folder appears whole, after the last image: no reader sees a part of the output.
    with create_folder(args.out) as folder:
        for sample in sample_images(model, dtype, prompts, args, progress=True):
            name = name_image(sample.prompt, sample.number)
            Image.fromarray(np.asarray(sample.pixels)).save(folder / name)
            records[sample.prompt, sample.number] = {
                "prompt": prompts[sample.prompt], "file": name, "seed": args.seed,
                "index": sample.prompt, "sample": sample.number, "tokens": sample.tokens.tolist(),
            }  # fmt: skip
            if args.inpaint is not None:
                records[sample.prompt, sample.number] |= {
                    "inpaint": args.inpaint, "mask": args.mask,
                }  # fmt: skip
            if sample.plan is not None:
                records[sample.prompt, sample.number] |= {
                    PLAN_COLUMN: model.processor.decode(sample.plan),
                    "plan_tokens": sample.plan.tolist(),
                }
        (folder / "samples.jsonl").write_text(format_records(records), encoding="utf-8")
        save_grid(folder, prompts, args.samples)
    print_report(args, len(records), "image", started, args.out)


def name_image(prompt: int, number: int) -> str:
    """Returns the file name of image `number` of a prompt."""
    return f"{prompt:05d}_{number:02d}.png"


def save_grid(folder: Path, prompts: Sequence[str], samples: int) -> None:
    """Saves a grid of the first prompts and samples, one row per prompt."""
    from PIL import Image

    from corl_jax.runs import pictures

    # Read from the files: the images of a long input need not stay in memory.
    shown, columns = prompts[:GRID_PROMPTS], range(min(samples, GRID_SAMPLES))
    files = [[folder / name_image(row, column) for column in columns] for row in range(len(shown))]
    images = [[np.asarray(Image.open(file)) for file in row] for row in files]
    page = pictures.draw_samples(np.asarray(images), shown)
    Image.fromarray(page.pixels).save(folder / "grid.png")


# ---- text


def read_text_questions(args: argparse.Namespace, problems: Problems) -> list[ImageQuestion]:
    """Reads the questions; adds their problems to `problems`."""
    from corl_jax.data import questions

    if args.input is None:
        if args.image is None or args.question is None:
            problems.add("give --image FILE and --question TEXT, or --input FILE.jsonl")
            return []
        row = {"image": args.image, "question": args.question}
        case = questions.ImageQuestion(row, Path(args.image), "--image, --question")
        problems.add(questions.find_text_problems("--question", args.question))
        return [case]
    if args.image is not None or args.question is not None:
        problems.add("--input: has its own images and questions; leave --image, --question out")
        return []
    return questions.read_questions(args.input, "--input", OUTPUT_KEYS, problems)


def check_text(args: argparse.Namespace) -> list[ImageQuestion]:
    """Checks the arguments of `text`; returns the questions.

    Raises:
        InputError: listing all problems of options, files and model.
    """
    from corl_jax.data import questions
    from corl_jax.policies import inspect_policy

    problems = Problems()
    check_text_options(args, spell_option, problems)
    if args.out is not None and args.out.exists():
        problems.add(f"--out {args.out}: exists; name a new file")
    elif args.out is not None and not args.out.absolute().parent.is_dir():
        problems.add(f"--out {args.out}: there is no folder {args.out.absolute().parent}")
    cases = read_text_questions(args, problems)
    questions.check_images(cases, problems)
    problems.add(complete_options(args, TEXT_OPTIONS))
    with problems.collect("--model: "):
        model = inspect_policy(args.model)
        problems.add(find_long_questions(model, args, cases, spell_option))
    problems.raise_any()
    return cases


def generate_texts(args: argparse.Namespace) -> None:
    """Runs the `text` subcommand."""
    cases = check_text(args)
    tell_sampling(args)
    started, records = time.monotonic(), {}
    model, dtype = load_model(args.model, args.dtype)
    for sample in sample_answers(model, dtype, cases, args, progress=True):
        tokens = sample.tokens.tolist()
        records[sample.prompt, sample.number] = {
            **cases[sample.prompt].row, "text": model.processor.decode(tokens), "tokens": tokens,
            "truncated": tokens[-1] != model.processor.special.eos, "seed": args.seed,
            "index": sample.prompt, "sample": sample.number,
        }  # fmt: skip
    write_text(args.out, records)
    print_report(args, len(records), "text", started, args.out or "standard output")


def write_text(out: Path | None, records: Records) -> None:
    """Writes the answers to standard output, or to a file that appears whole."""

    if out is None:
        write_json_lines(format_records(records))
        return
    try:
        with replace_file(out) as file:
            file.write(format_records(records).encode())
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror})") from error


def format_records(records: Records) -> str:
    """Returns one JSON line per record, in the order of prompts and samples."""
    from corl_jax.data.questions import to_json_line

    # Samples arrive sorted by the length of their prompts.
    return "".join(to_json_line(records[at]) for at in sorted(records))


def print_report(
    args: argparse.Namespace, count: int, what: str, started: float, where: Any
) -> None:
    if args.greedy and args.samples > 1:
        print(f"note: --greedy makes the {args.samples} {what}s of a prompt equal", file=sys.stderr)
    # stderr, because standard output may be the answers.
    seconds = time.monotonic() - started
    plural = "" if count == 1 else "s"
    note = f"{count} {what}{plural} in {seconds:.1f} s, loading and compilation included: {where}"
    print(note, file=sys.stderr)


def add_shared(parser: argparse.ArgumentParser) -> None:
    """Adds the options that both subcommands have."""
    add = parser.add_argument
    add("--model", type=parse_place, required=True,
        help="model directory of any of the three kinds, or a hub id")  # fmt: skip
    add("--seed", type=int, default=0, help="seed of all samples (default %(default)s)")
    add("--greedy", action=argparse.BooleanOptionalAction,
        help="always take the most likely token; all samples are equal (default: as the checkpoint "
        "states)")  # fmt: skip
    add("--temperature", type=float, help=f"divides the logits ({describe_default('temperature')})")
    add("--dtype", choices=DTYPES,
        help="compute dtype (default float32 on a CPU, bfloat16 elsewhere)")  # fmt: skip
    add("--batch-size", type=int, default=16,
        help="number of samples generated at once (default %(default)s)")  # fmt: skip


def add_image(parser: argparse.ArgumentParser) -> None:
    """Adds the options of image generation."""
    prompts, add = parser.add_mutually_exclusive_group(required=True), parser.add_argument
    prompts.add_argument("--prompt", action="append", help="text of an image; may be repeated")
    prompts.add_argument(
        "--prompts", type=parse_path, metavar="FILE", help="text file with one prompt per line"
    )
    add("--out", type=parse_path, required=True, metavar="DIR", help="a new or empty folder")
    add("--images-per-prompt", type=int, default=1, metavar="N", dest="samples",
        help="number of images per prompt (default %(default)s)")  # fmt: skip
    add("--cfg-scale", type=float,
        help=f"scale of guidance; 1: no guidance ({describe_default('cfg_scale')}, 2 for a "
        "JanusFlow)")  # fmt: skip
    add_image_steps_option(parser)
    add("--inpaint", type=parse_place, metavar="IMAGE",
        help="draw a part of this image anew and keep the rest, with --mask; of models that draw "
        "codes in any order, such as Show-o")  # fmt: skip
    add("--mask", type=parse_place, metavar="MASK",
        help="an image of the size of --inpaint, white where that is drawn anew, black where it is "
        "kept")  # fmt: skip
    add("--spread-steps", action="store_true",
        help="with --inpaint: spread the steps over the codes that are drawn (default: over all "
        "codes, as Show-o does, so that the first steps draw one code each)")  # fmt: skip
    add("--think", action="store_true", help="write a plan before each image, as algorithm.tasks "
        "think trains it; the plan is in samples.jsonl")  # fmt: skip
    add_token_options(parser, "a plan")


def add_text(parser: argparse.ArgumentParser) -> None:
    """Adds the options of image understanding."""
    add = parser.add_argument
    add("--image", type=parse_place, metavar="FILE", help="an image, with --question")
    add("--question", metavar="TEXT", help="a question about --image")
    add("--input", type=parse_path, metavar="FILE.jsonl",
        help='lines {"image": PATH, "question": TEXT}; PATH from the folder of FILE')  # fmt: skip
    add("--out", type=parse_path, metavar="FILE", help="a new file (default standard output)")
    add("--system-prompt", default="", metavar="TEXT",
        help="system prompt (default none, as in CoRL)")  # fmt: skip
    add("--instruction", choices=INSTRUCTIONS,
        help="put into each question that asks for no answer tags: choice, for an option's letter; "
        "open, for a few words; auto, choice where lines A., B. list options, else open; none "
        f"({describe_default('instruction')})")  # fmt: skip
    add("--samples", type=int, default=1, metavar="N",
        help="number of answers per question (default %(default)s)")  # fmt: skip
    add_token_options(parser, "an answer")


def add_token_options(parser: argparse.ArgumentParser, what: str) -> None:
    """Adds the options of sampled text; `what` names the text."""
    add = parser.add_argument
    add("--max-new-tokens", type=int, metavar="N",
        help=f"most tokens of {what} ({describe_default('max_new_tokens')})")  # fmt: skip
    add("--top-k", type=int, metavar="K",
        help="sample from the K most likely tokens; 0: from all "
        f"({describe_default('top_k')})")  # fmt: skip
    add("--top-p", type=float, metavar="P",
        help="sample from the most likely tokens with total probability P "
        f"({describe_default('top_p')})")  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="corl-jax generate", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="image|text")
    image = commands.add_parser("image", help="generate images from prompts", description=(
        "Writes PROMPT_SAMPLE.png (numbers from 0), grid.png (at most the first "
        f"{GRID_PROMPTS} prompts, {GRID_SAMPLES} samples each) and samples.jsonl, a line an "
        "image: prompt, file, seed, index, sample, tokens; with --inpaint inpaint and mask, with "
        "--think plan and plan_tokens."))  # fmt: skip
    add_image(image)
    text = commands.add_parser("text", help="answer questions about images", description=(
        "Writes a JSON line a sample: image, question, text, tokens (the end token included), "
        "truncated (no end within --max-new-tokens), seed, index, sample; other keys of its "
        "--input line are passed through."))  # fmt: skip
    add_text(text)
    for task, function in ((image, generate_images), (text, generate_texts)):
        add_shared(task)
        task.set_defaults(function=function)
    return parser


@exit_on_input_error
def main(argv: list[str] | None = None) -> None:
    """Runs the command."""
    args = build_parser().parse_args(argv)
    args.function(args)


if __name__ == "__main__":
    main()
