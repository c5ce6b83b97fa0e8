"""Resolves a study into its runs: their configs, commands, order and cost."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from corl_jax.config import files as config_files
from corl_jax.config.schema import Config
from corl_jax.config.shipped import find_config
from corl_jax.config.stages import STAGE_FACTS
from corl_jax.config.yaml_text import parse_yaml
from corl_jax.errors import InputError, Problems
from corl_jax.study.schema import Study
from corl_jax.tasks import choose_tasks

LOGS = "logs"


@dataclasses.dataclass(frozen=True)
class StudyRun:
    """A run of a study."""

    variant: str
    seed: int
    config: Config
    arguments: list[str]  # of `corl-jax train`

    @property
    def name(self) -> str:
        return name_run(self.variant, self.seed)

    @property
    def root(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def is_trained(self) -> bool:
        """Whether it has steps; without steps it evaluates the model that it starts from."""
        return self.config.train.max_steps != 0


@dataclasses.dataclass(frozen=True)
class Job:
    """A process of a study: a run, or what must be made before."""

    name: str
    command: list[str]
    log: Path
    after: tuple[str, ...] = ()
    result: Path | None = None  # which ends the job for ever; None: a run
    run: StudyRun | None = None


def name_run(variant: str, seed: int) -> str:
    """Returns the name of a run, which is its folder in the study's."""
    return f"{variant}/seed{seed}"


def resolve_runs(study: Study) -> dict[str, StudyRun]:
    """Returns the runs by name, each after those whose models it needs.

    Raises:
        InputError: listing every problem of the configs of all variants.
    """
    problems, runs = Problems(), {}
    for variant in order_variants(study):
        for seed in study.seeds:
            # Each line comes once: all seeds of a variant have the same problems.
            with problems.collect(f"variants.{variant}: "):
                run = _resolve_run(study, variant, seed, runs)
                runs[run.name] = run
    problems.raise_any()
    return runs


def order_variants(study: Study) -> list[str]:
    """Returns the variants in their order, but each after those that it starts from."""
    ordered: dict[str, None] = {}

    def add(name: str) -> None:
        for source in study.variants[name].sources:
            add(source)
        ordered[name] = None

    for name in study.variants:
        add(name)
    return list(ordered)


def _resolve_run(study: Study, name: str, seed: int, runs: Mapping[str, StudyRun]) -> StudyRun:
    variant = study.variants[name]
    # A merged model is evaluated alone, unless the variant itself has steps.
    length = {"train.max_steps": 0} if variant.merge else {}
    options: dict[str, Any] = {**study.overrides, **length, **variant.options, "seed": seed}
    options["output_dir"] = str(Path(study.output_dir, name_run(name, seed)))
    if variant.merge:
        options["model.path"] = str(find_merged_model(study, name, seed))
    elif variant.after:
        # A variant with problems of its own has no run; they are reported, and a path stands in.
        source = runs.get(name_run(variant.after, seed))
        options["model.path"] = find_model(source) if source else variant.after
    if options.get("train.max_steps") == 0:
        options["export.layout"] = "none"  # the export would be a copy of the start
    arguments = [f"{key}={format_argument(value)}" for key, value in options.items()]
    try:
        config = config_files.load(find_config(study.base), arguments)
    except InputError as error:
        lines = [line.removeprefix(f"{config_files.COMMAND_LINE}: ") for line in error.problems]
        raise InputError(lines) from None
    _check_start(study, name, seed, runs)
    if config.train.max_steps != 0:
        _check_export(study, name, config)
    return StudyRun(name, seed, config, [study.base, *arguments])


def _check_start(study: Study, name: str, seed: int, runs: Mapping[str, StudyRun]) -> None:
    """Refuses to merge models of different starts. Raises: InputError."""
    merge = study.variants[name].merge
    names = [name_run(source, seed) for source in merge.models] if merge else []
    # A variant with problems of its own has no run, and these are reported.
    sources = [runs[run] for run in names if run in runs]
    starts = {source.variant: source.config.model.path for source in sources}
    if len(set(starts.values())) > 1:
        text = ", ".join(f"{variant} from {path}" for variant, path in starts.items())
        raise InputError(
            f"merge.models: found models that start from different ones: {text}; expected one base"
        )


def _check_export(study: Study, name: str, config: Config) -> None:
    """Requires an export from which other variants can start. Raises: InputError."""
    users = {user: other for user, other in study.variants.items() if name in other.sources}
    if users and config.export.layout == "none":
        raise InputError(
            f"export.layout: found none, but {', '.join(users)} starts from its export; "
            "choose a layout"
        )
    # A merge reads adapters, a training does not.
    later = [user for user, other in users.items() if other.after]
    if later and config.lora.rank and config.export.lora == "adapter":
        raise InputError(
            f"export.lora: found adapter, but {', '.join(later)} starts from its export, which "
            "must be a whole model; set it to merged"
        )


def find_model(run: StudyRun) -> str:
    """Returns the model that a run leaves: its export, or without steps the one it starts from."""
    return str(run.root / "export") if run.is_trained else run.config.model.path


def find_merged_model(study: Study, variant: str, seed: int) -> Path:
    """Returns the folder of the merged model that a variant starts from."""
    return Path(study.output_dir, variant, f"merged_seed{seed}")


def format_argument(value: Any) -> str:
    """Returns a value as the command line of `train` reads it."""
    if isinstance(value, str) and parse_yaml(value) == value:
        return value
    return json.dumps(value, ensure_ascii=False)


def list_warnings(study: Study, runs: Mapping[str, StudyRun]) -> Iterator[str]:
    """Yields a warning for each variant from whose rounded model another one starts."""
    sources = {source for variant in study.variants.values() for source in variant.sources}
    for variant in sorted(sources):
        run = runs[name_run(variant, study.seeds[0])]
        if run.is_trained and run.config.export.dtype != "float32":
            yield (
                f"variants.{variant}: export.dtype is {run.config.export.dtype}, so that rounding "
                "may take a part of the training from the models that start from its export; "
                "float32 keeps all of it"
            )


# ---- jobs


def list_jobs(study: Study, runs: Mapping[str, StudyRun]) -> list[Job]:
    """Returns all processes of a study, each after those that it waits for."""
    jobs = []
    for path, command in study.prepare.items():
        words = [*shlex.split(command), "--out", path]
        log = find_log(study, f"prepare_{len(jobs)}")
        jobs.append(Job(path, make_command(*words), log, result=Path(path)))
    prepared = tuple(job.name for job in jobs)
    for run in runs.values():
        variant = study.variants[run.variant]
        sources = [runs[name_run(source, run.seed)] for source in variant.sources]
        after = (*prepared, *(source.name for source in sources))
        if variant.merge:
            merging = make_merge_job(study, run, sources, after)
            jobs.append(merging)
            after = (*prepared, merging.name)
        command = make_command("train", *run.arguments)
        log = find_log(study, f"{run.variant}_seed{run.seed}")
        jobs.append(Job(run.name, command, log, after, run=run))
    return jobs


def make_merge_job(
    study: Study, run: StudyRun, sources: list[StudyRun], after: tuple[str, ...]
) -> Job:
    """Returns the job that merges the models that a run starts from."""
    merge = study.variants[run.variant].merge
    assert merge is not None
    out = find_merged_model(study, run.variant, run.seed)
    chosen = {"--rule": merge.rule, "--lambda": merge.factor, "--params": merge.params}
    options = [f"{name}={value}" for name, value in chosen.items() if value is not None]
    start = sources[0].config.model.path
    models = [find_model(source) for source in sources]
    # Not rounded again: small updates would be lost.
    dtype = ["--dtype", sources[0].config.export.dtype]
    words = ["merge", "--base", start, "--models", *models, "--out", str(out), *dtype, *options]
    log = find_log(study, f"{run.variant}_seed{run.seed}_merge")
    return Job(f"{run.name}/merge", make_command(*words), log, after, result=out)


def find_log(study: Study, name: str) -> Path:
    """Returns the file with what a process has printed."""
    return Path(study.output_dir, LOGS, f"{name}.log")


def make_command(name: str, *arguments: str) -> list[str]:
    """Returns the command that runs `corl-jax NAME` with this Python."""
    return [sys.executable, "-m", "corl_jax", name, *arguments]


# ---- cost


def count_completions(tree: Mapping[str, Any], steps: int) -> int:
    """Counts the images and answers that a run of a resolved config samples in its steps.

    Greedy ones count; groups that are drawn again (`algorithm.redraws`) do not.
    """
    if not STAGE_FACTS[tree["stage"]].has_rollouts:
        return 0
    # Imported here, so that a wrong study is answered before jax is loaded.
    from corl_jax.algorithms.recipes import RECIPES

    recipe = RECIPES.get(tree["algorithm"].get("name", ""))
    group_size = tree["rollout"]["group_size"] + (recipe is not None and recipe.uses_greedy)
    # A run that alternates samples one task in each step.
    alternates = tree["algorithm"].get("alternate_every")
    tasks = 1 if alternates else len(choose_tasks(tree["algorithm"]["tasks"]))
    return steps * tree["train"]["prompts_per_step"] * group_size * tasks


def list_costs(runs: Mapping[str, StudyRun]) -> Iterator[tuple[StudyRun, int | None, int | None]]:
    """Yields (run, steps, completions); None where the number of rows decides."""
    for run in runs.values():
        steps = run.config.train.max_steps
        tree = run.config.model_dump(mode="json")
        yield run, steps, None if steps is None else count_completions(tree, steps)
