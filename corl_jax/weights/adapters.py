"""Merges adapters into kernels, or writes them as a directory that PEFT loads.

Source: PEFT 0.21, `tuners/lora` and `utils/save_and_load`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from corl_jax.atomic_files import create_folder
from corl_jax.errors import InputError
from corl_jax.models.lora import Lora
from corl_jax.params import flatten, unflatten
from corl_jax.types import Params
from corl_jax.weights.dtypes import DType, is_float, parse_dtype
from corl_jax.weights.folders import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from corl_jax.weights.kinds import NetworkKind, PeftFormat
from corl_jax.weights.shards import (
    ExtraFiles,
    Progress,
    TensorPlan,
    write_extra_files,
    write_json,
    write_safetensors,
)
from corl_jax.weights.table import DENSE, Row, Slot, Table


def adapter_table(table: Table, prefix: str) -> Table:
    """Returns PEFT's names of A and B for every dense layer whose path begins with `prefix`.

    `table` has the names of the layout of PEFT's base model.
    """
    # key "model.q_proj.weight", path "llama/q_proj/kernel" ->
    #   "base_model.model.model.q_proj.lora_A.weight" and "llama/q_proj/lora_a", and the same for B
    rows = tuple(
        Row(
            f"base_model.model.{row.key.removesuffix('.weight')}.{torch}.weight",
            f"{row.path.removesuffix('/kernel')}/{leaf}",
            DENSE,
        )
        for row in table.rows
        if row.path.startswith(prefix) and row.path.endswith("/kernel")
        for torch, leaf in (("lora_A", "lora_a"), ("lora_B", "lora_b"))
    )
    return Table("peft", rows)


def merge_adapters(
    params: Params, lora: Lora, dtypes: Mapping[str, Any], beat: Callable[[], None] = lambda: None,
    layer_dtypes: Mapping[str, list[str]] | None = None,
) -> tuple[Params, float]:  # fmt: skip
    """Merges adapters into the kernels; returns (parameters, fraction of the update rounded off).

    A kernel with an adapter becomes W + A B alpha / rank, in the dtype that `dtypes` has for its
    path. `layer_dtypes` gives the dtype of each layer, for kernels whose layers differ. The
    fraction is of the update's Euclidean norm over all kernels, 0 with float32. The function calls
    `beat` after each kernel.
    """
    flat = flatten(params)
    adapted = [path for path in flat if path.endswith("/lora_a")]
    lost, total = 0.0, 0.0  # squared norms
    for path in adapted:
        name = path.removesuffix("/lora_a")
        a, b = (np.asarray(flat.pop(f"{name}/{leaf}"), np.float32) for leaf in ("lora_a", "lora_b"))
        kernel = flat[f"{name}/kernel"]
        out = np.empty(kernel.shape, dtypes[f"{name}/kernel"])
        kinds = (layer_dtypes or {}).get(f"{name}/kernel", [out.dtype.name] * len(out))
        for layer, kind in enumerate(kinds):
            # One layer at a time, so that only one layer is float32 at once. A [L, in, r] and
            # B [L, r, out] -> update [in, out].
            update = (a[layer] @ b[layer]) * np.float32(lora.scale)
            exact = np.asarray(kernel[layer], np.float32) + update
            out[layer] = exact.astype(parse_dtype(kind))
            lost += float(np.square(out[layer].astype(np.float32) - exact).sum())
            total += float(np.square(update).sum())
        flat[f"{name}/kernel"] = out
        beat()
    return unflatten(flat), float(np.sqrt(lost / total)) if total else 0.0


def save_adapter(
    out: str | Path, kind: NetworkKind, params: Params, lora: Lora, *, base: str | None,
    revision: str | None = None, dtype: DType = "keep", progress: Progress | None = None,
    overwrite: bool = False, extra: ExtraFiles | None = None,
) -> None:  # fmt: skip
    """Writes a tree of adapters as a PEFT directory, whole or not at all.

    `base` names the base model in transformers' layout, and `revision` its branch, tag or commit on
    the hub. `keep` writes the adapters in the dtype of their training. `extra` has further files
    by name.

    Raises: InputError for a folder that is taken or cannot be written, and for a kind without a
        `PeftFormat`.
    """
    form = kind.peft
    if form is None:
        raise InputError(
            f"adapters: PEFT has no {kind.name} network to put them into; export the merged model"
        )
    flat = flatten(params)
    slots = form.table.make_slots({path: tuple(leaf.shape) for path, leaf in flat.items()})
    plans = [_plan_adapter(slot, flat[slot.path], dtype) for slot in slots]
    with create_folder(Path(out), overwrite=overwrite) as folder:
        write_json(folder / ADAPTER_CONFIG, _make_peft_config(form, lora, base, revision))
        write_extra_files(folder, extra or {})
        write_safetensors(folder / ADAPTER_WEIGHTS, plans, progress)


def _plan_adapter(slot: Slot, leaf: Any, dtype: DType) -> TensorPlan:
    kind = np.dtype(leaf.dtype)
    kind = parse_dtype(dtype) if dtype != "keep" and is_float(kind) else kind

    def chunks():
        yield np.ascontiguousarray(slot.transform.to_torch(np.asarray(leaf[slot.layer])), kind)

    return TensorPlan(slot.key, kind, slot.shape, chunks)


def _make_peft_config(
    form: PeftFormat, lora: Lora, base: str | None, revision: str | None
) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "auto_mapping": dict(form.auto_mapping),
        "base_model_name_or_path": base,
        "revision": revision,
        "task_type": None,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        # A regex, because another tower may have layers of the same last name.
        "target_modules": rf"{form.layers}({'|'.join(lora.targets)})",
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "inference_mode": True,
    }
