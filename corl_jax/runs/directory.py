"""Manages the directory of a run: one writer, one config, and files that are always whole.

config.yaml            the resolved config, every option with its value, and where paths start
config_changes.jsonl   options that --allow-changed-config has changed, and at which step
metrics.jsonl          one line per logged step
saved.json             the newest step that was reported as saved, and where
tensorboard/           event files
checkpoints/           one directory per finished step; STEP.corrupt-N is a damaged one
images/                grids of fixed prompts
samples/               completions of a step with their rewards, as Parquet
export/                the final model; its corl_jax_export.json has the step
summary.json           steps, seconds, first and last evaluation
report.html            a page of the finished run
provenance.json        config, model, devices and versions that the run was last started with
stacks_N.txt           where each thread of process N waited when the watchdog ended it
.lock                  locked while a process writes here
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import yaml

from corl_jax.atomic_files import replace_file
from corl_jax.config import files as config_files
from corl_jax.config import resuming
from corl_jax.config.schema import Config
from corl_jax.devices import processes
from corl_jax.errors import InputError
from corl_jax.runs import same_files
from corl_jax.runs.locking import lock_directory

REPORT, PROVENANCE, SUMMARY = "report.html", "provenance.json", "summary.json"
SAMPLES, CONFIG_CHANGES = "samples", "config_changes.jsonl"
RUN_FILES = (
    CONFIG_CHANGES, "metrics.jsonl", "saved.json", "tensorboard", "checkpoints", "images", SAMPLES,
    "export", SUMMARY,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class RunDir:
    """The files of a run by name."""

    root: Path

    @property
    def config(self) -> Path:
        return self.path("config.yaml")

    @property
    def metrics(self) -> Path:
        return self.path("metrics.jsonl")

    @property
    def tensorboard(self) -> Path:
        return self.path("tensorboard")

    @property
    def checkpoints(self) -> Path:
        return self.path("checkpoints")

    @property
    def images(self) -> Path:
        return self.path("images")

    @property
    def samples(self) -> Path:
        return self.path(SAMPLES)

    @property
    def export(self) -> Path:
        return self.path("export")

    def keep_config(self, config: Config) -> None:
        """Writes `config.yaml`: from now on the run has this config.

        Raises:
            InputError: it cannot be written.
        """
        try:
            with replace_file(self.config) as file:
                file.write(_encode_config(config))
        except OSError as error:
            raise _make_write_error(self.root, error) from None

    def note_saved(self, step: int, directory: str | None) -> None:
        """Writes to `saved.json` that a step is saved in `directory` (None: the run directory)."""
        place = directory and same_files.resolve_path(directory)
        self.write_json("saved.json", {"step": step, "directory": place})

    def require_saved(self, steps: list[int], directory: str | None, place: Any) -> None:
        """Requires that the checkpoints are where the run has saved them.

        `steps`: the steps in `place`, which the option `directory` names (None: the run
        directory).

        Raises:
            InputError: the step of `saved.json` is missing, so the run would start again.
        """
        path = self.path("saved.json")
        if not path.exists():
            return
        try:
            saved = json.loads(path.read_bytes())
            step, before = int(saved["step"]), saved["directory"]
            same = before == (directory and same_files.resolve_path(directory))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path}: unreadable ({type(error).__name__}), expected the newest saved step; "
                "remove it if the checkpoints are where they were"
            ) from None
        # In the same place an older step is enough: the newest one may have been damaged, or
        # removed on purpose.
        if steps and (same or before == directory or steps[-1] >= step):
            return
        present = f"steps {', '.join(map(str, steps))}" if steps else "no checkpoint"
        moved = "" if same else f" (checkpoint.directory was {before})"
        raise InputError(
            f"{path}: step {step} was saved, but {place} has {present}{moved}; bring the "
            "checkpoints back, name their place in checkpoint.directory, or choose another "
            "output_dir to start afresh"
        )

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Returns the object of a JSON file of the run; None if the file is missing or damaged."""
        try:
            value = json.loads(self.path(name).read_bytes())
        except (OSError, ValueError):
            return None
        return value if isinstance(value, dict) else None

    def note_changes(self, step: int, changes: list[str]) -> None:
        """Adds to `config_changes.jsonl` that the run continues from `step` with these changes."""
        path = self.path(CONFIG_CHANGES)
        lines = path.read_bytes().splitlines() if path.exists() else []
        line = json.dumps({"step": step, "changes": changes}).encode()
        if lines[-1:] == [line]:
            return  # the same command was run again before it had saved anything
        with replace_file(path) as file:
            file.write(b"".join(text + b"\n" for text in [*lines, line]))

    def path(self, name: str) -> Path:
        """Returns a path below the run directory.

        Raises:
            ValueError: the name leads out of the directory.
        """
        relative = PurePosixPath(name)
        if relative.is_absolute() or ".." in relative.parts or not relative.parts:
            raise ValueError(f"{name!r} does not stay inside of the run directory {self.root}")
        return self.root / relative

    def write_json(self, name: str, value: Any) -> Path:
        """Writes a JSON file, whole or not at all. Numbers that are not finite become null."""
        path = self.path(name)
        with replace_file(path) as file:
            file.write(json.dumps(to_json(value), indent=2, allow_nan=False).encode() + b"\n")
        return path


@contextlib.contextmanager
def open_run_directory(
    config: Config, primary: bool = True, allow_changes: bool = False
) -> Iterator[RunDir]:
    """Creates or opens the run directory of a config, and locks it while the block lasts.

    An existing run keeps its config.yaml until `keep_config`. All processes but the first pass
    `primary=False`: they write nothing and wait for the first.

    Raises:
        InputError: the directory cannot be used, another process writes to it, or, without
            `allow_changes`, its run has another config (each differing option is listed).
    """
    run = RunDir(Path(config.output_dir))
    if not primary:
        processes.barrier("run directory")
        yield run
        return
    try:
        run.root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"output_dir: {run.root}: {error.strerror}; name a directory that can be created"
        ) from None
    # Before the comparison, so that no other process changes the run in between.
    with lock_directory(run.root):
        _require_same_run(run, config, allow_changes)
        try:
            # A killed process leaves these parts of files; under the lock nobody else writes them.
            for folder in (run.root, run.images, run.samples):
                for leftover in folder.glob(".*.tmp"):
                    leftover.unlink()
            for leftover in run.root.glob(".*.partial"):  # of an export
                shutil.rmtree(leftover)
            # The process was killed between moving the old export away and the new one in.
            for replaced in run.root.glob(".export.*.old"):
                shutil.rmtree(replaced) if run.export.exists() else replaced.rename(run.export)
            saved_text = run.config.read_bytes() if run.config.exists() else None
            # Written even if it stays the same, as a test that the directory can be written.
            with replace_file(run.config) as file:
                file.write(saved_text or _encode_config(config))
        except OSError as error:
            raise _make_write_error(run.root, error) from None
        processes.barrier("run directory")
        yield run


@contextlib.contextmanager
def lock_checkpoints(
    run: RunDir, directory: str | None, primary: bool = True
) -> Iterator[str | Path]:
    """Creates and locks the directory of a run's checkpoints; yields its path.

    `directory`: None for the run directory's `checkpoints`. A bucket is not locked. `primary`: as
    in `open_run_directory`.

    Raises:
        InputError: it cannot be used, or another process writes to it.
    """
    place = directory or run.checkpoints
    if not primary or "://" in str(place):
        yield place
        return
    path = Path(place)
    # Locked too, because another run may have the same option.
    try:
        path.mkdir(parents=True, exist_ok=True)
        # A second flock of the same file by this process would be refused as well.
        is_locked = path.samefile(run.root)
    except OSError as error:
        raise InputError(
            f"checkpoint.directory: {path}: {error.strerror}; name a directory that can be used"
        ) from None
    with contextlib.nullcontext() if is_locked else lock_directory(path, "checkpoint.directory"):
        yield place


def _encode_config(config: Config) -> bytes:
    return (same_files.write_header() + config_files.dump(config)).encode()


def _make_write_error(root: Path, error: OSError) -> InputError:
    return InputError(
        f"output_dir: {error.filename or root}: {error.strerror}; name a directory that can be "
        "written, with room in it"
    )


def _require_same_run(run: RunDir, config: Config, allow_changes: bool) -> None:
    if not run.config.exists():
        foreign = [name for name in RUN_FILES if (run.root / name).exists()]
        if foreign:
            raise InputError(
                f"output_dir: {run.root} has {', '.join(foreign)} but no config.yaml, so it is "
                "not a run that can be resumed; choose another directory"
            )
        return
    try:
        text = run.config.read_text(encoding="utf-8")
        # Not `config.files.load`, which refuses options that are unknown by now.
        old = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{run.config}: unreadable: {error}; choose another output_dir") from None
    if not isinstance(old, dict):
        raise InputError(
            f"{run.config}: found {type(old).__name__}, expected a mapping of options; "
            "choose another output_dir"
        )
    new, start = config.model_dump(mode="json"), same_files.read_header(text)
    list_config_changes(old, new, str(run.config), allow_changes, start)


def list_config_changes(
    old: dict[str, Any],
    new: dict[str, Any],
    source: str,
    allowed: bool = False,
    start: str | None = None,
) -> list[str]:
    """Lists the options that differ from the config in `source`, without those that may change.

    `start`: the directory where relative paths of that config start, if it is known.

    Raises:
        InputError: options differ and that is not `allowed`; one line for each.
    """
    # A config of an older version may be invalid now, and is compared as it is.
    with contextlib.suppress(InputError):
        old = config_files.validate(old, source).model_dump(mode="json")
    problems = list_differences(old, new, start)
    if problems and not allowed:
        remedy = (
            "give the old values, another output_dir for a new run, or --allow-changed-config to "
            "continue with the new ones"
        )
        raise InputError([f"{source}: {problem}; {remedy}" for problem in problems])
    return problems


def list_differences(
    old: dict[str, Any], new: dict[str, Any], start: str | None = None
) -> list[str]:
    """Lists `key: found X, the run has Y` for each option that differs and must not."""
    was, now = dict(_iterate_options(old)), dict(_iterate_options(new))
    lines = []
    for key in [*now, *(key for key in was if key not in now)]:
        if resuming.may_change(key):
            continue
        if key not in was:
            lines.append(f"{key}: found {now[key]!r}, the run has no such option")
        elif key not in now:
            lines.append(f"{key}: not given, the run has {was[key]!r}")
        elif same_files.is_changed(was[key], now[key], start, resuming.is_path(key)):
            other = f", from {start}" if was[key] == now[key] else ""
            lines.append(f"{key}: found {now[key]!r}, the run has {was[key]!r}{other}")
    return lines


def _iterate_options(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        items = [(str(key), value) for key, value in tree.items()]
    elif isinstance(tree, list):
        items = [(str(index), value) for index, value in enumerate(tree)]
    else:
        yield prefix, tree
        return
    for key, value in items:
        yield from _iterate_options(value, f"{prefix}.{key}" if prefix else key)


def to_json(value: Any) -> Any:
    """Returns nested dicts, lists, scalars and arrays as JSON values; None for NaN and infinity."""
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "__array__"):
        array = np.asarray(value)
        if array.dtype.kind not in "biuf":
            array = array.astype(np.float32)  # Python has no bfloat16
        return to_json(array.tolist())
    raise TypeError(
        f"found {type(value).__name__}, expected a dict, list, number, string or array for JSON"
    )
