"""Asks a model about its own images, and measures how far drawing and answering lie apart.

    corl-jax evaluate --suite own_answers --model DIR --prompts FILE --out OUT
        [--images-per-prompt 4] [--verdicts RESULTS] [--foreign DIR [--foreign-verdicts RESULTS]]
        [--judge URL [--judge-model NAME] | --strict]
    corl-jax evaluate --suite own_answers --model DIR --images DIR --out OUT [..]

FILE is GenEval's evaluation_metadata.jsonl, or records with question and answer; without both they
are those of the tag's templates. The images are drawn into OUT/images, in GenEval's folders.
--images takes folders that are there: the model's own images, which --suite geneval drew. The
question about every image is answered greedily, and the one about a grey image, too: a right answer
there comes from habit.

RESULTS are the verdicts on the images, results.jsonl of --suite geneval-detect or geneval-score (or
their --out folder). Only with them there is an imbalance table. --foreign has images of another
source for the same prompts; image k of a prompt is paired with the model's own image k. They count
as right, or with --foreign-verdicts those that are right count.

Answers are judged by the rules of the reward self_answer, or by a language model with the question
of UniRL, whose reply must be the word `same`. OUT/answers.jsonl has every answer with its
verdicts; OUT/report.json and OUT/scores.jsonl are what `corl-jax compare` reads. The same command
continues after an interruption, and with other verdicts, judge or foreign images asks only what is
missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corl_jax.errors import ConnectionFailure, InputError, Problems
from corl_jax.evaluate import draw_options
from corl_jax.evaluate.judge_client import Judge, add_judge_arguments, read_judge
from corl_jax.evaluate.reports import MANIFEST_FILE, read_drawing
from corl_jax.inference import check_number
from corl_jax.input_files import parse_path
from corl_jax.sampling_options import spell_option

if TYPE_CHECKING:
    from corl_jax.evaluate.draw_options import DrawPlan
    from corl_jax.evaluate.own_answers_files import AskedImage
    from corl_jax.policies import PolicyFiles

MAX_NEW_TOKENS = 100
FORMAT = "corl-jax evaluate --suite own_answers, 1"
DRAWING_OPTIONS = (
    "prompts", "images_per_prompt", "rows", "seed", "cfg_scale", "image_steps", "temperature",
    "mesh",
)  # fmt: skip
"""Options that have no effect on images that exist."""
PROCESS_OPTIONS = ("coordinator_address", "num_processes", "process_id")
OPTIONS = {
    "images": "--images", "model_sha256": "--model", "roles": "--roles", "dtype": "--dtype",
    "max_new_tokens": "--max-new-tokens",
}  # fmt: skip
"""Setting that decides the answers about images that exist -> the option that sets it."""
PROBE_TIMEOUT_S = 20.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the suite."""
    draw_options.add_arguments(parser, needs_prompts=False)
    add = parser.add_argument
    add("--images", type=parse_path, metavar="DIR",
        help="own images that exist, instead of --prompts: the folder of --suite geneval, or "
        "NUMBER/metadata.jsonl and NUMBER/samples/*.png")  # fmt: skip
    add("--verdicts", type=parse_path, metavar="RESULTS",
        help="verdicts on own images: results.jsonl of geneval-detect, or its folder")  # fmt: skip
    add("--foreign", type=parse_path, metavar="DIR",
        help="images of another source for the same prompts, in the same form")  # fmt: skip
    add("--foreign-verdicts", type=parse_path, metavar="RESULTS",
        help="verdicts on the foreign images (default: all are right)")  # fmt: skip
    add("--max-new-tokens", type=int, default=MAX_NEW_TOKENS, metavar="N",
        help="most tokens of an answer (default %(default)s)")  # fmt: skip
    add("--strict", action="store_true",
        help="rules: an answer to counting must name the object as well")  # fmt: skip
    add_judge_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Checks the arguments, draws, asks, judges and reports."""
    plan = check_arguments(args)
    # Imported here, so that wrong arguments are answered before the samplers are loaded.
    from corl_jax.evaluate.own_answers_run import evaluate_plan

    evaluate_plan(plan)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A checked evaluation."""

    args: argparse.Namespace
    drawing: DrawPlan | None  # None: the images exist
    model: PolicyFiles  # with the processor of the chosen roles
    settings: dict[str, Any]  # of images and answers, without the dtype if the images exist
    images: list[AskedImage]  # the model's own
    foreign_images: Sequence[AskedImage] = ()
    judge: Judge | None = None  # None: the rules


# ---- checks


def check_arguments(args: argparse.Namespace) -> Plan:
    """Checks all that needs no device.

    Raises:
        InputError: listing all problems of options, prompts, images, verdicts, model and folder,
            and a judge that cannot be reached.
    """
    problems = Problems()
    problems.add(find_option_problems(args))
    # With both or neither there is nothing to check on.
    problems.raise_any()
    judge = problems.attempt(read_judge, args)
    opened = problems.attempt(open_images if args.images else open_drawing, args)
    problems.raise_any()
    assert opened is not None
    images = problems.attempt(add_verdicts, "--verdicts", args.verdicts, opened.images)
    foreign_images = problems.attempt(read_foreign, args, opened.images)
    problems.add(find_source_problems(args.verdicts, opened.settings))
    problems.add(
        find_question_problems(args, opened.model, [*opened.images, *(foreign_images or ())])
    )
    problems.raise_any()
    assert images is not None and foreign_images is not None
    if judge is not None:
        # Last, because it takes its time.
        probe_judge(judge)
    return dataclasses.replace(opened, images=images, foreign_images=foreign_images, judge=judge)


def find_option_problems(args: argparse.Namespace) -> list[str]:
    """Lists options that contradict each other or would have no effect."""
    problems = Problems()
    if (args.prompts is None) == (args.images is None):
        problems.add(
            "--prompts, --images: expected one of them: prompts to draw, or images that exist"
        )
    if args.images is not None:
        defaults = argparse.Namespace(seed=draw_options.SEED, temperature=draw_options.TEMPERATURE)
        problems.add(
            f"{spell_option(name)}: has no effect on --images; leave it out"
            for name in DRAWING_OPTIONS
            if name != "prompts" and getattr(args, name) != getattr(defaults, name, None)
        )
    problems.add(
        f"{spell_option(name)}: the suite runs in one process; draw with --suite geneval in "
        "several, and give its folder by --images"
        for name in PROCESS_OPTIONS
        if getattr(args, name) is not None
    )
    for name in ("batch_size", "max_new_tokens"):
        problems.add(check_number(spell_option(name), getattr(args, name), 1, whole=True))
    if args.foreign_verdicts is not None and args.foreign is None:
        problems.add("--foreign-verdicts: has an effect with --foreign only; give both or none")
    if args.strict and args.judge is not None:
        problems.add("--strict: has no effect with --judge; leave one of them out")
    return list(problems)


def open_drawing(args: argparse.Namespace) -> Plan:
    """Returns the plan that draws --prompts. Raises: InputError listing all problems."""
    from corl_jax.evaluate.own_answers_files import list_planned
    from corl_jax.evaluation.manifest import find_conflicts, read_manifest

    drawing = draw_options.check_arguments(args)
    settings = drawing.settings | {"max_new_tokens": args.max_new_tokens}
    conflicts = find_conflicts(
        args.out, read_manifest(args.out), settings, ["max_new_tokens"], OPTIONS, "answers with"
    )
    images = list_planned(drawing)
    absent = [image for image in images if not image.path.is_file()]
    if args.verdicts is not None and absent:
        conflicts.append(
            f"--verdicts: {len(absent)} images of {args.out} are not drawn yet, such as "
            f"{absent[0].name}; draw them first, without --verdicts"
        )
    if conflicts:
        raise InputError(conflicts)
    drawing = dataclasses.replace(drawing, settings=settings)
    return Plan(args, drawing, drawing.model, settings, images)


def open_images(args: argparse.Namespace) -> Plan:
    """Returns the plan about --images. Raises: InputError listing all problems."""
    from corl_jax.evaluate.own_answers_files import list_asked
    from corl_jax.evaluation.manifest import find_conflicts, read_manifest
    from corl_jax.weights.hashing import hash_weights

    problems = Problems()
    model, template = draw_options.check_model(args, problems)
    images = problems.attempt(list_asked, "--images", args.images)
    manifest = problems.attempt(read_manifest, args.out, FORMAT)
    drawn: dict[str, Any] = {}
    if (args.images / MANIFEST_FILE).is_file():
        drawn = problems.attempt(read_drawing, args.images, "--images") or {}
    settings = drawn | {
        "suite": args.suite, **template, "model": args.model,
        "images": str(args.images.absolute()), "max_new_tokens": args.max_new_tokens,
    }  # fmt: skip
    if model is not None:
        settings["model_sha256"] = problems.attempt(hash_weights, model.folder)
        names = [name for name in OPTIONS if name != "dtype"]
        problems.add(
            find_conflicts(args.out, manifest or {}, settings, names, OPTIONS, "answers with")
        )
        if drawn.get("model_sha256", settings["model_sha256"]) != settings["model_sha256"]:
            print(
                f"warning: --images {args.images}: were drawn by another model, "
                f"{drawn.get('model')}; they count as own images",
                file=sys.stderr,
            )
    problems.raise_any()
    assert model is not None and images is not None
    return Plan(args, None, model, settings, images)


def read_foreign(args: argparse.Namespace, own_images: list[AskedImage]) -> list[AskedImage]:
    """Returns the images of --foreign with verdicts, each with an own image beside it.

    Raises: InputError for images that cannot be read, of other prompts, or with no own image.
    """
    if args.foreign is None:
        return []
    from corl_jax.evaluate.own_answers_files import list_asked, pair_images

    images = list_asked("--foreign", args.foreign)
    if args.foreign_verdicts is not None:
        images = add_verdicts("--foreign-verdicts", args.foreign_verdicts, images)
    paired = pair_images(own_images, images, f"--foreign {args.foreign}")
    if len(paired) < len(images):
        print(
            f"warning: --foreign: {len(images) - len(paired)} of {len(images)} images have no own "
            "image of the same prompt and number; nothing is asked about them",
            file=sys.stderr,
        )
    return paired


def add_verdicts(option: str, path: Path | None, images: list[AskedImage]) -> list[AskedImage]:
    """Returns the images with the verdicts of a file. Raises: InputError if they do not fit."""
    if path is None:
        return images
    from corl_jax.evaluate.own_answers_files import read_verdicts

    return read_verdicts(option, path, images)


def find_source_problems(verdicts: Path | None, settings: dict[str, Any]) -> list[str]:
    """Lists settings with which other images were drawn than those that --verdicts are about."""
    from corl_jax.evaluate.own_answers_files import read_source

    source = read_source(verdicts) if verdicts is not None else {}
    return [
        f"--verdicts {verdicts}: are about images with {name} {source[name]}; these have "
        f"{settings[name]}; take the verdicts on these images"
        for name in (
            "model_sha256",
            "prompts_sha256",
            "seed",
            "cfg_scale",
            "image_steps",
            "temperature",
        )
        if name in source and name in settings and source[name] != settings[name]
    ]


def find_question_problems(
    args: argparse.Namespace, model: PolicyFiles, images: list[AskedImage]
) -> list[str]:
    """Lists questions that the rules cannot judge, and those that are too long for the model."""
    from corl_jax.data.questions import ImageQuestion
    from corl_jax.data.self_questions.records import QUESTIONS
    from corl_jax.inference import find_long_questions

    problems, prompts = Problems(), {image.prompt: image for image in images}
    if args.judge is None:
        problems.add(
            f"{image.where}: question: found {image.record.question[:60]!r}, which no rule judges; "
            f"expected {QUESTIONS[image.record.tag]!r} for tag {image.record.tag}; change it, or "
            "judge by a language model with --judge URL"
            for image in prompts.values()
            if image.record.question != QUESTIONS[image.record.tag]
        )
    options = argparse.Namespace(
        max_new_tokens=args.max_new_tokens, instruction="none", system_prompt=""
    )
    questions = {image.record.question: image for image in prompts.values()}
    cases = [ImageQuestion({"question": q}, i.path, i.where) for q, i in questions.items()]
    problems.add(find_long_questions(model, options, cases, spell_option))
    return list(problems)


def probe_judge(judge: Judge) -> None:
    """Sends one question. Raises: InputError if the judge does not answer it."""
    probe = dataclasses.replace(judge, timeout_s=PROBE_TIMEOUT_S, sleep=lambda seconds: None)
    try:
        probe.judge_answers(["What is the color of the object?"], ["red"], ["red"])
    except ConnectionFailure as error:
        raise InputError(error.problems) from error
