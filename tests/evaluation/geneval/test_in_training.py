"""The suite `geneval` of a training: its rows, its rates, and the networks that it asks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import corl_jax
from corl_jax.data.dataset import Loader, LoaderOptions
from corl_jax.errors import InputError
from corl_jax.evaluation import EvaluationInputs
from corl_jax.evaluation.geneval import in_training
from corl_jax.policies import load_policy
from corl_jax.policies.family import SamplingOptions
from corl_jax.rewards.samples import Policy
from tests.support import metrics_page

NANO = Path(corl_jax.__file__).parent / "assets" / "nano_janus"
TAGS = ("single_object", "counting", "single_object", "counting", "colors")


def write_metadata(path, *changes):
    rows = [
        {"tag": tag, "include": [{"class": "dog", "count": 1}], "prompt": f"dog {number}"}
        for number, tag in enumerate(TAGS)
    ]
    for number, change in enumerate(changes):
        rows[number] |= change
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_rates_are_those_of_the_rows_that_count(tmp_path):
    path = write_metadata(tmp_path / "evaluation_metadata.jsonl")
    source = in_training.open_rows(str(path), ("geneval",))
    model = load_policy(NANO, np.dtype(np.float32))
    options = LoaderOptions(
        tasks=in_training.TASKS, batch_size=2, seed=0, shuffle=False, lengths="dataset"
    )
    judged = []

    def judge(samples):
        judged.append(samples)
        # Of 5 rows, 0, 1 and 4 pass; the sixth is row 0 again.
        passes = [samples.columns["prompt"][row] in ("dog 0", "dog 1", "dog 4") for row in (0, 1)]
        return {"geneval": np.array(passes, np.float32)}

    report = in_training.evaluate_geneval(
        EvaluationInputs(
            policy=Policy(model.family, model.sizes, model.params, model.processor, np.float32),
            batches=Loader(source, model.processor, options),
            sampling=SamplingOptions(model.processor.special, dtype=np.float32),
            seed=0, judge=judge,
        )
    )  # fmt: skip
    metrics = report.metrics()
    assert {name: metrics[f"eval/draw/{name}"] for name in ("accuracy", *TAGS, "overall")} == {
        "accuracy": 0.6, "single_object": 0.5, "counting": 0.5, "colors": 1.0,
        "overall": pytest.approx(2 / 3),
    }  # fmt: skip
    assert not metrics_page.missing(metrics)
    assert report.passed == [True, True, False, False, True] and report.images.shape[0] == 5
    assert judged[0].columns["geneval"][1]["tag"] == "counting"
    assert report.draw("step 0", 4, 2) is not None


def test_a_process_without_rows_of_a_tag_has_the_rates_of_all(tmp_path):
    def gather(counts):
        return np.concatenate([counts, [[[1, 2], [0, 1], [1, 1]]]])

    inputs = EvaluationInputs(None, [], None, 0, gather=gather)  # type: ignore[arg-type]
    rates = in_training.compute_rates([True], ["counting"], ["counting", "colors"], inputs)
    assert {name: (rate.mean, rate.n) for name, rate in rates.items()} == {
        "draw/accuracy": (pytest.approx(2 / 3), 3), "draw/counting": (0.5, 2),
        "draw/colors": (1.0, 1),
    }  # fmt: skip


def test_lines_that_cannot_be_judged_are_named(tmp_path):
    path = write_metadata(
        tmp_path / "broken.jsonl",
        {"include": [{"class": "unicorn", "count": 1}]}, {}, {"tag": None},
    )  # fmt: skip
    with pytest.raises(InputError) as error:
        in_training.open_rows(str(path), ("geneval",))
    first, second = error.value.problems
    assert first.startswith(f"{path}:1: metadata: include[0]: class is 'unicorn'")
    assert second.startswith(f"{path}:3: ")
