"""Trackers beside TensorBoard: what they are told, and that none of them ends a run."""

from __future__ import annotations

import importlib.util
import io
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from corl_jax.config import files as config_files
from corl_jax.errors import InputError
from corl_jax.runs import trackers
from corl_jax.runs.directory import RunDir
from corl_jax.runs.log import RunLog

CONFIG = {"seed": 3, "model": {"path": "m"}}


class FakePackage(types.ModuleType):
    """W&B's interface, which remembers its calls."""

    def __init__(self, fails: tuple[str, ...] = ()):
        super().__init__("wandb")
        self.calls, self.fails = [], fails

    def _note(self, name, *values):
        self.calls.append((name, *values))
        if name in self.fails:
            raise ConnectionError("no network")

    def init(self, **options):
        self._note("init", options)
        return types.SimpleNamespace(
            log=lambda values, step: self._note("log", step, values),
            finish=lambda: self._note("finish"),
        )

    def Image(self, pixels):
        return "image", pixels.shape

    def Html(self, text):
        return "html", text

    def Histogram(self, np_histogram):
        return "histogram", np_histogram[0].tolist()


def log_a_step(run: RunDir, resumed_at: int | None = None) -> str:
    stream = io.StringIO()
    with RunLog(run, resumed_at, stream=stream, trackers=["wandb"], config=CONFIG) as log:
        log.add_metrics(4, {"reward": 0.5, "nothing": float("nan")})
        log.add_image(4, "grid", np.zeros((2, 3, 3), np.uint8))
        log.add_text(4, "answers", "<think>")
        log.add_histogram(4, "rewards", *np.histogram([1.0, 2.0], 2))
        log.add_metrics(5, {"reward": 0.75})
    return stream.getvalue()


def test_a_tracker_is_told_everything(tmp_path, monkeypatch):
    package = FakePackage()
    monkeypatch.setitem(sys.modules, "wandb", package)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    run = RunDir(tmp_path / "my_run")
    run.root.mkdir()
    log_a_step(run)
    (_, options), *logged, last = package.calls
    assert options["name"] == "my_run" and options["config"] == CONFIG
    assert options["project"] == "corl-jax" and options["resume"] == "allow"
    assert logged == [
        ("log", 4, {"reward": 0.5}),
        ("log", 4, {"grid": ("image", (2, 3, 3))}),
        ("log", 4, {"answers_text": ("html", "<pre>&lt;think&gt;</pre>")}),
        ("log", 4, {"rewards": ("histogram", [1, 1])}),
        ("log", 5, {"reward": 0.75}),
    ]
    assert last == ("finish",)
    assert not run.tensorboard.exists()  # it was not named


def test_a_resumed_run_keeps_its_id_and_a_new_one_does_not(tmp_path, monkeypatch):
    package = FakePackage()
    monkeypatch.setitem(sys.modules, "wandb", package)
    for resumed_at in (None, 3, None):
        log_a_step(RunDir(tmp_path), resumed_at)
    first, again, new = [call[1]["id"] for call in package.calls if call[0] == "init"]
    assert first == again != new


def test_several_trackers_of_a_run_have_one_id(tmp_path, monkeypatch):
    ids = []

    def take_id(description):
        ids.append(description.run_id)
        raise ConnectionError("no network")  # a tracker that fails has its id already

    for name in trackers.TRACKERS:
        monkeypatch.setitem(trackers.TRACKERS, name, take_id)
    for resumed_at in (None, 3):
        with RunLog(RunDir(tmp_path), resumed_at, trackers=["wandb", "trackio"]):
            pass
    assert len(ids) == 4 and len({*ids}) == 1


@pytest.mark.parametrize("fails", ["init", "log", "finish"])
def test_a_tracker_that_fails_is_reported_once(tmp_path, monkeypatch, fails):
    monkeypatch.setitem(sys.modules, "wandb", FakePackage((fails,)))
    text = log_a_step(RunDir(tmp_path))
    assert text.count("warning: wandb: no network; training continues") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_missing_package_is_refused(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "trackio" else find(name)
    )
    tree = {
        "output_dir": "r", "model": {"path": "m"}, "data": {"path": "d"},
        "rewards": [{"name": "format"}], "log": {"trackers": ["tensorboard", "trackio"]},
    }  # fmt: skip
    with pytest.raises(InputError, match=r"log.trackers: .*`pip install 'corl-jax\[trackio\]'"):
        config_files.validate(tree, "test")


TRAINING = (
    "minimal", "data.path=rows", "output_dir=run", "train.max_steps=2", "train.prompts_per_step=4",
    "rollout.group_size=2", "rollout.max_new_tokens=4", "log.every=1", "log.images_every=1",
)  # fmt: skip
READ_TRACKIO = """
import trackio
from trackio.sqlite_storage import SQLiteStorage
(run,) = trackio.Api().runs("corl-jax")
assert run.name.startswith("run-"), run.name
logs = SQLiteStorage.get_logs("corl-jax", run.name)
assert [row["step"] for row in logs if "reward" in row] == [1, 2], logs
assert run.config["train"]["max_steps"] == 2, run.config
"""


@pytest.mark.slow
@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_a_training_with_the_real_packages(tmp_path, tracker):
    """Stopped and resumed, in an environment of its own, because Trackio needs an older Pillow."""
    python = make_environment(tmp_path / "env", tracker)
    environment = os.environ | {
        "WANDB_MODE": "offline", "TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1",
        "JAX_PLATFORMS": "cpu",
    }  # fmt: skip

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [python, *arguments], env=environment, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stderr

    data = ("--world", "small", "--out", "rows", "--rows", "16", "--seed", "1")
    run("-m", "corl_jax", "data", *data)
    for more in (["train.stop_after=1"], []):
        printed = run("-m", "corl_jax", "train", *TRAINING, f"log.trackers=[{tracker}]", *more)
        assert f"warning: {tracker}" not in printed, printed
    if tracker == "wandb":
        # Offline, each process has a folder; `wandb sync` joins those of one id.
        folders = [*(tmp_path / "run/wandb").glob("offline-run-*")]
        ids = {folder.name.rpartition("-")[2] for folder in folders}
        assert len(folders) == 2 and ids == {(tmp_path / "run/tracker_id.txt").read_text().strip()}
        assert all([*folder.glob("files/media/images/**/*.png")] for folder in folders)
    else:
        run("-c", READ_TRACKIO)


def make_environment(folder: Path, package: str) -> Path:
    """Returns the Python of an environment with a package, above the packages of this one."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    above = [place for place in sys.path if place.endswith("site-packages")]
    above.append(str(Path(__file__).resolve().parents[2]))
    (site / "above.pth").write_text("\n".join(above))
    python = folder / "bin" / "python"
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", package], check=True)
    return python
