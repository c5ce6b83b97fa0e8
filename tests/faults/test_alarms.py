"""An alarm in the train command: said and logged, or the end before anything more is saved."""

from __future__ import annotations

import dataclasses

import pytest

from corl_jax.evaluation import SUITES
from corl_jax.evaluation.rewards import RewardsReport
from tests.faults.harness import Job
from tests.support import tiny_runs

REWARDS = """
calls = 0

def rising(texts):
    global calls
    calls += 1
    return [calls + len(text) / 100 for text in texts]
"""
LIMITS = {"kl": 1e-12, "held_out": 1.0}  # that step 2 is over, and step 1 is not


@pytest.fixture
def job(model, rows, tmp_path, one_device, monkeypatch, request):
    name = request.param
    (tmp_path / "mine.py").write_text(REWARDS)
    scores = iter(range(100, 0, -1))

    def falling(*args):
        return RewardsReport({"eval/mm2t/score": (float(next(scores)), 0.01)})

    monkeypatch.setitem(SUITES, "rewards", dataclasses.replace(SUITES["rewards"], evaluate=falling))
    changes = {
        "rewards": [{"use": f"{tmp_path / 'mine.py'}:rising"}],
        "algorithm": {"tasks": "mm2t", "kl_coef": 0.1},
        "guards": {name: LIMITS[name], "fatal": [name]},
        "train": {"max_steps": 3, "prompts_per_step": 2},
    }
    if name == "held_out":
        changes["eval"] = {"suite": "rewards", "rows": 2, "batch_prompts": 2, "every": 1}
    return Job.make(tmp_path, model, rows, **changes)


@pytest.mark.slow
@pytest.mark.parametrize(("job", "name"), [(n, n) for n in LIMITS], indirect=["job"])
def test_a_fatal_alarm_ends_the_run_and_one_that_is_not_is_logged(job, name, capsys, figure):
    code, text = job.here(), capsys.readouterr().err
    assert code == 3 and f"error: alarm {name} at step 2: " in text, text
    assert "guards.fatal lists it" in text
    assert job.steps() == [1]  # each step is saved, but for the one that the alarm is about
    lines = tiny_runs.metric_lines(job.output)
    flags = [line[f"alarm/{name}"] for line in lines if f"alarm/{name}" in line]
    assert (flags[-2:], lines[-1]["step"]) == ([0, 1], 2)

    code, text = job.here("guards.fatal=[]"), capsys.readouterr().err
    assert code == 0 and job.steps() == [2, 3], text
    assert text.count(f"alarm {name} at step ") == 1 and "error" not in text
    lines = tiny_runs.metric_lines(job.output)
    assert [line[f"alarm/{name}"] for line in lines if f"alarm/{name}" in line][-1] == 1
    figure("alarms", fault=f"{name}: fatal, and not", tries=2, losses=0)
