"""The train command as two processes of two devices equals one process of four, and ends as one.

`pair` and `alone` are the same run: evaluation, image grids, checkpoints, export and all.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from corl_jax import config_file, processes, sharding
from corl_jax.config import Distributed
from corl_jax.errors import InputError
from corl_jax.sharding import leaf_paths
from corl_jax.train import __main__ as command
from corl_jax.train import planning
from corl_jax.weights.files import load_config, load_params
from tests import several_processes, tiny_train
from tests.tiny_train import metric_lines, write_config

WITNESS = Path(__file__).with_name("witness_rewards.py")
# Sums over devices may be taken in another order; measured: the same bits, but for two metrics.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_config):
    return tiny_train.model_dir(tmp_path_factory.mktemp("models") / "tiny", tiny_config)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return tiny_train.rows_file(tmp_path_factory.mktemp("data") / "rows.parquet", 20)


def run_options(model: Path, rows: Path, folder: Path) -> dict:
    """A unified run with everything on, in pieces and micro-batches."""
    seen = folder / "seen"
    seen.mkdir(parents=True)
    own = [
        {"use": f"{WITNESS}:{name}", "options": {"folder": str(seen)}}
        for name in ("answers", "drawings")
    ]
    asked = {"name": "t2i_qa", "options": {"greedy": False, "max_new_tokens": 4}}
    return tiny_train.options(
        model, rows, folder / "run",
        rollout={"batch_prompts": 4},
        rewards=[*own, asked],
        grpo={"kl_coef": 0.1},
        train={"max_steps": 2, "prompts_per_step": 8, "micro_batch": 4},
        eval={"suite": "rewards", "rows": 6, "batch_prompts": 4},
        log={"images_every": 2, "fixed_prompts": 3},
        checkpoint={"every": 1, "keep": 2},
    )  # fmt: skip


def train_alone(tree: dict) -> None:
    """In this process, on four of its devices."""
    make = functools.partial(sharding.make_mesh, devices=jax.devices()[:4])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "make_mesh", make)
        command.main(["--config", str(written(tree))])


def train_as_two(tree: dict, *overrides: str) -> list[str]:
    return several_processes.finished(several_processes.train(written(tree), *overrides))


def written(tree: dict) -> Path:
    return write_config(Path(tree["output_dir"]).with_suffix(".yaml"), tree)


@pytest.fixture(scope="module")
def alone(model, rows, tmp_path_factory):
    tree = run_options(model, rows, tmp_path_factory.mktemp("alone"))
    train_alone(tree)
    return Path(tree["output_dir"])


@pytest.fixture(scope="module")
def pair(model, rows, tmp_path_factory):
    """(run directory, what each process printed)"""
    tree = run_options(model, rows, tmp_path_factory.mktemp("pair"))
    texts = train_as_two(tree)
    return Path(tree["output_dir"]), texts


def steady(line: dict) -> dict:
    """A metrics line without what a clock decides."""
    return {k: v for k, v in line.items() if "second" not in k and k != "step_time"}


def seen(run: Path, kind: str) -> list:
    """What a reward was given by all processes, with repetitions."""
    files = (run.parent / "seen").glob(f"{kind}-*.jsonl")
    return sorted(json.loads(line) for file in files for line in file.read_text().splitlines())


def exported(run: Path, model: Path) -> dict[str, np.ndarray]:
    return dict(leaf_paths(load_params(run / "export", load_config(model))))


def assert_same_parameters(found: Path, wanted: Path, model: Path) -> None:
    ours, theirs = exported(found, model), exported(wanted, model)
    assert ours.keys() == theirs.keys()
    for path, leaf in ours.items():
        np.testing.assert_allclose(leaf, theirs[path], err_msg=path, **TOLERANCE)


# ---- the same run


@pytest.mark.parametrize("kind", ["answers", "drawings"])
def test_two_processes_sample_what_one_does(pair, alone, kind):
    """All rollouts of two steps and two evaluations, and the grids; no row is missing or double."""
    found, wanted = seen(pair[0], kind), seen(alone, kind)
    assert len({tuple(record) for record in wanted}) > 30
    assert found == wanted


def test_two_processes_log_the_same_numbers(pair, alone):
    ours, theirs = metric_lines(pair[0]), metric_lines(alone)
    assert [line["step"] for line in ours] == [0, 1, 2, 2]
    for found, wanted in zip(map(steady, ours), map(steady, theirs), strict=True):
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_two_processes_end_with_the_same_parameters(pair, alone, model):
    assert_same_parameters(pair[0], alone, model)
    start = dict(leaf_paths(load_params(model, load_config(model))))
    moved = exported(alone, model)["lm_head/kernel"] - start["lm_head/kernel"]
    assert np.abs(moved).max() > 100 * TOLERANCE["atol"]


def test_two_processes_draw_the_same_grids(pair, alone):
    names = ["step_000000.png", "step_000002.png"]
    assert sorted(path.name for path in (pair[0] / "images").iterdir()) == names
    for name in names:
        assert (pair[0] / "images" / name).read_bytes() == (alone / "images" / name).read_bytes()


def test_only_the_first_process_logs(pair):
    run, (first, second) = pair
    assert "step 2/2" in first and "step" not in second
    assert len(list((run / "tensorboard").iterdir())) == 1


# ---- resuming with another number of processes


def interrupted(run: Path, folder: Path) -> dict:
    """A copy as it stood after the first step."""
    shutil.copytree(run.parent, folder, dirs_exist_ok=True)
    copy = folder / "run"
    for name in ("checkpoints/2", "export"):
        shutil.rmtree(copy / name)
    (copy / "summary.json").unlink()
    config = config_file.load(copy / "config.yaml").model_dump(mode="json")
    return config | {"output_dir": str(copy), "distributed": {}}


def test_one_process_resumes_what_two_began(pair, alone, model, tmp_path):
    tree = interrupted(pair[0], tmp_path)
    train_alone(tree)
    assert [line["step"] for line in metric_lines(tmp_path / "run")] == [0, 1, 2, 2]
    assert_same_parameters(tmp_path / "run", alone, model)


def test_two_processes_resume_what_one_began(alone, model, tmp_path):
    tree = interrupted(alone, tmp_path)
    train_as_two(tree)
    assert [line["step"] for line in metric_lines(tmp_path / "run")] == [0, 1, 2, 2]
    assert_same_parameters(tmp_path / "run", alone, model)
