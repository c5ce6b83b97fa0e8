"""Runs `corl-jax merge`: opens and compares all models, then writes the merged one."""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Iterable, Iterator

import numpy as np

from corl_jax.atomic_files import check_not_read, check_output_folder, create_folder
from corl_jax.console import show_progress
from corl_jax.errors import InputError, shorten
from corl_jax.merge.inputs import MergeInputs, open_inputs
from corl_jax.merge.moves import MergedLeaves, TensorId, TensorMoves, measure_moves
from corl_jax.merge.report import REPORT_FILE, MergeSettings, format_table, make_card, make_report
from corl_jax.merge.rules import RULES
from corl_jax.params import flatten, partition
from corl_jax.weights.dtypes import parse_dtype
from corl_jax.weights.export import check_export
from corl_jax.weights.export_folder import Export, write_export
from corl_jax.weights.parts import list_read_folders
from corl_jax.weights.shards import write_json


def run_merge(args: argparse.Namespace) -> None:
    """Merges the models of `args`, and prints the moves of each part of the model.

    Raises:
        InputError: listing every file, tensor and argument that is wrong. Nothing is written.
    """
    rule = RULES[args.rule]
    check_output_folder(args.out, "--out", overwrite=args.overwrite)
    # A rule without a factor ignores it.
    factor = rule.factor if args.factor is None or rule.factor is None else args.factor
    settings = MergeSettings(args.rule, rule.share, factor, args.params, args.dtype)
    with contextlib.ExitStack() as stack:
        inputs = open_inputs(args.base, args.models, stack)
        layout = args.layout or inputs.base.layout
        check_export(inputs.base.kind, layout, inputs.base.config)
        _check_place(args, inputs)
        movable = _find_movable(inputs, args.params)
        with show_progress("compare") as progress:
            moves, problems = measure_moves(inputs, rule, factor or 1.0, progress)
        if not problems:
            problems = [
                *_find_foreign_moves(inputs, moves.values(), movable, args.params),
                *_find_carried_moves(inputs),
            ]
        if problems:
            raise InputError(problems)
        notes = _write_merged(args, inputs, moves, settings, layout)
    for note in shorten([*inputs.notes, *_describe_moves(inputs, moves), *notes]):
        print(f"note: {note}")
    print(f"wrote {args.out}")


def _check_place(args: argparse.Namespace, inputs: MergeInputs) -> None:
    """Refuses to replace an input by the output."""
    for folder in (inputs.base.folder, *(model.folder for model in inputs.models)):
        check_not_read(args.out, list_read_folders(folder, inputs.base.kind), "--out")


def _find_movable(inputs: MergeInputs, params: str | None) -> set[str]:
    """Returns the paths of the parameters that models may have trained."""
    patterns = inputs.family.trainable if params is None else [params]
    chosen, _ = partition(inputs.base.shapes, patterns, option="--params")
    return set(flatten(chosen))


def _find_foreign_moves(
    inputs: MergeInputs, moves: Iterable[TensorMoves], movable: set[str], params: str | None
) -> Iterator[str]:
    """Yields a problem for each tensor that should equal the base and does not."""
    for tensor in moves:
        for model, moved, sums in zip(inputs.models, tensor.moved, tensor.sums, strict=True):
            if not moved or tensor.path in movable:
                continue
            place = f"is outside of --params {params!r}"
            if params is None:
                place = f"is frozen by default in a training of a {inputs.family.name}"
            remedy = "let --params match it if it was trained from this base"
            yield (
                f"{model.place}: {tensor.name} {place}, and differs from the base by a norm of "
                f"{sums.norm:.3g}; expected equal values: give models of this base, or {remedy}"
            )


def _find_carried_moves(inputs: MergeInputs) -> Iterator[str]:
    """Yields a problem for each tensor that no forward pass reads and that is not the base's."""
    for model in inputs.models:
        for key in sorted(inputs.base.carried.keys() & model.carried.keys()):
            base, value = inputs.base.carried[key].read(key), model.carried[key].read(key)
            if not np.array_equal(base.astype(value.dtype), value):
                yield (
                    f"{model.place}: {key} differs from the base; expected equal values, because "
                    "nothing trains it: give models of this base"
                )


def _write_merged(
    args: argparse.Namespace, inputs: MergeInputs, moves: dict[TensorId, TensorMoves],
    settings: MergeSettings, layout: str,
) -> list[str]:  # fmt: skip
    """Writes the folder, whole or not at all, and prints the table; returns notes."""
    base, keep = inputs.base, args.dtype == "keep"
    leaves = MergedLeaves(
        inputs, moves, RULES[args.rule], settings.factor or 1.0,
        lambda dtype: dtype if keep else parse_dtype(args.dtype),
    )  # fmt: skip
    export = Export(
        kind=base.kind, layout=layout, config=base.config, leaves=leaves, assets=base.assets,
        carried=base.carried, dtype=args.dtype, stated_dtype=None if keep else args.dtype,
        extra=make_card(settings, inputs, layout),
    )  # fmt: skip
    with create_folder(args.out, overwrite=args.overwrite) as folder:
        with show_progress("write") as progress:
            notes = write_export(folder, export, progress)
        report = make_report(settings, inputs, list(moves.values()))
        write_json(folder / REPORT_FILE, report)
    for line in format_table(report, settings.share):
        print(line)
    return notes


def _describe_moves(inputs: MergeInputs, moves: dict[TensorId, TensorMoves]) -> Iterator[str]:
    """Yields notes on models that did not move, on coarse types, and on what rounding removed."""
    tensors = list(moves.values())
    for number, model in enumerate(inputs.models):
        moved = [tensor for tensor in tensors if tensor.moved[number]]
        if not moved:
            yield f"{model.place}: equals the base, so it adds nothing"
        coarse = [tensor for tensor in moved if _is_coarser(inputs, number, tensor)]
        if coarse:
            yield (
                f"{model.place}: {len(coarse)} tensors ({coarse[0].name}) are stored in a coarser "
                "type than the base's, so their moves hold its rounding; export float32"
            )
    changed = sum(tensor.changed for tensor in tensors)
    rounded = sum(tensor.rounded for tensor in tensors)
    if rounded:
        share = math.sqrt(rounded / changed) if changed else 1.0
        yield (
            f"rounding the merged tensors to their type removed {share:.1%} of the merged move; "
            "--dtype float32 keeps all of it"
        )


def _is_coarser(inputs: MergeInputs, number: int, tensor: TensorMoves) -> bool:
    own_dtype, base_dtype = (
        leaves.dtype(tensor.path, tensor.layer)
        for leaves in (inputs.models[number].leaves, inputs.base.leaves)
    )
    return own_dtype.itemsize < base_dtype.itemsize
