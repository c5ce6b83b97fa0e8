"""Reports a merge: a table for the terminal, `merge_report.json`, and the model card."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import corl_jax
from corl_jax.config.yaml_text import dump_yaml
from corl_jax.merge.inputs import MergeInputs
from corl_jax.merge.moves import TensorMoves
from corl_jax.train import model_card
from corl_jax.weights.shards import ExtraFiles

REPORT_FILE = "merge_report.json"
GROUP_PARTS = 3  # of a path: language_model/layers/attn/q_proj/kernel -> language_model/layers/attn


@dataclasses.dataclass(frozen=True)
class MergeSettings:
    """The options of a merge, as its report states them."""

    rule: str
    share: str | None  # the moves that the rule counts
    factor: float | None  # lambda; None where the rule does not read it
    params: str | None
    dtype: str


def make_report(
    settings: MergeSettings, inputs: MergeInputs, tensors: Sequence[TensorMoves]
) -> dict[str, Any]:
    """Returns the JSON of `merge_report.json`."""
    places = [model.place for model in inputs.models]
    pairs = itertools.combinations(range(1, len(places) + 1), 2)
    groups: dict[str, list[TensorMoves]] = {}
    for tensor in tensors:
        groups.setdefault(_name_group(tensor.path), []).append(tensor)
    return {
        "corl_jax": corl_jax.__version__,
        "rule": settings.rule,
        "lambda": settings.factor,
        "params": settings.params,
        "dtype": settings.dtype,
        # Of absolute paths the last part: the folder may be published.
        "base": model_card.hide_folders(inputs.base_place),
        "models": [model_card.hide_folders(place) for place in places],
        "pairs": [list(pair) for pair in pairs],  # of models, in the order of `cosines`
        "total": _count_moved(tensors) | _summarize(tensors, settings),
        "groups": {
            name: _count_moved(group) | _summarize(group, settings)
            for name, group in groups.items()
        },
        "tensors": [
            {"tensor": tensor.path, "layer": tensor.layer, "moved": tensor.moved}
            | _summarize([tensor], settings)
            for tensor in tensors
        ],
    }


def _count_moved(tensors: Sequence[TensorMoves]) -> dict[str, Any]:
    moved = sum(any(tensor.moved) for tensor in tensors)
    return {"tensors": len(tensors), "tensors_moved": moved}


def _name_group(path: str) -> str:
    return "/".join(path.split("/")[:-1][:GROUP_PARTS])


def _summarize(tensors: Sequence[TensorMoves], settings: MergeSettings) -> dict[str, Any]:
    """Returns sizes, norms of the moves, cosines and shares of one or several tensors."""
    moved = [tensor for tensor in tensors if any(tensor.moved)]
    numbers = range(len(tensors[0].sums))
    squares = [sum(tensor.sums[n].squares for tensor in tensors) for n in numbers]
    values: dict[str, Any] = {
        "values": sum(tensor.size for tensor in tensors),
        "norms": [math.sqrt(square) for square in squares],
        "merged_norm": math.sqrt(sum(tensor.changed for tensor in moved)),
        "cosines": [
            _divide(sum(tensor.dots[i, j] for tensor in tensors), squares[i], squares[j])
            for i, j in tensors[0].dots
        ],
    }
    if settings.share:
        # Of the tensors that moved; the others are copied.
        count = sum(tensor.size for tensor in moved)
        values[settings.share] = [
            sum((tensor.shared or [0] * len(numbers))[n] for tensor in moved) / count
            if count
            else None
            for n in numbers
        ]
    return values


def _divide(dot: float, first: float, second: float) -> float | None:
    """Returns a cosine from a product and two squared norms; None without a direction."""
    return dot / math.sqrt(first * second) if first and second else None


def format_table(report: dict[str, Any], share: str | None) -> Iterable[str]:
    """Yields the lines of the table: a row for each group of tensors that moved."""
    rows = {name: row for name, row in report["groups"].items() if row["tensors_moved"]}
    rows |= {"all": report["total"]}
    numbers = range(1, len(report["models"]) + 1)
    heads = ["moved", *(f"|d_{n}|" for n in numbers)]
    heads += [f"cos {i},{j}" for i, j in report["pairs"]] + ["|merged|"]
    heads += [f"{share} {n}" for n in numbers] if share else []
    width = max(len(name) for name in ("parameters", *rows))
    yield f"{'parameters':<{width}}" + "".join(f"{head:>12}" for head in heads)
    for name, row in rows.items():
        cells = [f"{row['tensors_moved']} of {row['tensors']}"]
        cells += [f"{norm:.4g}" for norm in row["norms"]]
        cells += ["-" if cosine is None else f"{cosine:.3f}" for cosine in row["cosines"]]
        cells += [f"{row['merged_norm']:.4g}"]
        shares = row[share] if share else []
        cells += ["-" if value is None else f"{value:.1%}" for value in shares]
        yield f"{name:<{width}}" + "".join(f"{cell:>12}" for cell in cells)


def make_card(settings: MergeSettings, inputs: MergeInputs, layout: str) -> ExtraFiles:
    """Returns name -> bytes of the model card, and of the base's own card if it has one."""
    base_card = model_card.read_base_card(inputs.base.folder)
    metadata = model_card.read_metadata(base_card)
    values = {name: metadata[name] for name in model_card.INHERITED if name in metadata}
    if hub_id := model_card.find_hub_id(inputs.base_place):
        values["base_model"] = hub_id
    if "base_model" in values:
        values["base_model_relation"] = "merge"
    if layout == "transformers":
        values["library_name"] = "transformers"
    values |= {"pipeline_tag": "any-to-any", "tags": ["merge", inputs.family.name, "corl_jax"]}
    names = [model_card.hide_folders(model.place) for model in inputs.models]
    factor = "" if settings.factor is None else f", lambda {settings.factor:g}"
    lines = [
        f"# A merge of {' and '.join(f'`{name}`' for name in names)}",
        "",
        f"Made by `corl-jax merge` {corl_jax.__version__} with the rule {settings.rule}{factor}, "
        f"from the base `{model_card.hide_folders(inputs.base_place)}`. "
        f"`{REPORT_FILE}` has the moves of every tensor. The merged model was not evaluated by the "
        "merge. The licence of the base model applies.",
    ]
    if base_card:
        lines += ["", f"`{model_card.BASE_FILE}` is the model card that came with the base model."]
    text = f"---\n{dump_yaml(values)}---\n\n" + "\n".join(lines) + "\n"
    return {
        model_card.FILE: text.encode(),
        **({model_card.BASE_FILE: base_card} if base_card else {}),
    }
