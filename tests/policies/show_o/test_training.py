"""A tiny Show-o goes through the program: training in every stage, resuming, export, commands."""

from __future__ import annotations

import json

import numpy as np
import pytest

from corl_jax.policies import load_policy
from corl_jax.train import __main__ as command
from tests.support import tiny_runs, tiny_show_o

DIFFERENCE = "sampling/sampling_logp_difference/max"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_show_o.model_dir(tmp_path_factory.mktemp("models") / "show_o")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return tiny_runs.rows_file(tmp_path_factory.mktemp("data") / "rows.parquet")


def run(model, rows, output, *more, **changes):
    changes.setdefault("export", {"layout": "jax"})
    tree = tiny_runs.options(model, rows, output, **changes)
    path = tiny_runs.write_config(output.with_suffix(".yaml"), tree)
    command.main(["--config", str(path), *more])
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_both_tasks_with_several_updates_and_micro_batches(model, rows, tmp_path, one_device):
    lines = run(
        model, rows, tmp_path / "run", train={"micro_batch": 2},
        algorithm={"num_iterations": 2, "kl_coef": 0.1},
        rollout={"cfg_scale": 3.0}, unmasking={"steps": 3}, checkpoint={"every": 1},
    )  # fmt: skip
    for line in lines[:2]:
        # The sampler scores its images as the update does, and hides the same codes.
        assert 0 <= line[f"t2i/{DIFFERENCE}"] < 1e-4 and line[f"mm2t/{DIFFERENCE}"] < 1e-4
    assert lines[1]["t2i/kl"] > 0, "the policy has moved away from the reference"
    exported = load_policy(tmp_path / "run" / "export")
    assert exported.family.name == "show_o"
    start = load_policy(model)
    head = np.asarray(start.params["lm_head"]["kernel"])
    assert (np.asarray(exported.params["lm_head"]["kernel"]) != head).any()
