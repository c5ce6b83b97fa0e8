"""Scores GenEval's images in process: a detector in JAX, colours by CLIP, GenEval's rules.

    corl-jax evaluate --suite geneval-detect --images DIR --detector PATH [--clip PATH] [--out OUT]

DIR is the --out folder of --suite geneval, or any folder that GenEval's own script reads
(NUMBER/metadata.jsonl and NUMBER/samples/*.png). PATH is the detector that GenEval uses,
mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco.pth of mmdetection, or a Mask2Former in transformers'
layout. --clip is CLIP ViT-L/14 with its tokenizer, for demands with colours.
Prints the official summary with 95% intervals, and with --against the agreement with another
results file: Cohen's kappa of the verdicts for each tag. --out writes results.jsonl in the
official form, report.json and scores.jsonl; the report has the settings with which DIR was drawn.
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
from corl_jax.evaluate.reports import (
    MANIFEST_FILE,
    add_report_options,
    check_report_options,
    write_scores,
)
from corl_jax.input_files import parse_path, parse_place

if TYPE_CHECKING:
    from corl_jax.evaluation.geneval.rules import Verdict
    from corl_jax.evaluation.geneval.summary import ImageResult
    from corl_jax.rewards.networks import CheckedNetwork

BACKENDS = ("jax", "transformers")

ImageFile = tuple[Path, dict[str, Any]]
"""An image and its demand."""


@dataclasses.dataclass(frozen=True)
class CheckedInputs:
    """The inputs of the suite after their checks."""

    images: Sequence[ImageFile]
    detector: CheckedNetwork
    clip: CheckedNetwork | None
    drawing: Mapping[str, Any]  # settings of the drawn images
    others: Sequence[ImageResult]  # results to compare with


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the suite."""
    add = parser.add_argument
    add("--images", type=parse_path, required=True, metavar="DIR",
        help="folder of --suite geneval, or one that GenEval's script reads")  # fmt: skip
    add("--detector", type=parse_place, required=True, metavar="PATH",
        help="Mask2Former: a .pth of mmdetection, a folder or a hub id")  # fmt: skip
    add("--backend", choices=BACKENDS, default="jax",
        help="transformers: its Mask2Former in PyTorch, slower (default %(default)s)")  # fmt: skip
    add("--clip", type=parse_place, metavar="PATH",
        help="CLIP ViT-L/14 that names colours: a folder, a file or a hub id")  # fmt: skip
    add("--dtype", choices=("float32", "bfloat16"), default="float32",
        help="compute dtype of both networks in JAX (default %(default)s)")  # fmt: skip
    add("--batch-size", type=int, default=16,
        help="images of a device at once (default %(default)s)")  # fmt: skip
    add("--against", type=parse_path, metavar="FILE",
        help="results.jsonl of the same images, to measure the agreement with")  # fmt: skip
    add_report_options(parser)


def run(args: argparse.Namespace) -> None:
    """Checks the arguments, detects and judges, and prints the summary."""
    from corl_jax.evaluate.geneval_score import format_results
    from corl_jax.evaluation.geneval import agreement, summary

    checked = check_arguments(args)
    images, others = checked.images, checked.others
    name, verdicts = judge_images(args, checked)
    results = [make_result(image, verdict) for image, verdict in zip(images, verdicts, strict=True)]
    scores, units = summary.summarize_results(results), summary.make_units(results)
    print(f"{name}\n\n{summary.format_official(scores)}\n\n{summary.format_intervals(scores)}")
    kappas = {}
    if others:
        kappas = agreement.measure_agreement(results, others)
        print(f"\n{agreement.format_agreement(kappas, str(args.against))}")
    warnings = summary.find_incomplete(results)
    sys.stderr.writelines(f"warning: {line}\n" for line in warnings)
    settings: dict[str, Any] = {
        "suite": args.suite,
        "images": str(args.images),
        "judged": name,
        "detector": args.detector,
        "clip": args.clip,
        "dtype": args.dtype,
        "against": None if args.against is None else str(args.against),
    }
    content = {
        "scores": scores.as_json(),
        "warnings": warnings,
        "agreement": {tag: kappa.as_json() for tag, kappa in kappas.items()},
    }
    files = {"results.jsonl": format_results(results, verdicts)}
    write_scores(args.out, {**checked.drawing, **settings}, content, units, files)


def make_result(image: ImageFile, verdict: Verdict) -> ImageResult:
    """Returns the row of an image for the summary."""
    from corl_jax.evaluation.geneval.summary import ImageResult

    path, demand = image
    return ImageResult(
        str(path), demand["tag"], demand["prompt"], verdict.correct, json.dumps(demand)
    )


# ---- checks


def check_arguments(args: argparse.Namespace) -> CheckedInputs:
    """Checks all that needs no device.

    Raises: InputError listing all problems of folders, files and networks.
    """
    from corl_jax.evaluate.geneval_score import check_clip
    from corl_jax.evaluation.geneval.detections import read_rows
    from corl_jax.evaluation.geneval.folders import list_images
    from corl_jax.evaluation.geneval.summary import parse_results

    problems, clip, others = Problems(), None, None
    if args.batch_size < 1:
        problems.add(f"--batch-size: found {args.batch_size}; expected at least 1")
    if args.drawn is None and (args.images / MANIFEST_FILE).is_file():
        args.drawn = args.images
    drawing = problems.attempt(check_report_options, args)
    images = problems.attempt(list_images, args.images, read_demand) or []
    detector = problems.attempt(check_detector, args)
    colored = [p for p, demand in images if any("color" in e for e in demand.get("include", ()))]
    if args.clip is not None:
        clip = problems.attempt(check_clip, args.clip, args.dtype)
        if images and not colored:
            print("warning: --clip: has no effect; no demand has a colour", file=sys.stderr)
    elif colored:
        problems.add(
            f"--clip: is missing; {len(colored)} images have demands with colours, as "
            f"{colored[0]}; give CLIP ViT-L/14 (openai/clip-vit-large-patch14)"
        )
    if args.against is not None:
        others = problems.attempt(lambda: parse_results(read_rows(args.against), args.against))
    problems.raise_any()
    assert detector is not None  # otherwise there was a problem
    return CheckedInputs(images, detector, clip, drawing or {}, others or ())


def check_detector(args: argparse.Namespace) -> CheckedNetwork:
    """Checks the detector's files; returns them for `load_frozen_network`. Raises: InputError."""
    from corl_jax.evaluation.geneval.detector import check_class_count
    from corl_jax.rewards.networks import CheckedNetwork
    from corl_jax.weights.checkpoint import open_checkpoint
    from corl_jax.weights.hub import resolve_path
    from corl_jax.weights.layouts import KINDS
    from corl_jax.weights.torch_bin import import_torch

    try:
        path = resolve_path(args.detector)
        with open_checkpoint(path, KINDS["mask2former"]) as opened:
            check_class_count(opened.config.num_classes, str(path))
            if args.backend == "transformers":
                import_torch(path)
                if not opened.layout.startswith("transformers"):
                    raise InputError(
                        f"{path}: has the layout {opened.layout}; expected transformers' for "
                        "--backend transformers; leave --backend out"
                    )
            return CheckedNetwork("mask2former", path, opened.parameters, args.dtype, ())
    except InputError as error:
        raise InputError(f"--detector: {problem}" for problem in error.problems) from error


def read_demand(path: Path) -> dict[str, Any]:
    """Returns the demand of a folder. Raises: InputError naming the file."""
    from corl_jax.data.geneval_demands import parse_demand
    from corl_jax.input_files import read_text

    text = read_text(path, "one JSON object")
    try:
        return parse_demand(text)
    except InputError as error:
        raise InputError(f"{path}: {problem}" for problem in error.problems) from error


# ---- detection


def judge_images(args: argparse.Namespace, checked: CheckedInputs) -> tuple[str, list[Verdict]]:
    """Returns the detector's name and the verdict on each image."""
    import contextlib

    import jax
    from tqdm import tqdm

    from corl_jax.devices.mesh import make_mesh
    from corl_jax.devices.startup import prepare_devices
    from corl_jax.evaluate.geneval_score import open_picture
    from corl_jax.evaluation.geneval.colors import make_crop_classifier
    from corl_jax.evaluation.geneval.detector import load_torch_detector, make_detector
    from corl_jax.evaluation.geneval.scoring import score_geneval_images
    from corl_jax.rewards.networks import load_frozen_network

    prepare_devices()
    devices = jax.local_devices()
    mesh = make_mesh(devices=devices) if len(devices) > 1 else None
    at_once = args.batch_size * len(devices)
    verdicts: list[Verdict] = []
    with contextlib.ExitStack() as stack:

        def load(network: CheckedNetwork) -> Any:
            return stack.enter_context(load_frozen_network(network, mesh, offload=False).use())

        clip = checked.clip
        classify_crops = None if clip is None else make_crop_classifier(load(clip))
        if args.backend == "transformers":
            detector = load_torch_detector(checked.detector.path)
        else:
            detector = make_detector(load(checked.detector), at_once)
        images = checked.images
        with tqdm(total=len(images), unit="image", disable=None) as progress:
            for first in range(0, len(images), at_once):
                paths, demands = zip(*images[first : first + at_once], strict=True)
                pictures = [open_picture(path) for path in paths]
                verdicts += score_geneval_images(pictures, demands, detector, classify_crops)
                progress.update(len(pictures))
    return detector.name, verdicts
