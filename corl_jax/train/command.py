"""Runs a training from its config to its end: every room of a run is opened and closed here."""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterator

import jax

from corl_jax import hub_headers
from corl_jax.config.origins import Origin
from corl_jax.config.readers import find_unused_options
from corl_jax.config.schema import Config
from corl_jax.console import print_status
from corl_jax.devices import processes, startup
from corl_jax.runs import export_record
from corl_jax.runs.checkpoints import Checkpoints, Restored
from corl_jax.runs.directory import PROVENANCE, RunDir, lock_checkpoints, open_run_directory
from corl_jax.runs.log import RunLog, StepLog
from corl_jax.runs.outputs import Outputs, Progress
from corl_jax.runs.pace import Pace, Phases, StepClock
from corl_jax.runs.saving import Saver
from corl_jax.runs.signals import Interruption
from corl_jax.runs.watchdog import Watchdog
from corl_jax.train import check
from corl_jax.train.alarms import check_iteration, make_guards
from corl_jax.train.banner import describe_resumption, describe_start
from corl_jax.train.build import build
from corl_jax.train.dashboard import rename_for_charts
from corl_jax.train.ending import describe_end, describe_stop, is_finished, stamp_sources
from corl_jax.train.loop import train
from corl_jax.train.milestones import (
    count_milestones,
    make_ending,
    make_milestones,
    make_reports,
    read_evaluation_seconds,
    run_due,
)
from corl_jax.train.provenance import collect_provenance
from corl_jax.train.reports import HEADLINE, QUIET, describe_iteration
from corl_jax.train.resolve import ResolvedRun, resolve_run
from corl_jax.train.resume import (
    fingerprint_untrained,
    hash_reward_files,
    needs_new_reports,
    resume,
)
from corl_jax.train.run import Iteration, Run
from corl_jax.train.showing import show_iteration, show_run


def run_config(
    config: Config, origin: Origin | None = None, *, check_only: bool = False,
    allow_changes: bool = False, ends_process: bool = True,
) -> int:  # fmt: skip
    """Resumes or starts the run of a config, or only checks it and prints what it would be.

    `origin`: what the config was made from, for `provenance.json`. `allow_changes` resumes with
    options that differ from those of the run. `ends_process`: see `Interruption`. Returns the
    number of steps that the run has done; 0 after a check.

    Raises:
        InputError: listing everything that is wrong, before a device is used.
        Preempted: SIGTERM or Ctrl-C came; all finished steps are saved.
    """
    startup.prepare_devices(config.distributed)
    with Interruption(ends_process=ends_process) as interruption, processes.fail_together():
        if check_only:
            check_config(config, origin)
            return 0
        return run_training(plan_run(config, origin), interruption, allow_changes)


def plan_run(config: Config, origin: Origin | None) -> ResolvedRun:
    """Resolves a config and prints a warning for each option without effect. Raises: InputError."""
    planned = resolve_run(config, origin)
    warn_of_unused_options(planned)
    return planned


def check_config(config: Config, origin: Origin | None = None) -> None:
    """Checks a config and prints its run; of files on the hub it reads the headers alone.

    Raises:
        InputError: as `run_config`.
    """
    with hub_headers.read_headers_only() as headers:
        planned = plan_run(config, origin)
        if jax.process_index() == 0:
            text = headers.name_places(check.describe(planned))
            print("\n\n".join(filter(None, [text, headers.describe()])))


def warn_of_unused_options(planned: ResolvedRun) -> None:
    """Prints a warning for each option without effect; the first process alone."""
    if jax.process_index() == 0:
        for line in (*find_unused_options(planned.config), *planned.warnings):
            print(f"warning: {line}", file=sys.stderr)


def run_training(planned: ResolvedRun, interruption: Interruption, allow_changes: bool) -> int:
    """Resumes or starts the planned run, to its end or to train.stop_after; returns its steps."""
    config, primary = planned.config, jax.process_index() == 0
    # The blocks end in reverse order: the last save ends while both directories are still locked.
    with (
        open_run_directory(config, primary, allow_changes) as directory,
        lock_checkpoints(directory, config.checkpoint.directory, primary) as place,
        Checkpoints(place, config.checkpoint.keep) as checkpoints,
        jax.set_mesh(planned.mesh),
        # After a failure the blocks above wait for other processes, so the save ends before.
        processes.fail_together(checkpoints.await_running_save),
    ):
        # All processes list the steps: their checkpoint managers may wait for each other.
        steps = checkpoints.steps()
        if primary:
            directory.require_saved(steps, config.checkpoint.directory, place)
        done = planned.steps
        # A permission to change something asks for the whole comparison.
        if not allow_changes and is_finished(planned, directory, checkpoints, steps):
            if primary:
                directory.keep_config(config)
                print_status(describe_end(planned, directory, nothing_to_do=True))
        else:
            if primary:
                print_status(describe_start(planned, directory))
            done = run_steps(planned, interruption, allow_changes, directory, checkpoints)
            if primary:
                print_status(describe_stop(planned, directory, done))
        # jax gives the last process that leaves no time for its export.
        processes.barrier("the end")
    return done


def run_steps(
    planned: ResolvedRun, interruption: Interruption, allow_changes: bool, directory: RunDir,
    checkpoints: Checkpoints,
) -> int:  # fmt: skip
    """Builds the run, restores its newest checkpoint if there is one, and trains.

    Returns the number of steps that are done; fewer than all with train.stop_after.
    """
    config, primary = planned.config, jax.process_index() == 0
    # Now, because users may edit the files while the run goes on.
    sources, files = stamp_sources(planned), hash_reward_files(config)
    has_checkpoint = bool(processes.broadcast_first(len(checkpoints.steps())))
    run, state = build(planned, Phases(), from_checkpoint=has_checkpoint)
    fingerprint = functools.cache(lambda: fingerprint_untrained(run) | files)
    resumed = None
    if has_checkpoint:
        resumed = resume(planned, checkpoints, run, state, fingerprint, allow_changes)
    if primary:
        directory.keep_config(config)  # not before: a refused resume changes nothing
    start, meta = 0, {}
    if resumed is not None:
        start, meta, state = resumed.step, resumed.meta, resumed.tree["state"]
        if primary:
            directory.note_saved(start, config.checkpoint.directory)
    with open_outputs(
        config, run, directory, checkpoints, fingerprint, sources, resumed
    ) as outputs:
        report_start(planned, resumed, outputs)
        show_run(config, outputs.log, start)
        stop = min(run.steps, start + (config.train.stop_after or run.steps))
        reports = make_reports(config, run, outputs)
        left = range(start, stop)
        milestones = make_milestones(config, run, outputs, reports, interruption, left)
        with interruption.deferred():
            # A process that a signal has stopped saves without its reports, so they are made
            # here.
            if start == 0 or meta["unreported"] or needs_new_reports(resumed, run):
                run_due(reports, state, start)
            log = make_step_log(config, run, outputs)
            state = train(run, state, left, milestones, log)
            outputs.saver.finish()
        interruption.stop_if_asked(f"after step {stop}; the same command continues from there")
        if stop == run.steps:
            ending = make_ending(config, run, outputs, planned.model_dir)
            run_due([ending], state, max(start, stop))
        return max(start, stop)


@contextlib.contextmanager
def open_outputs(
    config: Config, run: Run, directory: RunDir, checkpoints: Checkpoints,
    fingerprint: Callable[[], dict[str, str]], sources: str, resumed: Restored | None,
) -> Iterator[Outputs]:  # fmt: skip
    """Opens the log of a run and starts its watchdog; continues those of a restored step."""
    primary = jax.process_index() == 0
    start, meta = (resumed.step, resumed.meta) if resumed else (0, {})
    earlier = read_evaluation_seconds(directory) if start else {}
    pace = Pace(functools.partial(count_milestones, config, run), earlier)
    stacks = directory.path(f"stacks_{jax.process_index()}.txt")
    guards = make_guards(config.guards, run.tasks if run.alternate_every else ())
    guards.restore(meta.get("guards", {}))

    def note_saved(step: int) -> None:
        # So that a run whose checkpoints are gone does not start again from the beginning.
        if primary:
            directory.note_saved(step, config.checkpoint.directory)

    with (
        RunLog(
            directory, start or None, run.steps, primary, resumed_lines=meta.get("metric_lines"),
            headline=HEADLINE, quiet=QUIET, rename=rename_for_charts, trackers=config.log.trackers,
            config=config.model_dump(mode="json"), pace=pace,
        ) as log,
        Watchdog(config.guards.step_timeout_s, stacks) as watchdog,
    ):  # fmt: skip
        saver = Saver(
            checkpoints, log.say, config.checkpoint.max_failures, note_saved, watchdog.paused
        )
        # As if the run had never stopped: the seconds of earlier processes lie before this start.
        began = time.perf_counter() - meta.get("seconds", 0.0)
        yield Outputs(
            directory, log, guards, saver, watchdog, fingerprint, sources, began, primary,
            Progress(meta.get("num_tokens", 0)),
        )  # fmt: skip


def make_step_log(config: Config, run: Run, outputs: Outputs) -> StepLog:
    """Returns the log of the run's iterations, with the checks after each."""

    uncompiled = {*run.tasks} if run.alternate_every else set()

    def check_step(step: int, iteration: Iteration) -> None:
        # After a whole iteration of each task the large programs are compiled, and the watchdog may
        # use its shorter limit. Shared rows of answers may compile one update more later.
        uncompiled.difference_update(iteration.samples)
        outputs.watchdog.beat(compiled=not uncompiled)
        check_iteration(outputs.guards, step, iteration, is_last=step == run.steps)
        outputs.saver.poll()
        if iteration.num_tokens is not None:
            outputs.progress.num_tokens += int(iteration.num_tokens)

    return StepLog(
        outputs.log, outputs.guards, StepClock(run.phases, outputs.log.pace), config.log.every,
        run.steps,
        check=check_step,
        describe=functools.partial(describe_iteration, config, run, outputs.progress),
        show=functools.partial(show_iteration, config, run, outputs),
    )  # fmt: skip


def report_start(planned: ResolvedRun, resumed: Restored | None, outputs: Outputs) -> None:
    """Prints warnings and notes for the user before the first step."""
    log, directory = outputs.log, outputs.directory
    if resumed is not None:
        for text in resumed.warnings:
            log.say(f"warning: {text}")
        log.say(describe_resumption(resumed.step, planned.steps, resumed.meta.get("saved_at")))
        for text in resumed.changes:
            log.say(f"warning: changed config: {text}")
        if resumed.changes and outputs.primary:
            directory.note_changes(resumed.step, resumed.changes)
        if resumed.step > planned.steps:
            log.say(f"step {resumed.step} is done already, past the {planned.steps} of the run")
    if outputs.primary:
        with log.tolerate_disk_errors(PROVENANCE):
            directory.write_json(PROVENANCE, collect_provenance(planned))
    if outputs.primary and (line := export_record.describe_age(directory.export, planned.steps)):
        log.say(line)
    if shortage := check.explain_disk_shortage(planned):
        log.say(f"warning: {shortage}")
    for line in check.describe_inapplicable_rewards(planned):
        log.say(f"warning: {line}")
