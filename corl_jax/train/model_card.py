"""Writes the model card of an export: README.md, with the metadata that the Hugging Face hub reads.

The card states what the run knows. Nothing in it is needed to load the model.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

import corl_jax
from corl_jax.assets import SHIPPED
from corl_jax.config import files as config_files
from corl_jax.config.resuming import is_path
from corl_jax.config.schema import Config
from corl_jax.config.stages import STAGE_FACTS
from corl_jax.config.yaml_text import dump_yaml, parse_yaml
from corl_jax.data.row_files import find_hub_dataset
from corl_jax.errors import InputError
from corl_jax.estimates import read_estimate
from corl_jax.input_files import expand_path
from corl_jax.train.run import Run
from corl_jax.weights.hub import split_hub_id

FILE = "README.md"
BASE_FILE = "README_of_base_model.md"
INHERITED = ("license", "license_name", "license_link", "base_model")
"""Metadata that a card takes from the card of the base model."""
_FRONT_MATTER = re.compile(r"---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", re.DOTALL)


def make_card_files(
    config: Config, run: Run, step: int, model_dir: Path, evaluations: Sequence[Mapping[str, Any]]
) -> dict[str, bytes]:
    """Returns name -> bytes of the card, and of the base model's own card if it has one.

    `step`: the steps done. `evaluations`: the first and the last, or fewer. `model_dir` has the
    weights that the run started from.
    """
    base_card = read_base_card(model_dir)
    metadata = make_metadata(config, run, read_metadata(base_card))
    sections = [
        _describe_model(config, run, step, bool(base_card)),
        _describe_evaluations(evaluations),
        _describe_training(config, run, step),
        _describe_reproduction(config),
        _describe_limits(config, evaluations),
    ]
    text = f"---\n{dump_yaml(metadata)}---\n\n" + "\n\n".join(filter(None, sections)) + "\n"
    return {FILE: text.encode(), **({BASE_FILE: base_card} if base_card else {})}


# ---- the base model


def read_base_card(model_dir: Path) -> bytes:
    """Returns the README.md of a model directory, and after it the card of its own base."""
    files = [model_dir / name for name in (FILE, BASE_FILE)]
    return b"\n\n".join(file.read_bytes() for file in files if file.is_file())


def read_metadata(card: bytes) -> dict[str, Any]:
    """Returns the YAML at the beginning of a card; empty if it has none that can be read."""
    match = _FRONT_MATTER.match(card.decode("utf-8-sig", errors="replace"))
    try:
        values = parse_yaml(match.group(1)) if match else {}
    except ValueError:  # a card of a stranger; its text is kept all the same
        return {}
    return values if isinstance(values, dict) else {}


def find_hub_id(path: str) -> str | None:
    """Returns owner/name of a `model.path` on the hub; None for a directory or a shipped model."""
    if path in SHIPPED or Path(expand_path(path)).exists():
        return None
    try:
        return split_hub_id(path)[0]
    except InputError:
        return None


def make_metadata(config: Config, run: Run, base: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the metadata of the card. `base`: those of the base model's card."""
    inherited = {name: base[name] for name in INHERITED if name in base}
    hub_id = find_hub_id(config.model.path)
    is_adapter = config.export.lora == "adapter"
    named = {"base_model": hub_id} if hub_id else {}
    values = inherited | named
    if "base_model" in values:
        values["base_model_relation"] = "adapter" if is_adapter else "finetune"
    if config.export.layout == "transformers":
        values["library_name"] = "peft" if is_adapter else "transformers"
    datasets = [name for path in _list_paths(config) if (name := find_hub_dataset(path))]
    facts = STAGE_FACTS[config.stage]
    method = ["reinforcement-learning", config.algorithm.name] if facts.compares else []
    return {
        **values,
        **({"datasets": datasets} if datasets else {}),
        "pipeline_tag": "any-to-any",
        "tags": [*method, run.family.name, "corl_jax"],
    }


# ---- the text


def _describe_model(config: Config, run: Run, step: int, has_base_card: bool) -> str:
    kind = "Low-rank adapters (PEFT) for" if config.export.lora == "adapter" else "Made from"
    path, method = config.model.path, STAGE_FACTS[config.stage].method
    lines = [
        f"# {Path(path).name} after {step:,} steps of {method}",
        "",
        f"{kind} {_name_base(path)}, by {step:,} steps of {method} with corl_jax. "
        f"The model ({run.family.name}) generates images and answers questions about images.",
    ]
    if has_base_card:
        lines += ["", f"`{BASE_FILE}` is the model card that came with the base model."]
    return "\n".join(lines)


def _name_base(path: str) -> str:
    """Returns the base model in words, without the place of a directory on this machine."""
    if path in SHIPPED:
        return f"`{path}`, a model of the corl_jax package"
    return f"`{path}`" if find_hub_id(path) else f"the directory `{Path(path).name}`"


def _list_paths(config: Config) -> list[str]:
    paths = config.data.path
    return [paths] if isinstance(paths, str) else paths


def _describe_training(config: Config, run: Run, step: int) -> str:
    """Returns the section with the data, and for reinforcement learning rewards and algorithm."""
    data = ", ".join(f"`{hide_folders(path)}`" for path in _list_paths(config))
    train, optimizer = config.train, config.optimizer
    others = "".join(f", {name} {rate:g}" for name, rate in optimizer.learning_rates.items())
    rows = [
        ("data", f"{data}, {len(run.train_loader.source):,} rows"),
        ("steps", f"{step:,} of {train.prompts_per_step:,} prompts"),
        ("optimizer", f"{optimizer.name}, learning rate {optimizer.learning_rate:g}{others}"),
        ("adapters", f"rank {config.lora.rank}" if config.lora.rank else "none"),
    ]
    if train.ema_decay:
        rows.append(("weights", f"their running mean over steps, decay {train.ema_decay:g}"))
    parts = ["## Training"]
    facts, algorithm, rollout = STAGE_FACTS[config.stage], config.algorithm, config.rollout
    if facts.has_rollouts:
        method = algorithm.name if facts.compares else facts.method
        rows += [
            ("algorithm", f"{method}, {rollout.group_size} completions of each prompt"),
            ("tasks", ", ".join(run.tasks)),
        ]
    if facts.compares:
        rows += [
            ("advantages", f"{algorithm.advantages}, `mm2t_weight` {algorithm.mm2t_weight:g}"),
            ("KL penalty", f"{algorithm.kl_coef:g}"),
        ]
    if facts.has_rollouts and rollout.cfg_scale is not None:
        rows.append(("guidance of images", f"{rollout.cfg_scale:g}"))
    parts.append(make_table(("", ""), rows))
    if facts.has_rollouts:
        rewards = [(f"`{reward.label}`", f"{reward.weight:g}") for reward in config.rewards]
        parts.append(make_table(("reward", "weight"), rewards))
    return "\n\n".join(parts)


def _describe_evaluations(evaluations: Sequence[Mapping[str, Any]]) -> str:
    """Returns the table of the first and the last evaluation; empty without an evaluation."""
    if not evaluations:
        return ""
    # One evaluation is both the first and the last.
    columns = [evaluations[0], *evaluations[1:][-1:]]
    names = dict.fromkeys(name for values in columns for name in values)
    parts = re.compile(r".*_(low|high|stderr)|eval/seconds|step")
    rows = [
        (f"`{name.removeprefix('eval/')}`", *(_format_score(values, name) for values in columns))
        for name in names
        if not parts.fullmatch(name)
    ]
    heads = [f"step {values.get('step')}" for values in columns]
    table = make_table(("", *heads), rows)
    return f"## Evaluation\n\nOn held-out rows, with 95% intervals.\n\n{table}"


def _format_score(values: Mapping[str, Any], name: str) -> str:
    """Returns a score with its interval, as far as the evaluation has them."""
    estimate = read_estimate(values, name)
    return estimate.format() if estimate else "-"


def _describe_reproduction(config: Config) -> str:
    """Returns the section with the command, the config's digest and its options, and versions."""
    digest = hashlib.sha256(config_files.dump(config).encode()).hexdigest()
    options = dump_yaml(dict(_hide_places(config.model_dump(mode="json", exclude_defaults=True))))
    return (
        f"## How it was made\n\n"
        f"corl_jax {corl_jax.__version__}, jax {jax.__version__}\n\n"
        "    corl-jax train config.yaml\n\n"
        "`config.yaml` has these options, and the defaults of this version for all others. Of "
        f"absolute paths the last part is shown.\n\n```yaml\n{options}```\n\n"
        "SHA-256 of the resolved config, which is `config.yaml` of the run directory without its "
        f"first line: `{digest}`"
    )


def _hide_places(tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields the options without directories and hosts of this machine."""

    def walk(value: Any, key: str) -> Any:
        if isinstance(value, dict):
            return {name: walk(inner, f"{key}.{name}") for name, inner in value.items()}
        if isinstance(value, list):
            return [walk(inner, f"{key}.{number}") for number, inner in enumerate(value)]
        is_place = is_path(key) or key in ("output_dir", "checkpoint.directory")
        return hide_folders(value) if is_place and isinstance(value, str) else value

    for name, value in tree.items():
        if name != "distributed":  # host names
            yield name, walk(value, name)


def hide_folders(path: str) -> str:
    return Path(path).name if Path(path).is_absolute() else path


def _describe_limits(config: Config, evaluations: Sequence[Mapping[str, Any]]) -> str:
    if STAGE_FACTS[config.stage].has_rollouts:
        names = ", ".join(f"`{reward.label}`" for reward in config.rewards)
        cause = f"The model was trained with RL on {names}: it may score high there in ways that "
        cause += "its rewards do not see, and other abilities may have changed."
    else:
        cause = "The model follows the data above, with its faults and gaps."
    measured = "" if evaluations else " It was not evaluated during the run."
    return (
        f"## Limits\n\n{cause}{measured} It was not evaluated for safety. The licence of the base "
        "model applies."
    )


def make_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table of Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    # A bar would begin a new cell.
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
