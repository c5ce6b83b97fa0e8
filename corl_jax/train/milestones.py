"""What a run leaves behind: metrics, image grids, evaluations, checkpoints, the export."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from corl_jax.config.schema import Config
from corl_jax.devices import batches, processes
from corl_jax.errors import InputError, Preempted, SaveError
from corl_jax.evaluation import shapes
from corl_jax.params import merge
from corl_jax.runs import pictures, same_files
from corl_jax.runs.checkpoints import Checkpoints
from corl_jax.runs.directory import RunDir, jsonable
from corl_jax.runs.guards import Guards
from corl_jax.runs.log import Metrics, read_lines
from corl_jax.runs.saving import Saver
from corl_jax.runs.signals import Interruption
from corl_jax.runs.watchdog import Watchdog
from corl_jax.train import iteration as rl_iteration
from corl_jax.train.export import refresh_export
from corl_jax.train.run import Iteration, Run, put
from corl_jax.train.step import TrainState
from corl_jax.types import Params, Prompts

TABLE_ROWS = 16
"""Answers shown in the text table of an iteration."""
SHEET_DRAWINGS, SHEET_COLUMNS = 36, 6  # of an evaluation's picture


@dataclasses.dataclass
class Recorder:
    """Writes a run's iterations and milestones to its directory."""

    config: Config
    run_dir: RunDir
    metrics: Metrics
    checkpoints: Checkpoints
    model_dir: Any  # where the export's tokenizer and processor files come from
    primary: bool = True
    seconds_before: float = 0.0  # of the processes that this one resumes
    started: float = dataclasses.field(default_factory=time.perf_counter)
    unlogged: list[dict[str, float]] = dataclasses.field(default_factory=list)
    # digests of what is read again at each start
    weights: Callable[[], Mapping[str, str]] = dict
    interruption: Interruption = dataclasses.field(default_factory=Interruption)
    stopping: bool = False  # at the step that `due` was last asked about
    watchdog: Watchdog = dataclasses.field(default_factory=Watchdog)

    def __post_init__(self) -> None:
        self.guards = Guards(self.config.guards)
        self.checkpoints.waiting = self.watchdog.paused
        limit = self.config.checkpoint.max_failures
        self.saver = Saver(
            self.checkpoints, lambda text: self.metrics.say(text), limit, self.note_saved
        )

    def prepare_saves(self) -> None:
        """Takes the digests now: a save that a signal asks for has no time to compile them."""
        with self.watchdog.paused():
            self.weights()

    def note_saved(self, step: int) -> None:
        """So that a run whose checkpoints are gone does not start afresh."""
        if self.primary:
            self.run_dir.note_saved(step, self.config.checkpoint.directory)

    @property
    def seconds(self) -> float:
        """Of the whole run so far, interruptions left out."""
        return self.seconds_before + time.perf_counter() - self.started

    def iteration(
        self, step: int, iteration: Iteration, seconds: dict[str, float], run: Run
    ) -> None:
        """Logs iteration `step` (0-based), counted from then on as `step + 1` done.

        `seconds` by phase; the line has their means since the last one.

        Raises:
            GuardError, RewardError: the run must not go on, nor be saved as it is.
        """
        self.watchdog.beat(compiled=True)
        is_last = step + 1 == run.steps
        self.guards.step(step + 1, iteration.updates, iteration.metrics, is_last)
        self.saver.poll()
        self.unlogged.append(seconds)
        if (step + 1) % self.config.log.every and step + 1 != run.steps:
            return
        values = _of_all_processes(iteration.metrics)
        values |= {n: statistics.fmean(one[n] for one in self.unlogged) for n in seconds}
        self.unlogged.clear()
        values["learning_rate"] = float(run.schedule(max(values["update/applied"] - 1, 0)))
        values["epoch"] = (step + 1) / run.train_loader.steps_per_epoch
        run.train_loader.share_unusable(processes.all_union)
        for kind, count in run.train_loader.counts.items():
            values[f"data/{kind}_rows"] = count
        values |= self._pace(run, values)
        alarms, lines = self.guards.logged(step + 1, values, is_last)
        self.metrics.log(step + 1, values | alarms)
        if self._samples_due(step + 1, run):
            self._answers(step + 1, iteration)
        self._alarm(lines)

    def _alarm(self, lines: Sequence[str]) -> None:
        for line in lines:
            self.metrics.say(line)
        self.guards.require(lines)

    def _pace(self, run: Run, values: dict[str, float]) -> dict[str, float]:
        seconds = values.get("phase/rollout_seconds")
        if not seconds:
            return {}
        completions = self.config.train.prompts_per_step * run.group_size
        pace = {}
        if "t2i" in run.tasks:
            pace["perf/images_per_second"] = completions / seconds
        if "mm2t" in run.tasks:
            pace["perf/tokens_per_second"] = values["mm2t/tokens"] / seconds
        return pace

    def due(self, step: int, run: Run) -> bool:
        """Whether anything beside metrics happens after `step` iterations; asked after each."""
        self.stopping = self.interruption.reached(step)
        return (
            self.stopping
            or step == run.steps
            or step % self.config.checkpoint.every == 0
            or self._evaluation_due(step, run)
            or self._images_due(step, run)
        )

    def _samples_due(self, step: int, run: Run) -> bool:
        every = self.config.log.images_every
        return bool(every) and (step % every == 0 or step == run.steps)

    def _images_due(self, step: int, run: Run) -> bool:
        return "t2i" in run.tasks and self._samples_due(step, run)

    def _evaluation_due(self, step: int, run: Run) -> bool:
        every = self.config.eval.every
        return run.eval_loader is not None and (
            step in (0, run.steps) or (every > 0 and step % every == 0)
        )

    def milestone(self, run: Run, state: TrainState, step: int) -> None:
        """Grids and evaluations that are due after `step` iterations, then the checkpoint.

        Raises:
            Preempted: the run was asked to stop. It is saved; grids and evaluations can wait.
        """
        if self.stopping:
            reports = self._images_due(step, run) or self._evaluation_due(step, run)
            self.save(run, state, step, unreported=reports)
            self.saver.finish()
            raise Preempted(
                f"stopped by {self.interruption.reason} after step {step} of {run.steps}, which is "
                f"saved in {self.checkpoints.directory}; the same command goes on from there"
            )
        self.watchdog.beat()
        pace = self.metrics.pace
        if self._images_due(step, run):
            self.metrics.announce_compilation("picture grid")
            with pace.milestone("images"):
                self._fixed_prompts(run, state, step)
            self.watchdog.beat()
        if self._evaluation_due(step, run):
            self.metrics.announce_compilation("evaluation")
            with pace.milestone("evaluation"):
                self._evaluate(run, state, step)
        if step and (step % self.config.checkpoint.every == 0 or step == run.steps):
            with pace.milestone("save"):
                self.save(run, state, step)

    def count_milestones(self, run: Run, step: int) -> dict[str, int]:
        """How many grids, evaluations and saves come from `step` on, its own included."""
        every = {"save": self.config.checkpoint.every}
        if "t2i" in run.tasks and self.config.log.images_every:
            every["images"] = self.config.log.images_every
        if run.eval_loader is not None:
            every["evaluation"] = self.config.eval.every
        return {kind: count_due(number, step, run.steps) for kind, number in every.items()}

    def save(self, run: Run, state: TrainState, step: int, unreported: bool = False) -> None:
        """Starts a checkpoint of all that the next iterations depend on.

        `unreported`: the grids and evaluations of `step` are left to the process that resumes.
        """
        meta = {
            "data": run.train_loader.get_state() | {"step": step},
            "seed": run.seed,
            "config": self.config.model_dump(mode="json"),
            "seconds": self.seconds,
            "working_directory": same_files.find_working_directory(),
            "weights": self.weights(),
            "metric_lines": self.metrics.lines,
            "unreported": unreported,
            "guards": self.guards.state(),
        }
        self.saver.save(step, {"state": state}, meta)
        self.watchdog.beat()

    def _answers(self, step: int, iteration: Iteration) -> None:
        samples = iteration.samples.get("mm2t")
        if samples is None:
            return
        count = min(TABLE_ROWS, len(samples.texts))
        rewards = [
            {name: float(values[row]) for name, values in iteration.rewards["mm2t"].items()}
            for row in range(count)
        ]
        columns = {name: values[:count] for name, values in samples.columns.items()}
        table = pictures.answers_table(
            columns["qa_problem"], samples.texts[:count], rewards, columns.get("qa_solution")
        )
        self.metrics.text(step, "mm2t/answers", table)

    def _fixed_prompts(self, run: Run, state: TrainState, step: int) -> None:
        """Draws the same held-out prompts with the same keys, so that grids can be compared."""
        everyone = self._first_prompts(run)
        prompts = take(everyone, batches.take_own_rows(run.mesh, np.arange(len(everyone))))
        params = merge(state.params, run.frozen)
        rollout = rl_iteration.sample(run, "t2i", params, prompts)
        samples = rl_iteration.decode(run, "t2i", params, prompts, rollout)
        self.watchdog.beat()
        scores, _ = rl_iteration.score_task(run, "t2i", params, samples, step)
        scores = {
            name: batches.all_gather_rows(run.mesh, values) for name, values in scores.items()
        }
        images = batches.all_gather_rows(run.mesh, np.asarray(samples.images))
        if not self.primary:
            return
        shape = (len(everyone), run.group_size)
        rewards = [
            [
                {name: float(values.reshape(shape)[row, sample]) for name, values in scores.items()}
                for sample in range(run.group_size)
            ]
            for row in range(len(everyone))
        ]
        images = images.reshape(*shape, *images.shape[1:])
        page = pictures.grid(images, everyone.columns["prompt"], rewards, f"step {step}")
        with self.metrics.bearing("images"):
            pictures.save_png(self.run_dir.images / f"step_{step:06d}.png", page)
        self.metrics.image(step, "t2i/fixed_prompts", page)

    def _first_prompts(self, run: Run) -> Prompts:
        """The first held-out prompts, or without any the first of training; of all processes."""
        wanted = 4  # prompts of an image grid
        loader = run.eval_loader or run.train_loader
        ways = batches.num_batch_shards(run.mesh)
        count = min(-(-wanted // ways) * ways, loader.batch_size)
        return loader.at(np.arange(count))

    def _evaluate(self, run: Run, state: TrainState, step: int) -> None:
        params = merge(state.params, run.frozen)
        rollout, suite = self.config.rollout, self.config.eval
        began = time.perf_counter()
        if suite.suite == "rewards":
            values = held_out_rewards(run, params, suite.rows, self.watchdog.beat)
        else:
            report = shapes.evaluate_shapes(
                run.model_config, params, run.processor, run.eval_loader,
                seed=run.seed, cfg_scale=rollout.cfg_scale, temperature=rollout.temperature,
                max_new_tokens=rollout.max_new_tokens, dtype=run.dtype, rows=suite.rows,
                place=self._place(run),
                total=lambda counts: batches.all_gather_rows(run.mesh, counts[None]).sum(axis=0),
            )  # fmt: skip
            values = report.metrics()
            self._held_out_drawings(step, report)
        values = values | {"eval/seconds": time.perf_counter() - began}
        alarms, lines = self.guards.evaluated(step, values)
        self.metrics.log(step, values | alarms)
        self._alarm(lines)

    def _held_out_drawings(self, step: int, report: shapes.Report) -> None:
        """Shows the first drawings of an evaluation, the same rows and keys each time."""
        if not self.primary:
            return
        rate = report.rates["draw/accuracy"]
        title = f"step {step}: {rate.mean:.1%} of {rate.n} drawings as demanded"
        page = shapes.contact_sheet(report, SHEET_DRAWINGS, SHEET_COLUMNS, title)
        with self.metrics.bearing("images"):
            path = self.run_dir.images / f"{pictures.HELD_OUT}_{step:06d}.png"
            pictures.save_png(path, page)
        self.metrics.image(step, "eval/drawings", page)

    def _place(self, run: Run) -> Callable:
        """`put`, which comes once a batch, so that the watchdog hears of each."""

        def place(tree: Any) -> Any:
            self.watchdog.beat()
            return put(run, tree)

        return place

    def evaluations(self) -> list[dict[str, Any]]:
        """Every evaluation so far, in order of steps."""
        records = (record for _, record in read_lines(self.run_dir.metrics))
        return [
            {k: v for k, v in record.items() if k == "step" or k.startswith("eval/")}
            for record in records
            if any(key.startswith("eval/") for key in record)
        ]

    def finish(self, run: Run, state: TrainState, step: int) -> None:
        """Brings the export and `summary.json` of a run with all its steps up to `step`.

        What is there and current stays, byte for byte: then this is the rerun of a finished run.

        Raises:
            SaveError: the export could not be written.
        """
        self.watchdog.beat()
        try:
            notes = refresh_export(
                self.run_dir.export, self.config, run, state, step, self.weights()["model.path"],
                self.model_dir, self.primary, self.watchdog.beat,
            )  # fmt: skip
        except InputError as error:  # what the config can be blamed for was checked before
            raise SaveError(
                f"{error}\nall steps are done and saved; the same command exports again"
            ) from error
        for note in notes:
            self.metrics.say(note)
        if self.primary:
            self._summarise(state, step)

    def _summarise(self, state: TrainState, step: int) -> None:
        evaluations = self.evaluations()
        summary = jsonable({
            "steps": step,
            "optimizer_steps": int(state.step),
            "skipped_updates": self.guards.skipped,
            "first_evaluation": evaluations[0] if evaluations else None,
            "last_evaluation": evaluations[-1] if evaluations else None,
        })  # fmt: skip
        before = self.run_dir.read_json("summary.json") or {}
        if {name: before.get(name) for name in summary} != summary:
            self.run_dir.write_json("summary.json", {**summary, "seconds": self.seconds})


def count_due(every: int, first: int, last: int) -> int:
    """Steps from `first` to `last` that are multiples of `every` (0: none), or the last."""
    multiples = last // every - (first - 1) // every if every else 0
    return multiples + (first <= last and (not every or last % every != 0))


def take(prompts: Prompts, places: np.ndarray) -> Prompts:
    """Some rows of a batch."""
    return Prompts(
        prompts.index[places],
        {name: [values[i] for i in places] for name, values in prompts.columns.items()},
        *(jax.tree.map(lambda x: x[places], part) for part in (prompts.t2i, prompts.mm2t)),
    )


def _of_all_processes(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The metrics as numbers; of those that each process measures, the sum or the largest."""
    values = {name: float(value) for name, value in metrics.items()}
    for ending, over in (("/seconds", np.max), ("/failures", np.sum)):
        names = [name for name in values if name.endswith(ending)]
        if names:
            found = processes.all_gather(np.array([values[name] for name in names], np.float32))
            values |= dict(zip(names, over(found, axis=0).tolist(), strict=True))
    return values


def held_out_rewards(
    run: Run, params: Params, count: int, beat: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Mean and standard error of the training rewards on held-out rows, each counted once."""
    loader = run.eval_loader
    count = min(count, len(loader.source))
    scores: dict[str, list[np.ndarray]] = {}
    for prompts in loader.iterate(0, -(-count // loader.batch_size)):
        beat()
        # The last batch may run into a second pass.
        kept = np.repeat(prompts.index < count, run.group_size)
        for task in run.tasks:
            rollout = rl_iteration.sample(run, task, params, prompts)
            samples = rl_iteration.decode(run, task, params, prompts, rollout)
            for name, values in rl_iteration.score_task(run, task, params, samples, 0)[0].items():
                everyone = batches.all_gather_rows(run.mesh, np.where(kept, values, np.nan))
                scores.setdefault(f"eval/{task}/{name}", []).append(everyone)
    metrics = {}
    for name, pieces in scores.items():
        values = np.concatenate(pieces)
        values = values[~np.isnan(values)]
        metrics[name] = float(values.mean()) if values.size else np.nan
        spread = float(values.std(ddof=1)) if values.size > 1 else np.nan
        metrics[f"{name}_stderr"] = spread / np.sqrt(max(values.size, 1))
    return metrics
