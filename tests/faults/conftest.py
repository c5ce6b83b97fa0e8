"""What the tests of faults share: a model, rows, and the run that nothing happens to."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import pytest

from corl_jax import sharding
from corl_jax.train import planning
from tests import tiny_train
from tests.faults import harness


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_config: Any) -> Path:
    """A tiny Janus on disk."""
    return tiny_train.model_dir(tmp_path_factory.mktemp("models") / "tiny", tiny_config)


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen rows with all columns."""
    return tiny_train.rows_file(tmp_path_factory.mktemp("data") / "rows.parquet", 16)


@pytest.fixture
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command in this process takes the machine for one with one device."""
    make = functools.partial(sharding.make_mesh, devices=jax.devices()[:1])
    monkeypatch.setattr(planning, "make_mesh", make)


@pytest.fixture(scope="session")
def straight(model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the run of `harness.SUPERVISED` comes to when nothing happens to it."""
    job = harness.Job.make(tmp_path_factory.mktemp("straight"), model, rows, **harness.SUPERVISED)
    make = functools.partial(sharding.make_mesh, devices=jax.devices()[:1])
    with mock.patch.object(planning, "make_mesh", make):
        assert job.here() == 0
    return harness.outcome(job)
