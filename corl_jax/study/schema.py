"""Reads a study from its YAML file: a base config, variants, seeds, and the metrics to compare."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic

from corl_jax.config.fields import (
    ConfigPath,
    NonNegative,
    Positive,
    PositiveFloat,
    Section,
    option,
)
from corl_jax.config.files import MAX_BYTES
from corl_jax.config.options import flatten
from corl_jax.config.shipped import find_config, list_configs
from corl_jax.config.yaml_text import dump_yaml, parse_yaml
from corl_jax.errors import InputError, Problems
from corl_jax.input_files import read_text
from corl_jax.nearest import suggest_name

NAME = r"\w[\w.+-]*"
"""Regex of the name of a variant, which is the name of its folder too."""
SET_BY_STUDY = ("output_dir", "seed")
"""Options that differ in each run, so that a study must not give them."""
NO_VARIANTS = ("logs",)
"""Names of folders that a study makes beside those of its variants."""


class Merge(Section):
    """The mean of the weights of other variants, which is evaluated and not trained."""

    models: list[str] = pydantic.Field(
        description="Variants whose models with the same seed are merged.", min_length=2
    )
    rule: str | None = option(None, "Rule of `corl-jax merge`; null: its default.")
    factor: PositiveFloat | None = option(None, "Its --lambda; null: its default.")
    params: str | None = option(None, "Its --params; null: its default.")


class Variant(Section):
    """Options of the runs of a variant on top of the base, and the model that they start from."""

    model_config = pydantic.ConfigDict(
        extra="allow", frozen=True, strict=True, protected_namespaces=()
    )
    after: str | None = option(None, "Variant whose model with the same seed is the start.")
    merge: Merge | None = option(None, "Start from the merged models of variants.")

    @property
    def options(self) -> dict[str, Any]:
        """The options of training: key.path -> value."""
        return dict(flatten(self.model_extra or {}))

    @property
    def sources(self) -> tuple[str, ...]:
        """The variants whose models this one starts from."""
        return (self.after,) if self.after else tuple(self.merge.models) if self.merge else ()


class MetricChoice(Section):
    """A metric of `metrics.jsonl` that the table shows."""

    label: str = pydantic.Field(description="Name in the table.")
    steps: Positive | None = option(
        None, "Mean over the logged lines of the last so many steps; null: the last value."
    )


class Study(Section):
    """Everything that a study file says."""

    output_dir: ConfigPath = pydantic.Field(description="Folder of runs, table and figure.")
    base: str = pydantic.Field(description="Config of all runs: a name or a file.")
    overrides: dict[str, Any] = option({}, "Options of all runs on top of the base.")
    seeds: list[NonNegative] = pydantic.Field(description="Seeds of each variant.", min_length=1)
    baseline: str | None = option(None, "Variant that the others are compared with.")
    metrics: dict[str, str | MetricChoice] = pydantic.Field(
        description="Metric -> its label. The first two are the axes of the figure.", min_length=1
    )
    variants: dict[str, Variant] = pydantic.Field(
        description="Name -> options on top of the base.", min_length=1
    )
    prepare: dict[str, str] = option(
        {}, "Path -> command of corl-jax that makes it, without --out, if it is not there."
    )

    def choose_metric(self, name: str) -> MetricChoice:
        """Returns how a metric of the table is read."""
        choice = self.metrics[name]
        return MetricChoice(label=choice) if isinstance(choice, str) else choice


def load_study(path: Path, words: Sequence[str] = ()) -> Study:
    """Returns the study of a file with `key=value` words on top.

    A key of the study, such as seeds, replaces it. Any other key is an option of all runs.

    Raises:
        InputError: listing every problem that shows without the configs of the runs.
    """
    try:
        tree = parse_yaml(read_text(path, "a YAML file of a study", MAX_BYTES))
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path}: found {type(tree).__name__}, expected a mapping; see the docs")
    tree = _fill_empty_blocks(add_words(tree, words))
    if isinstance(tree.get("base"), str):
        tree["base"] = find_base(path, tree["base"])
    try:
        study = Study.model_validate(tree)
    except pydantic.ValidationError as error:
        problems = dict.fromkeys(explain_study_errors(error))
        raise InputError([f"{path}: {line}" for line in problems]) from None
    problems = Problems()
    problems.add(find_problems(study), f"{path}: ")
    problems.raise_any()
    return study


def add_words(tree: dict[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """Returns the tree of a study with words of the command line on top.

    Raises:
        InputError: a word is not of the form key=value.
    """
    overrides = tree.get("overrides") or {}
    if not isinstance(overrides, dict):
        raise InputError(f"overrides: found {overrides!r}; expected a mapping, key.path: value")
    problems, tree = Problems(), {**tree, "overrides": dict(flatten(overrides))}
    for word in words:
        key, equals, value = word.removeprefix("--").partition("=")
        if not equals or not key:
            problems.add(f"command line: found {word!r}, expected key=value")
            continue
        try:
            parsed = parse_yaml(value)
        except ValueError as error:
            problems.add(f"command line: {key}: value is not valid YAML: {error}")
            continue
        (tree if key in Study.model_fields else tree["overrides"])[key] = parsed
    problems.raise_any()
    return tree


def find_base(path: Path, base: str) -> str:
    """Returns the base as the name of a shipped config, or as an absolute path."""
    beside = path.parent / base
    if beside.is_file():
        return os.path.abspath(beside)
    if base in list_configs():
        return base
    try:
        return os.path.abspath(find_config(base))
    except InputError as error:
        raise InputError(f"{path}: base: {error}") from None


def _fill_empty_blocks(tree: dict[str, Any]) -> dict[str, Any]:
    """Returns the tree with {} for a variant, and for a block, without a value."""
    # `unified:` alone is the base itself; YAML reads it as null.
    tree = {k: {} if v is None and k in ("overrides", "prepare") else v for k, v in tree.items()}
    variants = tree.get("variants")
    if isinstance(variants, Mapping):
        tree["variants"] = {name: {} if v is None else v for name, v in variants.items()}
    return tree


def explain_study_errors(error: pydantic.ValidationError) -> Iterator[str]:
    """Yields a line for each problem that pydantic has found."""
    blocks = {"": Study, "merge": Merge, "metrics": MetricChoice}
    for item in error.errors():
        place = [str(part) for part in item["loc"] if part not in ("str", "MetricChoice")]
        key, value = ".".join(place), item["input"]
        if item["type"] == "extra_forbidden":
            inner = "metrics" if place[0] == "metrics" else "merge" if "merge" in place else ""
            known = blocks[inner].model_fields
            yield f"{key}: unknown key; {suggest_name(place[-1], known)}"
        elif item["type"] == "missing":
            yield f"{key}: missing; give it in the file"
        else:
            yield f"{key}: found {value!r}; {item['msg'].removeprefix('Value error, ')}"


# ---- what contradicts itself


def find_problems(study: Study) -> Iterator[str]:
    """Yields what is wrong with names, references and keys of a study."""
    if len(set(study.seeds)) < len(study.seeds):
        yield f"seeds: found {study.seeds}; expected different numbers"
    if study.baseline is not None and study.baseline not in study.variants:
        yield f"baseline: no variant {study.baseline!r}; " + suggest_name(
            study.baseline, study.variants
        )
    for key in SET_BY_STUDY:
        if key in study.overrides:
            yield f"overrides.{key}: each run has its own; use output_dir and seeds of the study"
    if "://" in study.output_dir:
        yield f"output_dir: found {study.output_dir!r}; expected a directory on a disk; name one"
    for path, command in study.prepare.items():
        try:
            words = shlex.split(command)
        except ValueError as error:
            yield f"prepare.{path}: found {command!r} ({error}); correct its quotes"
            continue
        if not words or any(word.partition("=")[0] == "--out" for word in words):
            yield f"prepare.{path}: found {command!r}; expected a command of corl-jax, no --out"
    for name, variant in study.variants.items():
        yield from _find_variant_problems(study, name, variant)
    if cycle := find_cycle(study):
        yield f"variants: {' -> '.join(cycle)}: each waits for the next; remove one `after`"


def _find_variant_problems(study: Study, name: str, variant: Variant) -> Iterator[str]:
    place = f"variants.{name}"
    if not re.fullmatch(NAME, name) or name in NO_VARIANTS:
        yield f"{place}: not a name of a folder; use letters, digits and _ . + -"
    if variant.after and variant.merge:
        yield f"{place}: has both after and merge, but starts from one model; remove one of them"
    if variant.sources and "model.path" in variant.options:
        yield f"{place}.model.path: contradicts after or merge, which say where it starts"
    key = "after" if variant.after else "merge.models"
    for source in variant.sources:
        if source not in study.variants:
            yield f"{place}.{key}: no variant {source!r}; {suggest_name(source, study.variants)}"
    for option_key in SET_BY_STUDY:
        if option_key in variant.options:
            yield f"{place}.{option_key}: each run has its own; use output_dir and seeds"


def find_merge_problems(
    study: Study, rules: Mapping[str, int | None], default: str
) -> Iterator[str]:
    """Yields what is wrong with the rules of merges.

    `rules` has the number of models of each rule of `corl-jax merge`, None for any number.
    """
    for variant, merge in ((name, x.merge) for name, x in study.variants.items() if x.merge):
        place, rule = f"variants.{variant}.merge", merge.rule or default
        try:
            re.compile(merge.params or "")
        except re.error as error:
            yield (
                f"{place}.params: found {merge.params!r}, no regular expression: {error}; "
                "correct it"
            )
        if rule not in rules:
            yield f"{place}.rule: found {rule!r}; {suggest_name(rule, rules)}"
        elif rules[rule] not in (None, len(merge.models)):
            yield (
                f"{place}.models: found {len(merge.models)}, but the rule {rule} merges "
                f"{rules[rule]}; choose another rule or other models"
            )


def find_cycle(study: Study) -> list[str] | None:
    """Returns variants of which each waits for the next, the first one again at the end."""

    def follow(path: list[str]) -> list[str] | None:
        for source in study.variants[path[-1]].sources:
            if source in path:
                return [*path[path.index(source) :], source]
            if source in study.variants and (cycle := follow([*path, source])):
                return cycle
        return None

    return next((cycle for name in study.variants if (cycle := follow([name]))), None)


def dump_study(study: Study) -> str:
    """Returns a study as YAML that `load_study` reads."""
    tree = study.model_dump(mode="json", exclude_defaults=True)
    return dump_yaml(tree)
