"""Exports the trained model as a directory that PyTorch loads: the whole model, or its adapters.

`corl_jax_export.json` in it has the step of the run, its evaluations and the options of the export.
If one of them has changed, the export is written again. README.md is the model card.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from corl_jax.assets import SHIPPED
from corl_jax.config.schema import Config
from corl_jax.data.instructions import recognize_instruction
from corl_jax.devices import batches, processes
from corl_jax.input_files import expand_path
from corl_jax.params import flatten, merge, unflatten
from corl_jax.policies.generation_config import FILE as GENERATION_FILE
from corl_jax.policies.generation_config import NOTHING_STATED, Generation
from corl_jax.runs import fingerprints
from corl_jax.runs.export_record import (
    RECORD_FILE,
    is_up_to_date,
    name_step,
    read_record,
    rename_stale,
)
from corl_jax.tasks import TASKS, image_tasks, plan_tasks, text_tasks
from corl_jax.train.average import choose_evaluated
from corl_jax.train.model_card import make_card_files
from corl_jax.train.resolve import ResolvedRun
from corl_jax.train.run import Run
from corl_jax.train.stages import list_suites
from corl_jax.train.step import TrainState
from corl_jax.types import Params
from corl_jax.weights import adapters
from corl_jax.weights.checkpoint import detect_layout
from corl_jax.weights.dtypes import parse_dtype
from corl_jax.weights.export import save_checkpoint
from corl_jax.weights.hub import split_hub_id
from corl_jax.weights.shards import ExtraFiles


def refresh_export(
    folder: Path, config: Config, run: Run, state: TrainState, step: int, untrained: str,
    model_dir: Path, primary: bool, evaluations: Sequence[dict[str, Any]] = (),
    beat: Callable[[], None] = lambda: None,
) -> list[str]:  # fmt: skip
    """Writes the export of `step`, unless it is there already; returns lines for the user.

    An older export stays until the new one is whole. With layout `none` it is renamed, so that
    `export/` is always of the run's last step. `untrained`: fingerprint of the frozen weights.
    `evaluations`: all of the run, in order; read by the primary process.
    """
    has_export = config.export.layout != "none"
    generation = describe_sampling(config, run) if has_export and primary else NOTHING_STATED
    trained = fingerprints.fingerprint_tree(choose_evaluated(state))
    record = make_record(config, generation, step, trained, untrained, evaluations)
    before = read_record(folder)
    # One process may not yet see files that another one sees, so the first one decides for all.
    is_current = bool(processes.broadcast_first(int(is_up_to_date(before, record))))
    if not has_export:
        return rename_stale(folder, before) if primary and not is_current else []
    if is_current:
        return []
    extra: dict[str, dict[str, Any] | bytes] = {RECORD_FILE: record}
    if primary:
        extra |= make_card_files(config, run, step, model_dir, record["evaluations"])
    notes = export(folder, config, run, state, model_dir, primary, beat, generation, extra)
    scale = config.rollout.cfg_scale
    if image_tasks(run.tasks) and scale is not None and scale < 1:
        notes.append(
            f"rollout.cfg_scale {scale:g}: transformers guides above 1 only, so "
            "the export generates images without guidance; give another value where it is used"
        )
    if before is not None:
        change = f"was of {name_step(before)}, now of step {step}"
        if before.get("step") == step:
            change = (
                f"of step {step}, written again because its options, weights or evaluations have "
                "changed"
            )
        notes = [*notes, f"{folder}: {change}"]
    return notes


def make_record(
    config: Config, generation: Generation, step: int, trained: str, untrained: str,
    evaluations: Sequence[dict[str, Any]],
) -> dict[str, Any]:  # fmt: skip
    """Returns the record of an export, which says whether the export is up to date.

    `trained`, `untrained`: fingerprints of the parameters. `evaluations`: all of the run, in order.
    """
    record: dict[str, Any] = {"step": step, "trained": trained, "untrained": untrained}
    if config.export.layout != "none":
        record["options"] = config.export.model_dump(mode="json")
        record["lora"] = config.lora.model_dump(mode="json") if config.lora.rank else None
        record["generation"] = generation.as_json()
        # The first and the last, without what a clock decides: equal runs have equal exports.
        record["evaluations"] = [
            {name: value for name, value in evaluation.items() if name != "eval/seconds"}
            for evaluation in (*evaluations[:1], *evaluations[1:][-1:])
        ]
    return record


def describe_sampling(config: Config, run: Run | ResolvedRun) -> Generation:
    """Returns how the run sampled its model. Other tasks keep the values of the source model.

    The stage of the image tokenizer samples nothing. A run of one task samples only that one,
    unless an evaluation samples both.
    """
    measured = [task for suite in list_suites(config) for task in suite.tasks]
    sampled = (*run.tasks, *(measured if run.tasks else ()))
    rollout, stated = config.rollout, {}
    if run.tasks:
        stated |= {"do_sample": True, "temperature": rollout.temperature}
    if image_tasks(sampled):
        stated |= {"guidance_scale": rollout.cfg_scale}
    if text_tasks(sampled) or plan_tasks(sampled):
        stated |= {
            "top_k": 50 if config.compat.text_top_k_50 else rollout.top_k,
            "top_p": rollout.top_p,
            "max_new_tokens": rollout.max_new_tokens,
        }
    for task in text_tasks(run.tasks):
        column = TASKS[task].question or TASKS[task].shown
        questions = [text for text in run.train_loader.source.column(column) if text]
        if questions:
            stated["instruction"] = recognize_instruction(questions) or "none"
    return Generation(**stated)


def export(
    folder: Path, config: Config, run: Run, state: TrainState, model_dir: Path, primary: bool,
    beat: Callable[[], None] = lambda: None, generation: Generation = NOTHING_STATED,
    extra: ExtraFiles | None = None,
) -> list[str]:  # fmt: skip
    """Writes the export of a run, whole or not at all; returns lines for the user.

    All processes must call it; the primary one keeps the parameters and writes them. `folder` is
    replaced. `model_dir` has the weights that the run started from. `generation` says how to
    sample. `extra` has further files by name. `beat` is called after each piece of work.
    """
    options, kind = config.export, run.family.kind
    lora, exported = run.family.lora_of(run.sizes), choose_evaluated(state)
    if options.lora == "adapter":
        trained = fetch_params(exported, primary, beat)
        if not primary:
            return []
        assert lora is not None  # the config was checked
        # PEFT loads an adapter onto the layout of transformers alone.
        fits = detect_layout(model_dir, kind) == "transformers"
        base, revision = _find_base(config.model.path, model_dir) if fits else (None, None)
        # PEFT does not read them.
        extra_files: ExtraFiles = {GENERATION_FILE: generation.as_json(), **(extra or {})}
        adapters.save_adapter(
            folder, kind, trained, lora, base=base, revision=revision, dtype=options.dtype,
            progress=lambda _: beat(), overwrite=True, extra=extra_files,
        )  # fmt: skip
        return [] if fits else [_explain_no_base(config.model.path)]
    params, rounded = fetch_params(merge(exported, run.frozen), primary, beat), 0.0
    if not primary:
        return []
    dtypes, layer_dtypes = run.source_dtypes, run.layer_dtypes
    if options.dtype != "keep":
        dtypes, layer_dtypes = dict.fromkeys(dtypes, parse_dtype(options.dtype)), {}
    # Before the cast below, because a merge in float32 rounds only once.
    if lora is not None:
        params, rounded = adapters.merge_adapters(params, lora, dtypes, beat, layer_dtypes)
    # Without what only training has: no checkpoint has a place for it.
    exported = {path: leaf for path, leaf in flatten(params).items() if path in dtypes}
    params = unflatten({
        path: leaf.astype(dtypes[path], copy=False) for path, leaf in exported.items()
    })  # fmt: skip
    assert options.layout != "none"  # `refresh_export` calls this with a layout only
    notes = save_checkpoint(
        folder, kind, run.family.base(run.sizes), params, layout=options.layout,
        assets_from=model_dir, dtype=options.dtype,
        layer_dtypes=layer_dtypes, progress=lambda _: beat(),
        overwrite=True, generation=generation.as_json(), extra=extra,
    )  # fmt: skip
    return [*notes, *([_explain_rounding(rounded)] if rounded else [])]


def fetch_params(params: Params, keep: bool, beat: Callable[[], None] = lambda: None) -> Params:
    """Gathers parameters on the host, one leaf at a time; without `keep` each leaf is None."""

    def gather(leaf: jax.Array) -> np.ndarray | None:
        # Every process takes part in each gather. All but the primary drop the leaf at once.
        array = batches.all_gather_array(leaf)
        beat()
        return array if keep else None

    return jax.tree.map(gather, params)


def _find_base(path: str, model_dir: Path) -> tuple[str, str | None]:
    """Returns `model.path` as PEFT reads it: (directory, None), or (hub id, revision)."""
    # The name of a shipped model means nothing to PEFT, and its directory does.
    directory = str(SHIPPED.get(path, expand_path(path)))
    return (directory, None) if Path(directory) == model_dir else split_hub_id(path)


def _explain_no_base(source: str) -> str:
    return (
        f"the adapter names no base model, because {source} is not in transformers' layout: give "
        "peft a transformers export of it (corl-jax convert)"
    )


def _explain_rounding(rounded: float) -> str:
    return (
        f"rounding the merged kernels removed {rounded:.1%} of what the adapters add; export.dtype "
        "float32 or export.lora adapter keeps all of it"
    )
