"""Asks a model about images, judges its answers, and reports: the suite `own_answers`."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from corl_jax.data.images import decode_image
from corl_jax.devices.startup import prepare_devices
from corl_jax.errors import InputError, Preempted
from corl_jax.evaluate import own_answers_report
from corl_jax.evaluate.draw_run import open_drawing, tell_drawing, tell_plan
from corl_jax.evaluate.own_answers import FORMAT, OPTIONS, Plan
from corl_jax.evaluate.own_answers_files import (
    ANSWERS,
    Answer,
    AskedImage,
    Comparison,
    Query,
    describe_row,
    format_answer,
    format_rows,
    format_verdict,
    read_answers,
    split_batches,
)
from corl_jax.evaluate.running import (
    append_line,
    explain_batch,
    open_folder,
    require_one_process,
    watch_signals,
)
from corl_jax.evaluation.image_store import remove_temporary, write_whole
from corl_jax.evaluation.manifest import MANIFEST, find_conflicts, read_manifest
from corl_jax.evaluation.own_answers import BLANK, FOREIGN, GREY, OWN
from corl_jax.inference import choose_dtype
from corl_jax.policies import batched, load_policy
from corl_jax.policies.family import SamplingOptions
from corl_jax.rewards.answers import read_answer
from corl_jax.rewards.self_answers import judge_answer, read_demand
from corl_jax.runs.append_log import AppendLog
from corl_jax.weights.hashing import hash_file

BATCH_SIZE = 32
VERDICTS_AT_ONCE = 64  # that a kill can lose
RULES, STRICT_RULES = "rules", "rules, strict"

Question = tuple[Query, AskedImage]
"""What is asked, and the image (for a blank one, an image of the prompt)."""


def evaluate_plan(plan: Plan) -> None:
    """Draws and asks what is missing in --out, and writes answers and report."""
    out = plan.args.out
    with open_images(plan) as (settings, counts):
        questions = list_questions(plan)
        answers, verdicts = read_answers(out)
        missing = list(dict.fromkeys(query for query, _ in questions if query not in answers))
        paths = {query: image.path for query, image in questions}
        counts |= {"questions": len(questions), "asked_now": len(missing)}
        if missing:
            answers |= ask_missing(plan, missing, paths, settings["dtype"])
        judge, correct = judge_questions(plan, questions, answers, verdicts)
        rows = [
            describe_row(query, answers[query], image, judge, is_correct)
            for (query, image), is_correct in zip(questions, correct, strict=True)
        ]
        report = own_answers_report.make_report(rows, [image for _, image in questions])
        write_whole(out, ANSWERS, format_rows(rows))
        settings |= describe_settings(plan, judge)
        own_answers_report.write_files(out, report, settings, counts)
        remove_temporary(out)
    print(own_answers_report.format_report(report, judge))
    print(f"\nanswers: {len(missing)} asked, the others kept: {out / ANSWERS}")


@contextlib.contextmanager
def open_images(plan: Plan) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yields settings and counts while all own images are there and the folder is locked."""
    out, args = plan.args.out, plan.args
    if plan.drawing is not None:
        tell_plan(plan.drawing)
        with open_drawing(plan.drawing, needs_one_process=True) as drawing:
            tell_drawing(drawing)
            print()
            yield drawing.settings, drawing.summary
        return
    prepare_devices()
    require_one_process(args.suite)
    settings = plan.settings | {"dtype": choose_dtype(args.dtype).name}
    manifest = read_manifest(out, FORMAT)
    if conflicts := find_conflicts(out, manifest, settings, ["dtype"], OPTIONS, "answers with"):
        raise InputError(conflicts)
    with open_folder(out):
        content = own_answers_report.format_json({"format": FORMAT, "settings": settings})
        write_whole(out, MANIFEST, content)
        yield settings, {"images": len(plan.images)}


def list_questions(plan: Plan) -> list[Question]:
    """Returns what is asked about own, foreign and blank images, in this order."""
    questions = [
        (Query(source, image.name, hash_file(image.path), image.record.question), image)
        for source, images in ((OWN, plan.images), (FOREIGN, plan.foreign_images))
        for image in images
    ]
    first_of_prompt = {image.prompt: image for image in reversed(plan.images)}
    return questions + [
        (Query(BLANK, "", "", image.record.question), image)
        for _, image in sorted(first_of_prompt.items())
    ]


def describe_settings(plan: Plan, judge: str) -> dict[str, Any]:
    """Returns the settings of verdicts and foreign images for the report."""
    args = plan.args
    settings: dict[str, Any] = {"judge": judge, "judge_url": plan.judge and plan.judge.url}
    for name in ("verdicts", "foreign", "foreign_verdicts"):
        path = getattr(args, name)
        settings[name] = None if path is None else str(path)
    return settings


# ---- asking


def ask_missing(
    plan: Plan, missing: Sequence[Query], paths: Mapping[Query, Path], dtype_name: str
) -> dict[Query, Answer]:
    """Asks the questions greedily; appends each answer to the folder's file.

    Raises: Preempted before a batch after a signal.
    """
    args, dtype = plan.args, choose_dtype(dtype_name)
    loaded = load_policy(args.model, dtype)
    model = dataclasses.replace(loaded, processor=plan.model.processor)
    options = SamplingOptions(
        special=model.processor.special, greedy=True, max_new_tokens=args.max_new_tokens,
        dtype=dtype,
    )  # fmt: skip
    side = model.family.limits(model.sizes).input_image_side
    blank = Image.new("RGB", (side, side), GREY)
    record, answers = AppendLog(args.out / ANSWERS), {}
    batch_size = args.batch_size or BATCH_SIZE
    bar = tqdm(total=len(missing), unit="answer", disable=None)
    memory = explain_batch(batch_size, "answers", "a smaller --max-new-tokens")
    with contextlib.closing(record), bar, watch_signals() as signals, memory:

        def open_image(number: int) -> Image.Image:
            # Images are opened before a batch: no answer of the last one is lost.
            if signals:
                raise Preempted(
                    f"stopped by {signals[0]}; the same command asks what is missing in {args.out}"
                )
            query = missing[number]
            return decode_image(paths[query]) if query.image else blank

        samples = batched.answer_questions(
            model, [query.question for query in missing], open_image, options,
            batch_size=batch_size,
        )  # fmt: skip
        for sample in samples:
            query, tokens = missing[sample.prompt], sample.tokens.tolist()
            is_cut = model.processor.special.eos not in tokens
            answers[query] = Answer(model.processor.decode(tokens), len(tokens), is_cut)
            append_line(record, format_answer(query, answers[query]))
            bar.update()
    return answers


# ---- judging


def judge_questions(
    plan: Plan, questions: Sequence[Question], answers: Mapping[Query, Answer],
    verdicts: Mapping[Comparison, bool],
) -> tuple[str, list[bool]]:  # fmt: skip
    """Returns the judge's name and whether each answer is right.

    `verdicts` are those of earlier runs; a language model is asked once for each comparison.
    """
    if plan.judge is None:
        is_strict = plan.args.strict
        correct = [
            judge_answer(
                answers[query].text, read_demand(image.record.tag, image.record.include),
                strict=is_strict,
            ) == 1.0
            for query, image in questions
        ]  # fmt: skip
        return STRICT_RULES if is_strict else RULES, correct
    name = plan.judge.model
    comparisons = [
        Comparison(name, query.question, image.record.answer, answers[query].text)
        for query, image in questions
    ]
    known = dict(verdicts)
    missing = list(dict.fromkeys(x for x in comparisons if x not in known))
    record = AppendLog(plan.args.out / ANSWERS)
    bar = tqdm(total=len(missing), unit="verdict", disable=None)
    with contextlib.closing(record), bar, watch_signals() as signals:
        for batch in split_batches(missing, VERDICTS_AT_ONCE):
            if signals:
                raise Preempted(
                    f"stopped by {signals[0]}; the same command judges what is missing in "
                    f"{plan.args.out}"
                )
            judged = plan.judge.judge_answers(
                [comparison.question for comparison in batch],
                [comparison.truth for comparison in batch],
                [read_answer(comparison.answer) for comparison in batch],
            )
            for comparison, is_correct in zip(batch, judged, strict=True):
                known[comparison] = is_correct
                append_line(record, format_verdict(comparison, is_correct))
            bar.update(len(batch))
    return name, [known[comparison] for comparison in comparisons]
