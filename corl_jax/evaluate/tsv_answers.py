"""Answers the questions of a TSV with a model, resumably, and rates the answers."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

import corl_jax
from corl_jax.devices.startup import prepare_devices
from corl_jax.errors import InputError, Preempted, Problems
from corl_jax.evaluate import tsv, tsv_folder, tsv_report
from corl_jax.evaluate.running import (
    append_line,
    explain_batch,
    open_folder,
    require_one_process,
    watch_signals,
)
from corl_jax.evaluation.manifest import find_conflicts, read_manifest
from corl_jax.evaluation.matching.answer_tags import OPEN
from corl_jax.evaluation.tsv.images import Source, check_images, find_images, open_image
from corl_jax.evaluation.tsv.kinds import KINDS, recognise_kind
from corl_jax.evaluation.tsv.prompts import CORL, ROLES, VLMEVALKIT, Question, write_question
from corl_jax.evaluation.tsv.table import Table, Values, import_pandas, read_predictions, read_table
from corl_jax.inference import choose_dtype
from corl_jax.policies import PolicyFiles, batched, inspect_policy, load_policy
from corl_jax.policies.family import SamplingOptions
from corl_jax.policies.generation_config import read_generation
from corl_jax.runs.append_log import AppendLog
from corl_jax.tasks import IMAGE_UNDERSTANDING
from corl_jax.train.provenance import find_commit
from corl_jax.weights.hashing import hash_file, hash_weights

MAX_NEW_TOKENS, BATCH_SIZE = 2048, 32
IMAGE_THREADS = 8


@dataclasses.dataclass(frozen=True)
class Plan:
    """A checked evaluation."""

    args: argparse.Namespace
    table: Table
    kind: str
    rows: list[Values]  # that are answered
    questions: list[Question]  # of the rows
    images: list[tuple[Source, ...]]  # of the rows
    model: PolicyFiles  # with the processor of the chosen roles
    max_new_tokens: int
    settings: dict[str, Any]  # without the dtype, which comes with the devices


def answer_and_rate(args: argparse.Namespace) -> None:
    """Answers what is missing in --out, and writes prediction file and report."""
    plan = check_arguments(args)
    tell_plan(plan)
    prepare_devices()
    require_one_process(args.suite)
    dtype = choose_dtype(args.dtype)
    settings = plan.settings | {"dtype": dtype.name}
    raise_conflicts(args.out, settings, ("dtype",))
    with open_folder(args.out):
        tsv_folder.write_settings(args.out, settings)
        answers = tsv_folder.read_answers(args.out)
        started, known = time.monotonic(), len(answers)
        answers |= answer_missing(plan, answers, dtype)
        seconds = time.monotonic() - started
        path = args.out / f"{name_model(plan)}_{plan.table.name}.{args.format or 'tsv'}"
        mode = args.answer_tag or "auto"
        tsv_folder.write_predictions(path, plan.table, plan.rows, answers, mode)
        # Rated from the file, so that the types that pandas finds in it count here too.
        rows, _ = read_predictions(path, plan.table)
        counts = tsv.count_rows(plan.table, rows) | {
            "answered_before": min(known, len(rows)),
            "answers_with_tag": sum(row_has_tag(answers, row) for row in rows),
        }
        report = tsv_report.rate_rows(
            plan.table, plan.kind, rows, tsv.make_rating_options(args), settings, counts
        )
        command = tsv_report.describe_command(path, plan.table, plan.kind)
        tsv_report.write_files(args.out, report, command)
    tsv_report.print_report(report)
    print(f"predictions: {path}")
    print(
        f"{len(answers) - known} answers in {seconds:.1f} s, loading and compilation included; "
        f"next: {args.out / tsv_report.NEXT}",
        file=sys.stderr,
    )


def row_has_tag(answers: dict[str, str], row: Values) -> bool:
    """Returns whether the answer to a row has an answer tag."""
    return OPEN in answers[str(row["index"])]


def name_model(plan: Plan) -> str:
    """Returns the model's name in the name of the prediction file."""
    # "." and ".." name no model.
    return Path(str(plan.args.model)).name.strip(".") or plan.model.folder.resolve().name


# ---- checks


def check_arguments(args: argparse.Namespace) -> Plan:
    """Checks all that needs no device.

    Raises:
        InputError: listing all problems of data, images, model and folder.
    """
    problems = Problems()
    problems.attempt(import_pandas)
    problems.raise_any()
    problems.attempt(tsv_folder.check_format, args.format or "tsv")
    opened = problems.attempt(open_model, args)
    problems.attempt(read_manifest, args.out, tsv_folder.FORMAT)
    table = problems.attempt(read_table, args.data)
    kind = problems.attempt(recognise_kind, table, args.kind) if table else None
    count = problems.attempt(tsv.require_rows, table, args.rows) if table else None
    images = problems.attempt(find_images, table) if table else None
    problems.raise_any()
    assert table and kind and count and opened and images is not None
    (model, roles), style = opened, args.prompt_style or VLMEVALKIT
    rows, images = table.rows[:count], images[:count]
    problems.attempt(check_images, table, images)
    problems.attempt(tsv.check_rows, kind, rows)
    # A model that was trained without an instruction is asked without one.
    stated = problems.attempt(read_generation, model.folder)
    instruct = stated is None or stated.instruction != "none"
    questions = [write_question(row, kind, table.name, style, instruct) for row in rows]
    length = problems.attempt(choose_length, args, model, table, questions, images)
    problems.raise_any()
    assert length is not None
    settings = describe_settings(args, model, kind, questions, length) | roles
    if style == CORL:
        settings["instruction"] = "corl" if instruct else "none, as generation_config.json states"
    raise_conflicts(args.out, settings, [n for n in tsv_folder.OPTIONS if n != "dtype"])
    return Plan(args, table, kind, rows, questions, images, model, length, settings)


def open_model(args: argparse.Namespace) -> tuple[PolicyFiles, dict[str, str | None]]:
    """Returns the model's files, with the processor of the chosen roles, and these settings."""
    model, style = inspect_policy(args.model), args.prompt_style or VLMEVALKIT
    choose_roles = model.family.choose_roles
    if choose_roles is None:
        if args.roles is not None:
            raise InputError(f"--roles: has no effect on {model.family.name}; leave it out")
        return model, {"roles": None}
    try:
        roles = choose_roles(model.processor, args.roles or ROLES[style])
    except InputError as error:
        raise InputError([f"--roles: {problem}" for problem in error.problems]) from error
    files = dataclasses.replace(model, processor=roles.processor)
    return files, {"roles": roles.name}


def encode_question(model: PolicyFiles, question: Question, images: Sequence[Source]) -> list[int]:
    """Returns the token ids of a question with its images."""
    columns = make_columns(question, images)
    prompt = IMAGE_UNDERSTANDING.turn.prompt
    return model.processor.prompt_ids(prompt, columns, question.system_prompt)


def make_columns(question: Question, images: Sequence[Source]) -> dict[str, Any]:
    """Returns a question as a row of the task; its text begins right behind the images."""
    return {"qa_problem": question.text, "num_images": len(images), "lead": ""}


def choose_length(
    args: argparse.Namespace, model: PolicyFiles, table: Table, questions: Sequence[Question],
    images: Sequence[Sequence[Source]],
) -> int:  # fmt: skip
    """Returns the most tokens of an answer: as given, or the default if the model has room.

    Raises: InputError for a question that leaves no room.
    """
    lengths = [
        len(encode_question(model, question, sources))
        for question, sources in zip(questions, images, strict=True)
    ]
    positions = model.family.limits(model.sizes).positions
    room = args.max_new_tokens or 1
    problems = [
        f"{table.where(row)}: found {length} tokens (images counted); expected at most "
        f"{positions - room}, which leaves room for {room} in the model's {positions} positions"
        for row, length in enumerate(lengths)
        if length > positions - room
    ]
    if problems:
        raise InputError(problems)
    return args.max_new_tokens or min(MAX_NEW_TOKENS, positions - max(lengths))


def describe_settings(
    args: argparse.Namespace, model: PolicyFiles, kind: str, questions: Sequence[Question],
    max_new_tokens: int,
) -> dict[str, Any]:  # fmt: skip
    """Returns the settings for the report, without roles and dtype."""
    return {
        "suite": "tsv",
        "model": str(args.model),
        "model_sha256": hash_weights(model.folder, model.family.kind),
        "data": str(args.data),
        "data_sha256": hash_file(args.data),
        "kind": kind,
        "rows": args.rows,
        "prompt_style": args.prompt_style or VLMEVALKIT,
        "system_prompt": questions[0].system_prompt,
        "first_question": questions[0].text,
        "greedy": True,
        "max_new_tokens": max_new_tokens,
        "answer_tag": args.answer_tag or "auto",
        "matcher": args.matcher,
        "judge": KINDS[kind].judge,
        "mmmu_guess_seed": tsv.make_rating_options(args).guess_seed,
        "corl_jax_version": corl_jax.__version__,
        "commit": find_commit(Path(corl_jax.__file__).parent),
    }


def raise_conflicts(out: Path, settings: dict[str, Any], names: Sequence[str]) -> None:
    """Raises: InputError if the folder's answers have other settings."""
    problems = Problems()
    manifest = read_manifest(out, tsv_folder.FORMAT)
    options = tsv_folder.OPTIONS
    problems.add(find_conflicts(out, manifest, settings, names, options, "answers with"))
    problems.raise_any()


def tell_plan(plan: Plan) -> None:
    """Prints what is asked, and how."""
    settings = plan.settings
    print(
        f"sampling: greedy, at most {plan.max_new_tokens} new tokens; {settings['prompt_style']} "
        f"prompts, roles {settings['roles']}; behind the image of the first row: "
        f"{settings['first_question']!r}",
        file=sys.stderr,
    )
    if plan.args.max_new_tokens is None and plan.max_new_tokens < MAX_NEW_TOKENS:
        print(
            f"warning: at most {plan.max_new_tokens} new tokens instead of {MAX_NEW_TOKENS}: the "
            "model has no more positions behind the longest question",
            file=sys.stderr,
        )
    tsv.tell_unused_options(plan.args, plan.kind)


# ---- answering


def answer_missing(plan: Plan, answers: dict[str, str], dtype: Any) -> dict[str, str]:
    """Answers the rows without an answer; appends each batch to the folder's record."""
    missing = [n for n, row in enumerate(plan.rows) if str(row["index"]) not in answers]
    if not missing:
        return {}
    model = load_policy(plan.args.model, dtype)
    model = dataclasses.replace(model, processor=plan.model.processor)
    options = SamplingOptions(
        special=model.processor.special, greedy=True, max_new_tokens=plan.max_new_tokens,
        dtype=dtype,
    )  # fmt: skip
    record, new = AppendLog(plan.args.out / tsv_folder.ANSWERS), {}
    bar = tqdm(total=len(missing), unit="answer", disable=None)
    batch_size = plan.args.batch_size or BATCH_SIZE
    memory = explain_batch(batch_size, "answers", "a smaller --max-new-tokens")
    with contextlib.closing(record), bar, watch_signals() as signals, memory:
        for number, text in sample_rows(plan, model, missing, options, signals):
            index = plan.rows[number]["index"]
            append_line(record, tsv_folder.format_answer(index, text))
            new[str(index)] = text
            bar.update()
    return new


def sample_rows(
    plan: Plan, model: Any, numbers: Sequence[int], options: SamplingOptions,
    signals: Sequence[str],
) -> Iterator[tuple[int, str]]:  # fmt: skip
    """Yields (number of a row, answer).

    Raises: Preempted before a batch if there are `signals`.
    """
    # Prompts with as many images have arrays of one shape.
    groups: dict[int, list[int]] = {}
    for number in numbers:
        groups.setdefault(len(plan.images[number]), []).append(number)
    with ThreadPoolExecutor(IMAGE_THREADS) as pool:
        for _, members in sorted(groups.items()):
            yield from sample_group(plan, model, members, options, signals, pool)


def sample_group(
    plan: Plan, model: Any, members: Sequence[int], options: SamplingOptions,
    signals: Sequence[str], pool: ThreadPoolExecutor,
) -> Iterator[tuple[int, str]]:  # fmt: skip
    """Yields (number of a row, answer) of rows with equally many images."""
    questions = [(plan.questions[n], plan.images[n]) for n in members]
    batch_size = plan.args.batch_size or BATCH_SIZE
    lengths = [
        model.processor.bucket(len(encode_question(model, *question))) for question in questions
    ]
    # The order in which the batches take the rows.
    order = sorted(range(len(members)), key=lambda place: lengths[place])

    def open_images(place: int) -> Any:
        images = [open_image(source) for source in questions[place][1]]
        return images[0] if len(images) == 1 else images

    take = read_ahead(open_images, order, 2 * batch_size, pool)

    def take_unless_stopped(place: int) -> Any:
        # Images are taken before a batch: no answer of the last one is lost.
        if signals:
            raise Preempted(
                f"stopped by {signals[0]}; the same command answers what is missing in "
                f"{plan.args.out}"
            )
        return take(place)

    samples = batched.answer_rows(
        model, [make_columns(*question) for question in questions], take_unless_stopped, options,
        system_prompt=questions[0][0].system_prompt, batch_size=batch_size,
    )  # fmt: skip
    for sample in samples:
        yield members[sample.prompt], model.processor.decode(sample.tokens)


def read_ahead(
    open_images: Callable[[int], Any], order: Sequence[int], count: int, pool: ThreadPoolExecutor
) -> Callable[[int], Any]:
    """Returns `open_images` with the next `count` of `order` opened in threads meanwhile."""
    waiting: dict[int, Future] = {}
    rest = iter(order)

    def take(place: int) -> Any:
        image = waiting.pop(place).result() if place in waiting else open_images(place)
        for following in rest:
            if following != place:
                waiting[following] = pool.submit(open_images, following)
            if len(waiting) >= count:
                break
        return image

    return take
