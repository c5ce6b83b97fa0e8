"""The study command from files to files, with a tiny model; and what it does before it runs."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from corl_jax.policies import FAMILIES
from corl_jax.report import __main__ as report
from corl_jax.study import command, page
from corl_jax.study.command import make_environment
from corl_jax.study.results import find_unknown_metrics, read_results
from corl_jax.study.schema import Study, load_study
from corl_jax.study.study_runs import count_completions, resolve_runs
from corl_jax.study.table import make_csv, make_markdown
from corl_jax.train import fit
from tests.support import tiny_runs

SECONDS = 300


def write_run(
    root: Path,
    values: dict[int, float],
    steps: int = 10,
    seconds: float = 5.0,
    rewards: bool = True,
) -> None:
    """The files of a finished run, with an accuracy of its evaluations at some steps."""
    root.mkdir(parents=True)
    lines = [
        {"step": step, "eval/a": value, "eval/a_low": value - 0.1, "eval/a_high": value + 0.1}
        for step, value in values.items()
    ]
    if rewards:
        lines += [{"step": step, "t2i/reward": step / 10} for step in range(1, steps + 1)]
    (root / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (root / "summary.json").write_text(json.dumps({"steps": steps, "seconds": seconds}))


def make_study(folder: Path, **changes) -> Study:
    tree = {
        "output_dir": str(folder), "base": "quickstart", "seeds": [0, 1], "baseline": "b",
        "metrics": {"eval/a": "accuracy", "t2i/reward": {"label": "reward", "steps": 4}},
        "variants": {"a": {"train.max_steps": 0}, "b": {}},
    }  # fmt: skip
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump(tree | changes))
    return load_study(path)


@pytest.fixture
def four_runs(tmp_path):
    """A study whose runs are there: variant a was evaluated only, b trained."""
    write_run(tmp_path / "a" / "seed0", {0: 0.25}, steps=0, rewards=False)
    write_run(tmp_path / "a" / "seed1", {0: 0.5}, steps=0, rewards=False)
    write_run(tmp_path / "b" / "seed0", {0: 0.25, 10: 0.5})
    write_run(tmp_path / "b" / "seed1", {0: 0.5, 10: 0.75}, seconds=7.0)
    return make_study(tmp_path)


def test_the_table_by_hand(four_runs):
    results = read_results(four_runs)
    lines = make_markdown(results).splitlines()
    assert lines[0].startswith("| variant | seeds | accuracy | reward | accuracy, less b |")
    cells = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in lines[2:4]}
    # b: 0.5 and 0.75, s = 0.1768, half width 12.706 * 0.1768 / sqrt(2) = 1.588.
    assert cells["b"][2] == "62.5% (-96.3 to 221.3)"
    # Mean of the rewards of steps 7 to 10; equal seeds have an interval without width.
    assert cells["b"][3] == "0.85 (0.85 - 0.85)" and cells["a"][3] == "–"
    assert cells["a"][4] == "-25.0 (-25.0 to -25.0)" and cells["b"][4] == "–"
    assert cells["b"][-1].startswith("6 s") and cells["a"][-3] == "0"
    assert not results.missing and not find_unknown_metrics(results)


def test_the_numbers_as_csv(four_runs):
    rows = list(csv.DictReader(make_csv(read_results(four_runs)).splitlines()))
    found = {(r["kind"], r["variant"], r["seed"], r["metric"]): r for r in rows}
    assert float(found["run", "b", "1", "eval/a"]["value"]) == 0.75
    assert float(found["run", "b", "1", "seconds"]["value"]) == 7.0
    assert float(found["mean", "b", "", "steps"]["value"]) == 10
    difference = found["difference", "a", "", "eval/a"]
    assert (difference["value"], difference["seeds"]) == ("-0.25", "2")
    assert ("mean", "a", "", "t2i/reward") not in found


def test_costs_include_those_of_the_start(tmp_path):
    study = make_study(tmp_path, variants={"a": {"after": "b"}, "b": {}}, seeds=[0, 1])
    for variant, seconds in (("a", 5.0), ("b", 7.0)):
        write_run(tmp_path / variant / "seed0", {10: 0.5}, seconds=seconds)
    write_run(tmp_path / "a" / "seed1", {10: 0.5})
    results = read_results(study)
    # Of seed 1 the start is missing, so that its cost is not known.
    assert results.list_values("a", "seconds") == {0: 12.0}
    assert results.list_values("a", "steps") == {0: 20.0}
    assert results.list_values("b", "seconds") == {0: 7.0}


def test_the_page_of_a_study_is_written_again(four_runs, tmp_path, capsys):
    page.keep_study(four_runs)
    paths = page.write_results(read_results(four_runs))
    assert [path.name for path in paths] == ["table.md", "table.csv", "figure.svg", "study.html"]
    report.main([str(tmp_path), "--out", str(tmp_path / "again.html")])
    assert (tmp_path / "again.html").read_bytes() == (tmp_path / "study.html").read_bytes()
    text = (tmp_path / "study.html").read_text()
    # One chart of both metrics, and one of each over steps.
    assert 'href="b/seed1/report.html"' in text and text.count("<svg") == 3
    with pytest.raises(SystemExit):
        report.main([str(tmp_path), "--figures", str(tmp_path / "figures")])
    assert "--figures" in capsys.readouterr().err


def test_one_seed_has_no_interval_and_a_missing_run_is_named(four_runs, tmp_path):
    study = make_study(tmp_path, seeds=[0, 5])
    results = read_results(study)
    assert results.missing == ["a/seed5", "b/seed5"]
    text = make_markdown(results)
    assert "| b | 1 of 2 | 50.0% |" in text and "**Missing runs: a/seed5, b/seed5.**" in text
    assert "One seed (0), so there is no interval." in make_markdown(
        read_results(make_study(tmp_path, seeds=[0]))
    )


def test_an_unknown_metric_is_answered_with_the_nearest(four_runs, tmp_path):
    study = make_study(tmp_path, metrics={"t2i/rewrd": "reward"})
    (problem,) = find_unknown_metrics(read_results(study))
    assert problem == "metrics.t2i/rewrd: no finished run has logged it; did you mean t2i/reward?"


def test_completions_are_counted():
    tree = {"stage": "rl", "algorithm": {"tasks": "unified"}, "rollout": {"group_size": 8},
            "train": {"prompts_per_step": 32}}  # fmt: skip
    assert count_completions(tree, 60) == 60 * 32 * 8 * 2
    assert count_completions(tree | {"algorithm": {"tasks": "t2i"}}, 60) == 60 * 32 * 8
    alternating = {"tasks": "unified", "alternate_every": 1}
    assert count_completions(tree | {"algorithm": alternating}, 60) == 60 * 32 * 8
    assert count_completions(tree | {"stage": "sft"}, 60) == 0
    # ReMax samples a greedy completion of each prompt too.
    remax = {"tasks": "t2i", "name": "remax"}
    assert count_completions(tree | {"algorithm": remax}, 60) == 60 * 32 * 9


def test_groups_that_were_drawn_again_are_counted(tmp_path):
    study = make_study(tmp_path, seeds=[0], variants={"b": {}})
    root = tmp_path / "b" / "seed0"
    write_run(root, {4: 0.5}, steps=4)
    tree = {"stage": "rl", "algorithm": {"tasks": "t2i"}, "rollout": {"group_size": 8},
            "train": {"prompts_per_step": 2}}  # fmt: skip
    (root / "config.yaml").write_text(yaml.safe_dump(tree))
    assert read_results(study).list_values("b", "completions") == {0: 4 * 16}
    with (root / "metrics.jsonl").open("a") as file:
        for step, batches in enumerate((0, 3, 1, 2), start=1):
            file.write(json.dumps({"step": step, "redraw/batches": batches}) + "\n")
    assert read_results(study).list_values("b", "completions") == {0: (4 + 6) * 16}


def test_time_is_estimated_from_finished_runs(four_runs, tmp_path):
    results = read_results(four_runs)
    assert command.estimate_seconds(results, "b", 100) == 6.0
    assert command.estimate_seconds(results, "new", 100) is None  # no run has completions
    for seed in (0, 1):
        tree = {"stage": "rl", "algorithm": {"tasks": "t2i"}, "rollout": {"group_size": 2},
                "train": {"prompts_per_step": 4}}  # fmt: skip
        (tmp_path / "b" / f"seed{seed}" / "config.yaml").write_text(yaml.safe_dump(tree))
    # Two runs of 80 completions took 5 and 7 s: 12 s for 160.
    results = read_results(four_runs)
    assert command.estimate_seconds(results, "new", 40) == 3.0
    assert command.estimate_seconds(results, "new", 0) is None
    assert command.describe_seconds([6.0, None]).startswith("about 6 s one after the other")
    assert command.describe_seconds([None]).startswith("time unknown")


def test_runs_share_the_devices():
    environment = make_environment(2, 4, ["1", "3"])
    assert environment["CUDA_VISIBLE_DEVICES"] == "1"
    assert environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.450"
    alone = make_environment(0, 1, [])
    assert alone == dict(os.environ)


def test_a_run_with_another_config_is_refused_before_anything_runs(tmp_path):
    study = make_study(tmp_path)
    runs = resolve_runs(study)
    path = tmp_path / "b" / "seed0" / "config.yaml"
    path.parent.mkdir(parents=True)
    tree = runs["b/seed0"].config.model_dump(mode="json")
    path.write_text(yaml.safe_dump(tree))
    command.check_finished_runs(runs)
    path.write_text(yaml.safe_dump(tree | {"seed": 4}))
    with pytest.raises(ValueError, match="seed: found 0, the run has 4"):
        command.check_finished_runs(runs)


def test_a_run_may_have_the_guidance_of_its_model(tmp_path):
    """A run writes it where the study states none; a study that states another is refused."""
    runs = resolve_runs(make_study(tmp_path, overrides={"rollout.cfg_scale": None}))
    planned = fit.choose_guidance(runs["b/seed0"].config, FAMILIES["janus"])
    path = tmp_path / "b" / "seed0" / "config.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(yaml.safe_dump(planned.model_dump(mode="json")))
    command.check_finished_runs(runs)
    runs = resolve_runs(make_study(tmp_path, overrides={"rollout.cfg_scale": 3.0}))
    with pytest.raises(ValueError, match=r"cfg_scale: found 3\.0, the run has 5\.0"):
        command.check_finished_runs(runs)


# ---- real runs


def run_study(path: Path, *words: str) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", "corl_jax", "study", str(path), *words]
    return subprocess.run(line, capture_output=True, text=True, timeout=SECONDS)


def steady(line: dict) -> dict:
    return {key: value for key, value in line.items() if "second" not in key}


@pytest.mark.slow
def test_a_study_is_stopped_continued_and_complete(model, rows, tmp_path):
    folder = tmp_path / "study"
    tree = tiny_runs.options(
        model, rows, tmp_path / "unused",
        eval={"suite": "rewards", "rows": 6, "batch_prompts": 4}, log={"images_every": 0},
        export={"layout": "jax", "dtype": "float32"},
    )  # fmt: skip
    tiny_runs.write_config(tmp_path / "base.yaml", tree)
    study = {
        "output_dir": str(folder), "base": "base.yaml", "seeds": [0, 1], "baseline": "unified",
        "metrics": {"eval/t2i/t2i_pixel_mse": "drawing", "eval/mm2t/format": "answers"},
        "variants": {
            "base": {"train.max_steps": 0}, "refined": {"after": "unified"}, "unified": None,
            "broken": {"model.path": str(tmp_path / "nowhere")},
        },
    }  # fmt: skip
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(study, sort_keys=False))

    process = subprocess.Popen([sys.executable, "-m", "corl_jax", "study", str(path)])
    until = time.monotonic() + SECONDS
    while not (folder / "unified" / "seed0" / "metrics.jsonl").exists():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(SECONDS) == 75
    assert "Missing runs" in (folder / "table.md").read_text()

    done = run_study(path, "--jobs", "2")
    assert done.returncode == 1
    assert "FAILED   broken/seed1: exit code 2, see" in done.stderr
    assert "nowhere" in (folder / "logs" / "broken_seed1.log").read_text()
    assert "missing runs: broken/seed0, broken/seed1" in done.stderr

    del study["variants"]["broken"]
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    done = run_study(path)
    assert done.returncode == 0 and "0 processes" in done.stderr, done.stderr
    for name in ("table.md", "table.csv", "figure.svg", "study.html"):
        assert str(folder / name) in done.stdout and (folder / name).stat().st_size
    # A model that is evaluated alone has the numbers of a training's evaluation at step 0.
    for seed in (0, 1):
        alone, first = (
            tiny_runs.metric_lines(folder / variant / f"seed{seed}")[0]
            for variant in ("base", "unified")
        )
        assert steady(alone) == steady(first) and len(steady(alone)) > 4
    assert 'href="unified/seed0/report.html"' in (folder / "study.html").read_text()

    # A run without its results is repeated alone, and what starts from its export is compared.
    (folder / "base" / "seed1" / "summary.json").unlink()
    assert re.search(r"base/seed1 +to do", run_study(path, "--dry-run").stdout)
    assert "start    base/seed1" in (done := run_study(path)).stderr
    assert done.returncode == 0 and done.stderr.count("start    ") == 1
