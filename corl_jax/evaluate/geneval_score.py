"""Scores GenEval's images by its rules, from a file of detections or of official results.

    corl-jax evaluate --suite geneval-score --results FILE [--clip PATH --images DIR]
        [--drawn DIR] [--out DIR]

FILE is JSON lines. Either each line has the detections of an image with `class`, `score`, `box`
and perhaps `color` or `mask`, and GenEval's rules are applied; or it is the results.jsonl of the
official script, which is summarised. Colours are those of the file, or with --clip those that
CLIP ViT-L/14 sees in the images under their masks. Paths of images and masks are relative to
--images, or to FILE's folder.
Prints the official summary, and each score with its 95% interval (bootstrap of prompts within
tags). --out writes results.jsonl in the official form, report.json and scores.jsonl.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corl_jax.errors import InputError, Problems
from corl_jax.evaluate.reports import add_report_options, check_report_options, write_scores
from corl_jax.input_files import parse_path, parse_place

if TYPE_CHECKING:
    from corl_jax.evaluation.geneval.detections import ImageDetections
    from corl_jax.evaluation.geneval.rules import Rules, Verdict
    from corl_jax.evaluation.geneval.summary import ImageResult

Rows = list[tuple[int, dict[str, Any]]]
NO_OVERLAP_LIMIT = 1.0
Colors = dict[str, list[str]]  # class -> colours of its first boxes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the suite."""
    add = parser.add_argument
    add("--results", type=parse_path, required=True, metavar="FILE",
        help="detections or official results, as JSON lines")  # fmt: skip
    add("--clip", type=parse_place, metavar="PATH",
        help="CLIP ViT-L/14 that names colours: a folder, a file or a hub id")  # fmt: skip
    add("--images", type=parse_path, metavar="DIR",
        help="folder of the images and masks (default: that of --results)")  # fmt: skip
    add("--max-overlap", type=float, default=NO_OVERLAP_LIMIT, metavar="IOU",
        help="drop boxes that overlap a better one as much; 1, as in GenEval: none")  # fmt: skip
    add("--dtype", choices=("float32", "bfloat16"), help="dtype of CLIP (default float32)")
    add_report_options(parser)


def run(args: argparse.Namespace) -> None:
    """Checks the arguments, scores the images and prints the summary."""
    from corl_jax.evaluation.geneval import summary
    from corl_jax.evaluation.geneval.detections import parse_detections, read_rows
    from corl_jax.evaluation.geneval.rules import Rules

    drawing = check_options(args)
    rows = read_rows(args.results)
    lines = ""
    has_detections = "detections" in rows[0][1]
    warn_without_effect(args, has_detections=has_detections)
    if has_detections:
        images = parse_detections(args.results, rows)
        rules = Rules(max_overlap=args.max_overlap)
        colors = find_colors(args, rows, images, rules)
        verdicts = judge_images(args.results, images, colors, rules)
        results = [make_result(image, verdict) for image, verdict in zip(images, verdicts)]
        lines = format_results(results, verdicts)
    else:
        results = summary.parse_results(rows, args.results)
    units = summary.make_units(results)
    scores = summary.summarize_results(results)
    print(f"{summary.format_official(scores)}\n\n{summary.format_intervals(scores)}")
    warnings = summary.find_incomplete(results)
    sys.stderr.writelines(f"warning: {line}\n" for line in warnings)
    settings = {
        "suite": args.suite,
        "results": str(args.results),
        "judged": "rules" if has_detections else "official results",
        "colors": args.clip or "file",
        "max_overlap": args.max_overlap,
    }
    content = {"scores": scores.as_json(), "warnings": warnings}
    files = {"results.jsonl": lines} if has_detections else {}
    write_scores(args.out, drawing | settings, content, units, files)


def check_options(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the settings of the drawn images. Raises: InputError listing wrong options."""
    problems = Problems()
    if not 0 < args.max_overlap <= 1:
        problems.add(f"--max-overlap: found {args.max_overlap:g}; expected a number in (0, 1]")
    if args.images is not None and not args.images.is_dir():
        problems.add(f"--images {args.images}: no such folder; expected that of the images")
    drawing = problems.attempt(check_report_options, args)
    problems.raise_any()
    return drawing or {}


def warn_without_effect(args: argparse.Namespace, *, has_detections: bool) -> None:
    """Prints a warning for each option that is given and not used."""
    needs_clip, needs_detections = "only --clip reads it", "official results are summarised"
    reasons = {}
    if args.clip is None:
        reasons |= {"--dtype": needs_clip, "--images": needs_clip}
    if not has_detections:
        names = ("--clip", "--dtype", "--images", "--max-overlap")
        reasons |= dict.fromkeys(names, needs_detections)
    for option, reason in reasons.items():
        value = getattr(args, option[2:].replace("-", "_"))
        if value not in (None, NO_OVERLAP_LIMIT):
            print(f"warning: {option}: has no effect; {reason}", file=sys.stderr)


# ---- verdicts


def judge_images(
    path: Path, images: Sequence[ImageDetections], colors: Mapping[str, Colors], rules: Rules
) -> list[Verdict]:
    """Judges all images. `colors` has the classified colours by file name.

    Raises: InputError listing images whose colours are not known.
    """
    from corl_jax.evaluation.geneval.rules import judge_image, read_colors

    problems, verdicts = Problems(), []
    for image in images:
        known = colors.get(image.filename, {})

        def classify_colors(name: str, boxes: Sequence[Any], known: Colors = known) -> Sequence:
            return known[name][: len(boxes)] if name in known else read_colors(name, boxes)

        with problems.collect(f"{path}: {image.filename}: "):
            verdicts.append(judge_image(image.metadata, image.detections, classify_colors, rules))
    problems.raise_any()
    return verdicts


def make_result(image: ImageDetections, verdict: Verdict) -> ImageResult:
    """Returns the row of an image for the summary."""
    from corl_jax.evaluation.geneval.summary import ImageResult

    metadata = image.metadata
    return ImageResult(
        image.filename, metadata["tag"], metadata["prompt"], verdict.correct, json.dumps(metadata)
    )


def format_results(results: Sequence[ImageResult], verdicts: Sequence[Verdict]) -> str:
    """Returns the official results.jsonl."""
    lines = []
    for result, verdict in zip(results, verdicts, strict=True):
        row = {
            "filename": result.filename,
            "tag": result.tag,
            "prompt": result.prompt,
            "correct": result.correct,
            "reason": verdict.reason,
            "metadata": result.metadata,
            "details": json.dumps(verdict.details),
        }
        lines.append(json.dumps(row) + "\n")
    return "".join(lines)


# ---- colours


def find_colors(
    args: argparse.Namespace, rows: Rows, images: Sequence[ImageDetections], rules: Rules
) -> dict[str, Colors]:
    """Returns file name -> class -> colours that CLIP sees; empty without --clip.

    Raises: InputError listing images and masks that cannot be read, before CLIP is loaded.
    """
    if args.clip is None:
        return {}
    from corl_jax.evaluation.geneval.colors import CROPS_AT_ONCE, make_crop_classifier

    checked = check_clip(args.clip, args.dtype or "float32")
    folder = args.images or args.results.parent
    # Twice: all images and masks are checked first, and only a batch of crops is in memory.
    problems = Problems()
    for _ in iterate_crops(folder, rows, images, rules, problems):
        pass
    problems.raise_any()
    with load_clip(checked) as clip:
        classify_crops = make_crop_classifier(clip)
        colors: dict[str, Colors] = {}
        batch: list[tuple[str, str, Any]] = []

        def classify_batch() -> None:
            names, classes, crops = zip(*batch, strict=True) if batch else ((), (), ())
            for name, kind, color in zip(names, classes, classify_crops(crops, classes)):
                colors.setdefault(name, {}).setdefault(kind, []).append(color)
            batch.clear()

        for crop in iterate_crops(folder, rows, images, rules, problems):
            batch.append(crop)
            if len(batch) == CROPS_AT_ONCE:
                classify_batch()
        classify_batch()
    return colors


def iterate_crops(
    folder: Path,
    rows: Rows,
    images: Sequence[ImageDetections],
    rules: Rules,
    problems: Problems,
) -> Any:
    """Yields (file name, class, crop) of each box whose colour is demanded.

    What cannot be read is added to `problems`.
    """
    from corl_jax.evaluation.geneval.colors import crop_object
    from corl_jax.evaluation.geneval.scoring import count_colored

    for (number, row), image in zip(rows, images, strict=True):
        counts = count_colored(image.metadata)
        with problems.collect(f"line {number}: {image.filename}: "):
            for name, boxes in select_boxes(folder, row, image, counts, rules).items():
                picture = open_picture(folder / image.filename)
                for box in boxes:
                    yield image.filename, name, crop_object(picture, box)


def select_boxes(
    folder: Path,
    row: Mapping[str, Any],
    image: ImageDetections,
    counts: Mapping[str, int],
    rules: Rules,
) -> dict[str, list[Any]]:
    """Returns the first boxes of each class in `counts`, with masks.

    Raises: InputError for a mask that is missing or cannot be read.
    """
    from corl_jax.evaluation.geneval.detections import read_masks
    from corl_jax.evaluation.geneval.rules import keep_detections

    selected = {}
    for name, count in counts.items():
        boxes = image.detections.get(name, [])
        chosen = keep_detections({name: boxes}, image.metadata["tag"], rules).get(name, [])[:count]
        if not chosen:
            continue
        masks = read_masks(row, name, folder)
        with_masks = []
        for box in chosen:
            place = next(index for index, other in enumerate(boxes) if other is box)
            if masks[place] is None:
                raise InputError(
                    f"{name}: its box {list(box.box)} has no mask; --clip needs one to see the "
                    "colour of the object alone"
                )
            with_masks.append(dataclasses.replace(box, mask=masks[place]))
        selected[name] = with_masks
    return selected


def open_picture(path: Path) -> Any:
    """Returns an image as its camera held it. Raises: InputError if it cannot be read."""
    from PIL import Image, ImageOps

    from corl_jax.errors import take_first_line

    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({take_first_line(error)}); name the images' folder with "
            "--images"
        ) from None


def check_clip(path: str, dtype: str) -> Any:
    """Checks the files of a CLIP; returns them for `load_clip`. Raises: InputError."""
    from corl_jax.rewards.clip_scores import check_assets
    from corl_jax.rewards.networks import NETWORKS, CheckedNetwork
    from corl_jax.weights.checkpoint import open_checkpoint
    from corl_jax.weights.hub import resolve_path
    from corl_jax.weights.layouts import KINDS

    name = "clip_l14"
    try:
        folder = resolve_path(path)
        with open_checkpoint(folder, KINDS[NETWORKS[name].kind]) as opened:
            check_assets(opened)
            return CheckedNetwork(name, folder, opened.parameters, dtype, ())
    except InputError as error:
        raise InputError(f"--clip: {problem}" for problem in error.problems) from error


def load_clip(checked: Any) -> Any:
    """Returns the CLIP as a context that has it on the device."""
    from corl_jax.devices.startup import prepare_devices
    from corl_jax.rewards.networks import load_frozen_network

    prepare_devices()
    return load_frozen_network(checked, None, offload=False).use()
