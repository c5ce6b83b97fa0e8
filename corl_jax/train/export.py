"""The trained model as a directory that PyTorch loads: whole, or its adapters alone.

`corl_jax_export.json` in it says which step of the run it is of, and under which options it was
written. An export that is older than the run's end, or of other options, is written again.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from corl_jax.config.schema import Config
from corl_jax.data.instructions import recognize_instruction
from corl_jax.devices import batches, processes
from corl_jax.input_files import expand_path
from corl_jax.params import map_with_path, merge
from corl_jax.policies.janus import network
from corl_jax.policies.janus.checkpoint.generation import FILE as GENERATION_FILE
from corl_jax.policies.janus.checkpoint.generation import NOTHING_STATED, Generation
from corl_jax.runs import fingerprints
from corl_jax.runs.export_record import RECORD_FILE, name_step, read_record, rename_stale
from corl_jax.train.run import Run
from corl_jax.train.step import TrainState
from corl_jax.types import Params
from corl_jax.weights import adapters, files
from corl_jax.weights.dtypes import named
from corl_jax.weights.hub import split_hub_id


def refresh_export(
    folder: Path, config: Config, run: Run, state: TrainState, step: int, untrained: str,
    model_dir: Path, primary: bool, beat: Callable[[], None] = lambda: None,
) -> list[str]:  # fmt: skip
    """Writes the export of `step`, unless just that is there; returns lines for the user.

    An older one stays until the new one is whole. With layout `none` it is renamed, so that no
    `export/` is of another step than the run's last. `untrained` is the digest of what is frozen.
    """
    record: dict[str, Any] = {
        "step": step,
        "trained": fingerprints.summary(state.params),
        "untrained": untrained,
    }
    wanted = config.export.layout != "none"
    generation = describe_sampling(config, run) if wanted and primary else NOTHING_STATED
    if wanted:
        record["options"] = config.export.model_dump(mode="json")
        record["lora"] = config.lora.model_dump(mode="json") if config.lora.rank else None
        record["generation"] = generation.as_json()
    before = read_record(folder)
    current = {name: (before or {}).get(name) for name in record} == record
    current = bool(
        processes.broadcast_first(int(current))
    )  # the first process reads, all do the same
    if not wanted:
        return rename_stale(folder, before) if primary and not current else []
    if current:
        return [f"{folder} is of step {step} and stays; move it away to export again"]
    extra = {RECORD_FILE: record}
    notes = export(folder, config, run, state, model_dir, primary, beat, generation, extra)
    if "t2i" in run.tasks and config.rollout.cfg_scale < 1:
        notes.append(
            f"rollout.cfg_scale {config.rollout.cfg_scale:g}: transformers guides above 1 only, so "
            "the export is drawn without guidance; state another one where it is used"
        )
    if before is not None:
        change = f"was of {name_step(before)}, now of step {step}"
        if before.get("step") == step:
            change = f"of step {step}, written again because its options or weights were others"
        notes = [*notes, f"{folder}: {change}"]
    return notes


def describe_sampling(config: Config, run: Run) -> Generation:
    """How the run's model was sampled; what the run did not sample is left to its source.

    The stage of the image tokenizer samples nothing, a run of one task only that one, unless the
    evaluation asks both.
    """
    both = bool(run.tasks) and config.eval.suite == "shapes"
    rollout, stated = config.rollout, {}
    if run.tasks:
        stated |= {"do_sample": True, "temperature": rollout.temperature}
    if "t2i" in run.tasks or both:
        stated |= {"guidance_scale": rollout.cfg_scale}
    if "mm2t" in run.tasks or both:
        stated |= {
            "top_k": 50 if config.compat.text_top_k_50 else rollout.top_k,
            "top_p": rollout.top_p,
            "max_new_tokens": rollout.max_new_tokens,
        }
    if "mm2t" in run.tasks:
        questions = [text for text in run.train_loader.source.column("qa_problem") if text]
        if questions:
            stated["instruction"] = recognize_instruction(questions) or "none"
    return Generation(**stated)


def export(
    folder: Path, config: Config, run: Run, state: TrainState, model_dir: Path, primary: bool,
    beat: Callable[[], None] = lambda: None, generation: Generation = NOTHING_STATED,
    extra: dict[str, Any] | None = None,
) -> list[str]:  # fmt: skip
    """Writes the export of a run, whole or not at all; returns what its reader should know.

    Every process takes part in fetching the parameters, the primary one keeps and writes them.
    `model_dir` has the weights that the run started from. `beat` is called as the work proceeds.
    `generation` says how to sample, `extra` has further JSON files by name. What stands at
    `folder` is replaced.
    """
    options, lora = config.export, run.model_config.llama.lora
    if options.lora == "adapter":
        trained = fetched(state.params, primary, beat)
        if not primary:
            return []
        assert lora is not None  # or the config would have been refused
        fits = files.detect_layout(model_dir) == "transformers"
        base, revision = _base(config.model.path, model_dir) if fits else (None, None)
        beside = {GENERATION_FILE: generation.as_json(), **(extra or {})}  # peft reads neither
        adapters.save_adapter(
            folder, trained, lora, base=base, revision=revision, dtype=options.dtype,
            progress=lambda _: beat(), overwrite=True, extra=beside,
        )  # fmt: skip
        return [] if fits else [_no_base(config.model.path)]
    params, gone = fetched(merge(state.params, run.frozen), primary, beat), 0.0
    if not primary:
        return []
    dtypes, layer_dtypes = run.source_dtypes, run.layer_dtypes
    if options.dtype != "keep":
        dtypes, layer_dtypes = dict.fromkeys(dtypes, named(options.dtype)), {}
    if lora is not None:
        params, gone = adapters.merged(params, lora, dtypes, beat, layer_dtypes)
    params = map_with_path(lambda path, leaf: leaf.astype(dtypes[path], copy=False), params)
    assert options.layout != "none"  # or nobody would have asked for an export
    notes = files.save_checkpoint(
        folder, network.base(run.model_config), params, layout=options.layout,
        assets_from=model_dir, dtype=options.dtype,
        layer_dtypes=layer_dtypes, progress=lambda _: beat(),
        overwrite=True, generation=generation, extra=extra,
    )  # fmt: skip
    return [*notes, *([_rounded(gone)] if gone else [])]


def fetched(params: Params, keep: bool, beat: Callable[[], None] = lambda: None) -> Params:
    """Parameters on the host, a leaf at a time; None for each where they are not to `keep`."""

    def one(leaf: jax.Array) -> np.ndarray | None:
        array = batches.all_gather_array(leaf)
        beat()
        return array if keep else None

    return jax.tree.map(one, params)


def _base(path: str, model_dir: Path) -> tuple[str, str | None]:
    """`model.path` as PEFT reads it: (directory, None), or (hub id, revision)."""
    directory = expand_path(path)
    return (directory, None) if Path(directory) == model_dir else split_hub_id(path)


def _no_base(source: str) -> str:
    return (
        f"the adapter names no base model, because {source} is not in transformers' layout: give "
        "peft a transformers export of it (python -m tools.convert_weights)"
    )


def _rounded(gone: float) -> str:
    return (
        f"rounding the merged kernels removed {gone:.1%} of what the adapters add; export.dtype "
        "float32 or export.lora adapter keeps all of it"
    )
