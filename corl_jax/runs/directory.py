"""The run directory: one writer, one config, files that are either whole or not there.

config.yaml            the resolved config, every option with its value, and where paths start
config_changes.jsonl   what --allow-changed-config let pass, and at which step
metrics.jsonl          one line per logged step
saved.json             the newest step that was said to be saved, and where
tensorboard/           event files
checkpoints/           one directory per finished step; STEP.corrupt-N is one that was put aside
images/                grids of fixed prompts
export/                the final model; corl_jax_export.json in it says of which step
summary.json           steps, seconds, first and last evaluation
stacks_N.txt           where each thread of process N waited when the watchdog ended it
.lock                  held while a process writes here
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
import yaml

from corl_jax.config import files as config_files
from corl_jax.config.schema import Config
from corl_jax.devices import processes
from corl_jax.errors import InputError
from corl_jax.runs import same_files
from corl_jax.runs.locking import locked

MAY_CHANGE = (
    "output_dir",  # a run may be moved, or named from another working directory
    r"train\.stop_after",
    r"(log|export|mesh|distributed)\..*",  # another mesh changes rounding, not the run
    r"model\.attention",  # so does another kernel
    r"checkpoint\.(every|keep|max_failures|directory)",  # there saved.json's step has to be
    r"eval\.(every|batch_prompts)",  # not its rows: they are held out of training
    r"data\.(cache_rows|max_bad_fraction)",
    r"rewards\.\d+\.(timeout_s|max_failures)",
    r"guards\..*",  # they watch, and change nothing that they let pass
    r"networks\.offload",
    r"algorithm\.reference",  # where it lies, not what it is
)
"""Options that a resumed run may give another value; regexes of whole keys."""

OWN = (
    "config_changes.jsonl", "metrics.jsonl", "saved.json", "tensorboard", "checkpoints", "images",
    "export", "summary.json",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class RunDir:
    """Names of a run's files."""

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
    def export(self) -> Path:
        return self.path("export")

    @property
    def summary(self) -> Path:
        return self.path("summary.json")

    def keep_config(self, config: Config) -> None:
        """Writes `config.yaml`, from which on the run is one of this config.

        Raises:
            InputError: it cannot be written.
        """
        try:
            with replacing(self.config) as file:
                file.write(_config_text(config))
        except OSError as error:
            raise _unwritable(self.root, error) from None

    def note_saved(self, step: int, directory: str | None) -> None:
        """Writes `saved.json`: `step` is saved, in `directory` or (None) in the run directory."""
        place = directory and same_files.resolve_path(directory)
        self.write_json("saved.json", {"step": step, "directory": place})

    def require_saved(self, steps: list[int], directory: str | None, place: Any) -> None:
        """Refuses to start afresh, or from further back, where the saved steps are not found.

        `steps` are those found in `place`, which the option `directory` names (None: in the run
        directory). In the same place an older step is enough, as the newest one may have been
        damaged or taken away on purpose.

        Raises:
            InputError: the step of `saved.json` is not there.
        """
        path = self.path("saved.json")
        if not path.exists():
            return
        try:
            noted = json.loads(path.read_bytes())
            step, before = int(noted["step"]), noted["directory"]
            same = before == (directory and same_files.resolve_path(directory))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path}: unreadable ({type(error).__name__}), expected the newest saved step; "
                "remove it if the checkpoints are where they were"
            ) from None
        if steps and (same or before == directory or steps[-1] >= step):
            return
        found = f"steps {', '.join(map(str, steps))}" if steps else "no checkpoint"
        moved = "" if same else f" (checkpoint.directory was {before})"
        raise InputError(
            f"{path}: step {step} was saved, but {place} has {found}{moved}; bring the checkpoints "
            "back, name their place in checkpoint.directory, or choose another output_dir to "
            "start afresh"
        )

    def read_json(self, name: str) -> dict[str, Any] | None:
        """The object of a JSON file of the run; None if it is not there or not whole."""
        try:
            value = json.loads(self.path(name).read_bytes())
        except (OSError, ValueError):
            return None
        return value if isinstance(value, dict) else None

    def note_changes(self, step: int, changes: list[str]) -> None:
        """Adds to `config_changes.jsonl` that the run goes on from `step` with another config."""
        path = self.path("config_changes.jsonl")
        lines = path.read_bytes().splitlines() if path.exists() else []
        line = json.dumps({"step": step, "changes": changes}).encode()
        if lines[-1:] == [line]:
            return  # the same command again, before it saved anything
        with replacing(path) as file:
            file.write(b"".join(one + b"\n" for one in [*lines, line]))

    def path(self, name: str) -> Path:
        """A path below the run directory.

        Raises:
            ValueError: the name leads out of it.
        """
        relative = PurePosixPath(name)
        if relative.is_absolute() or ".." in relative.parts or not relative.parts:
            raise ValueError(f"{name!r} does not stay inside of the run directory {self.root}")
        return self.root / relative

    def write_json(self, name: str, value: Any) -> Path:
        """Writes a JSON file whole or not at all; numbers that are not finite become null."""
        path = self.path(name)
        with replacing(path) as file:
            file.write(json.dumps(jsonable(value), indent=2, allow_nan=False).encode() + b"\n")
        return path


@contextlib.contextmanager
def opened(config: Config, primary: bool = True, allow_changes: bool = False) -> Iterator[RunDir]:
    """The config's run directory, created or taken up again, locked until the block ends.

    A run that is taken up keeps its config.yaml until `keep_config`.
    Processes other than the first pass `primary=False`, touch nothing and wait for the first.

    Raises:
        InputError: the directory cannot be used, another process writes to it, or it holds a
            run of another config and `allow_changes` is not given (every differing option is
            listed).
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
    with locked(run.root):
        _require_same_run(run, config, allow_changes)
        try:
            for leftover in (*run.root.glob(".*.tmp"), *run.images.glob(".*.tmp")):
                leftover.unlink()
            for leftover in run.root.glob(".*.partial"):  # of an export
                shutil.rmtree(leftover)
            for replaced in run.root.glob(".export.*.old"):  # killed before the new one came
                shutil.rmtree(replaced) if run.export.exists() else replaced.rename(run.export)
            kept = run.config.read_bytes() if run.config.exists() else None
            with replacing(run.config) as file:  # also shows that the directory can be written
                file.write(kept or _config_text(config))
        except OSError as error:
            raise _unwritable(run.root, error) from None
        processes.barrier("run directory")
        yield run


@contextlib.contextmanager
def checkpoints_locked(
    run: RunDir, directory: str | None, primary: bool = True
) -> Iterator[str | Path]:
    """Where a run's checkpoints are, created and locked too: another run may have been given it.

    `directory`: None for the run's own. A bucket is not locked; `primary` as for `opened`.

    Raises:
        InputError: it cannot be used, or another process writes to it.
    """
    place = directory or run.checkpoints
    if not primary or "://" in str(place):
        yield place
        return
    path = Path(place)
    try:
        path.mkdir(parents=True, exist_ok=True)
        own = path.samefile(run.root)  # which is locked
    except OSError as error:
        raise InputError(
            f"checkpoint.directory: {path}: {error.strerror}; name a directory that can be used"
        ) from None
    with contextlib.nullcontext() if own else locked(path, "checkpoint.directory"):
        yield place


def _config_text(config: Config) -> bytes:
    return (same_files.write_header() + config_files.dump(config)).encode()


def _unwritable(root: Path, error: OSError) -> InputError:
    return InputError(
        f"output_dir: {error.filename or root}: {error.strerror}; name a directory that can be "
        "written, with room in it"
    )


def _require_same_run(run: RunDir, config: Config, allow_changes: bool) -> None:
    if not run.config.exists():
        foreign = [name for name in OWN if (run.root / name).exists()]
        if foreign:
            raise InputError(
                f"output_dir: {run.root} has {', '.join(foreign)} but no config.yaml, so it is "
                "not a run that can be resumed; choose another directory"
            )
        return
    try:
        text = run.config.read_text(encoding="utf-8")
        old = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{run.config}: unreadable: {error}; choose another output_dir") from None
    if not isinstance(old, dict):
        raise InputError(
            f"{run.config}: found {type(old).__name__}, expected a mapping of options; "
            "choose another output_dir"
        )
    new, start = config.model_dump(mode="json"), same_files.read_header(text)
    config_changes(old, new, str(run.config), allow_changes, start)


def config_changes(
    old: dict[str, Any],
    new: dict[str, Any],
    source: str,
    allowed: bool = False,
    start: str | None = None,
) -> list[str]:
    """Options that differ from the config that `source` recorded, MAY_CHANGE left out.

    `start`: the directory that the recorded relative paths start at, if it is known.

    Raises:
        InputError: some differ and they are not `allowed`; a line for each.
    """
    with contextlib.suppress(InputError):  # an older version's: compared as it stands
        old = config_files.validate(old, source).model_dump(mode="json")
    problems = differences(old, new, start)
    if problems and not allowed:
        remedy = (
            "give the old values, another output_dir for a new run, or --allow-changed-config to "
            "go on with the new ones"
        )
        raise InputError([f"{source}: {problem}; {remedy}" for problem in problems])
    return problems


def differences(old: dict[str, Any], new: dict[str, Any], start: str | None = None) -> list[str]:
    """`key: found X, the run has Y` of every option that differs and may not."""
    was, now = dict(_leaves(old)), dict(_leaves(new))
    lines = []
    for key in [*now, *(key for key in was if key not in now)]:
        if any(re.fullmatch(pattern, key) for pattern in MAY_CHANGE):
            continue
        if key not in was:
            lines.append(f"{key}: found {now[key]!r}, the run has no such option")
        elif key not in now:
            lines.append(f"{key}: not given, the run has {was[key]!r}")
        elif same_files.is_changed(key, was[key], now[key], start):
            other = f", from {start}" if was[key] == now[key] else ""
            lines.append(f"{key}: found {now[key]!r}, the run has {was[key]!r}{other}")
    return lines


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        items = [(str(key), value) for key, value in tree.items()]
    elif isinstance(tree, list):
        items = [(str(index), value) for index, value in enumerate(tree)]
    else:
        yield prefix, tree
        return
    for key, value in items:
        yield from _leaves(value, f"{prefix}.{key}" if prefix else key)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that takes the place of `path` when the block ends without an error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def jsonable(value: Any) -> Any:
    """Plain JSON values of nested dicts, lists, scalars and arrays; not finite -> None."""
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "__array__"):
        array = np.asarray(value)
        if array.dtype.kind not in "biuf":
            array = array.astype(np.float32)  # bfloat16 is nothing to Python
        return jsonable(array.tolist())
    raise TypeError(f"{type(value).__name__} has no place in JSON")
