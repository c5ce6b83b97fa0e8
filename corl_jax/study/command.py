"""Runs the processes of a study and writes its results."""

from __future__ import annotations

import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from corl_jax.config.yaml_text import parse_yaml
from corl_jax.console import print_status
from corl_jax.errors import FAILED_EXIT_CODE, PREEMPTED_EXIT_CODE, InputError, Problems
from corl_jax.report.read import EVALUATION, read_run
from corl_jax.runs import same_files
from corl_jax.runs.directory import list_config_changes
from corl_jax.runs.locking import lock_directory
from corl_jax.runs.terminal import format_duration
from corl_jax.study.page import keep_study, write_results
from corl_jax.study.results import (
    COMPLETIONS,
    SECONDS,
    Results,
    find_unknown_metrics,
    read_costs,
    read_results,
)
from corl_jax.study.scheduler import Outcomes, StopSignal, run_jobs
from corl_jax.study.schema import Study
from corl_jax.study.study_runs import Job, StudyRun, list_costs, list_jobs
from corl_jax.study.table import make_markdown

GPU_SHARE = 0.9
"""Part of a GPU's memory that the runs on it share; the rest is for what JAX does not count."""


def run_study(
    study: Study, runs: Mapping[str, StudyRun], num_jobs: int, devices: Sequence[str]
) -> int:
    """Runs what is not finished and writes the results; returns the exit code.

    Raises:
        InputError: a run in the folder has another config, or the folder cannot be used.
    """
    check_finished_runs(runs)
    folder = Path(study.output_dir)
    try:
        keep_study(study)
    except OSError as error:
        raise InputError(f"output_dir: {folder}: {error.strerror}; name another one") from None
    with lock_directory(folder), StopSignal().listen() as stop:
        left = list_unfinished(list_jobs(study, runs))
        print_status(f"{len(left)} processes to run in {folder}, {num_jobs} at once")

        def start(job: Job, slot: int) -> subprocess.Popen:
            return start_process(job, make_environment(slot, num_jobs, devices))

        def check_metrics(job: Job) -> None:
            # Every run evaluates, so the first one shows a wrong name. It costs no run: the same
            # command with the right name makes the table of the finished ones.
            for line in find_unknown_metrics(read_results(study), EVALUATION):
                print_status(f"warning: {line}")

        outcomes = run_jobs(left, start, num_jobs, stop, print_status, check_metrics)
    results = read_results(study)
    paths = write_results(results)
    print(make_markdown(results))
    print("\n".join(map(str, paths)))
    return report_outcomes(outcomes, results)


def report_outcomes(outcomes: Outcomes, results: Results) -> int:
    """Prints what is missing and why; returns the exit code of the study."""
    if outcomes.stopped:
        print("stopped; the same command continues from there", file=sys.stderr)
        return PREEMPTED_EXIT_CODE
    if results.missing:
        missing = ", ".join(results.missing)
        print(f"error: missing runs: {missing}; the same command tries again", file=sys.stderr)
        return FAILED_EXIT_CODE
    if unknown := find_unknown_metrics(results):
        # The runs are finished, so a corrected study makes its table at once.
        raise InputError(unknown)
    return 0


# ---- what is done already


def check_finished_runs(runs: Mapping[str, StudyRun]) -> None:
    """Requires that each run that is there has the config of the study.

    Raises:
        InputError: listing every option that differs.
    """
    problems = Problems()
    for run in runs.values():
        path = run.root / "config.yaml"
        if not path.exists():
            continue
        with problems.collect():
            try:
                text = path.read_text(encoding="utf-8")
                old = parse_yaml(text)
            except (OSError, ValueError) as error:
                raise InputError(f"{path}: unreadable: {error}; remove its run") from None
            old, new = old or {}, run.config.model_dump(mode="json")
            rollout = old.get("rollout") if isinstance(old, dict) else None
            if run.config.rollout.cfg_scale is None and isinstance(rollout, dict):
                # The run has written the guidance that its model chose.
                new["rollout"]["cfg_scale"] = rollout.get("cfg_scale")
            list_config_changes(old, new, str(path), start=same_files.read_header(text))
    problems.raise_any()


def list_unfinished(jobs: Sequence[Job]) -> list[Job]:
    """Returns the jobs that have no result yet, or whose models come from such a job."""
    left: dict[str, Job] = {}
    for job in jobs:
        # A finished run after a new one is started too, and compares its weights with the new ones.
        if not is_done(job) or any(name in left for name in job.after):
            left[job.name] = job
    return list(left.values())


def is_done(job: Job) -> bool:
    """Returns whether a job has its result."""
    if job.run is None:
        assert job.result is not None  # what must be made before
        return job.result.exists()
    return read_run(job.run.root, job.name).is_finished


# ---- processes


def start_process(job: Job, environment: Mapping[str, str]) -> subprocess.Popen:
    """Starts the process of a job; its log file gets the command and all that it prints."""
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("ab") as log:
        log.write(f"$ {shlex.join(job.command)}\n".encode())
        log.flush()
        # A session of its own: a Ctrl-C of the terminal reaches the study alone, which passes it
        # on once. Two would end a training before it has saved.
        return subprocess.Popen(
            job.command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            env=dict(environment), start_new_session=True,
        )  # fmt: skip


def make_environment(slot: int, num_jobs: int, devices: Sequence[str]) -> dict[str, str]:
    """Returns the environment of the process in a slot: its GPU, and its share of the memory."""
    environment = dict(os.environ)
    if devices:
        environment["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
    # 3 runs on 2 devices: slots 0 and 2 share the first one.
    per_device = -(-num_jobs // max(len(devices), 1))
    if per_device > 1:
        environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{GPU_SHARE / per_device:.3f}")
    return environment


# ---- the plan


def describe_plan(study: Study, runs: Mapping[str, StudyRun]) -> str:
    """Returns the processes in their order, with steps, completions and the expected time."""
    check_finished_runs(runs)
    results = read_results(study)
    costs = {run.name: (steps, completions) for run, steps, completions in list_costs(runs)}
    jobs = list_jobs(study, runs)
    left = {job.name for job in list_unfinished(jobs)}
    lines, total, seconds = [], 0, []
    width = max(len(job.name) for job in jobs)
    for job in jobs:
        text = f"{job.name:{width}}  {'to do' if job.name in left else 'done '}"
        if job.run is not None:
            steps, completions = costs[job.name]
            unknown = "as many steps as the data has"
            text += (
                f"  {unknown if steps is None else f'{steps:,} steps, {completions:,} completions'}"
            )
            if job.name in left:
                total += completions or 0
                seconds.append(estimate_seconds(results, job.run.variant, completions))
        # Not what is prepared: every run waits for that.
        waits = [name for name in job.after if name in left and name not in study.prepare]
        lines.append(text + (f"  after {', '.join(waits)}" if waits else ""))
    lines.append(
        f"to do: {len(left)} processes, {total:,} completions, {describe_seconds(seconds)}"
    )
    return "\n".join(lines)


def estimate_seconds(results: Results, variant: str, completions: int | None) -> float | None:
    """Returns the expected seconds of a run from finished runs of the study; None without one.

    They are those of the same variant, or else those of as many completions in all others.
    """
    costs = [(name, read_costs(record)) for (name, _), record in results.records.items()]
    same = [cost[SECONDS] for name, cost in costs if name == variant and SECONDS in cost]
    if same:
        return statistics.fmean(same)
    # Runs without completions are not comparable: supervised ones, and mere evaluations.
    known = [cost for _, cost in costs if SECONDS in cost and cost.get(COMPLETIONS)]
    if not known or not completions:
        return None
    return completions * sum(c[SECONDS] for c in known) / sum(c[COMPLETIONS] for c in known)


def describe_seconds(seconds: Sequence[float | None]) -> str:
    """Returns the expected time of runs one after the other."""
    known = [value for value in seconds if value is not None]
    if not seconds:
        return "nothing is left"
    if not known:
        return "time unknown: no run of this study is finished yet"
    text = f"about {format_duration(sum(known))} one after the other, by the finished runs"
    rest = len(seconds) - len(known)
    return text + (f"; {rest} of unknown time" if rest else "")
