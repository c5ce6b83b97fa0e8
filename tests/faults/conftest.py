"""What the tests of faults share: a model, rows, and the run that nothing happens to."""

from __future__ import annotations

import functools
from pathlib import Path
from unittest import mock

import jax
import pytest

from corl_jax.devices.mesh import make_mesh
from corl_jax.train import resolve
from tests.faults import harness


@pytest.fixture(scope="session")
def straight(model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the run of `harness.SUPERVISED` comes to when nothing happens to it."""
    job = harness.Job.make(tmp_path_factory.mktemp("straight"), model, rows, **harness.SUPERVISED)
    make = functools.partial(make_mesh, devices=jax.devices()[:1])
    with mock.patch.object(resolve, "make_mesh", make):
        assert job.here() == 0
    return harness.outcome(job)
