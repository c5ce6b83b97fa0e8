"""Study files: what is refused, with all problems together, and what becomes of each variant."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from corl_jax.config.shipped import find_study, list_studies
from corl_jax.errors import InputError
from corl_jax.study import __main__ as command
from corl_jax.study.schema import dump_study, load_study
from corl_jax.study.study_runs import list_jobs, list_warnings, order_variants, resolve_runs

TREE: dict[str, Any] = {
    "output_dir": "runs/x",
    "base": "quickstart",
    "overrides": {"model.path": "nano", "train.max_steps": 6},
    "seeds": [0, 1],
    "baseline": "unified",
    "metrics": {"eval/draw/accuracy": "drawing", "t2i/reward": {"label": "reward", "steps": 3}},
    "variants": {
        "refined": {"after": "unified", "optimizer": {"learning_rate": 1e-5}},
        "base": {"train.max_steps": 0},
        "t2i": {"algorithm.tasks": "t2i"},
        "merge": {"merge": {"models": ["t2i", "unified"], "rule": "mean", "params": "lm_head/.*"}},
        "unified": None,
    },
}


def write_study(folder: Path, **changes: Any) -> Path:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(copy.deepcopy(TREE) | changes, sort_keys=False))
    return path


def find_problems(folder: Path, **changes: Any) -> list[str]:
    with pytest.raises(InputError) as raised:
        resolve_runs(load_study(write_study(folder, **changes)))
    return raised.value.problems


def test_each_variant_becomes_a_run_per_seed(tmp_path):
    study = load_study(write_study(tmp_path))
    assert order_variants(study) == ["unified", "refined", "base", "t2i", "merge"]
    runs = resolve_runs(study)
    assert len(runs) == 10
    refined = runs["refined/seed1"].config
    assert refined.model.path == "runs/x/unified/seed1/export"
    assert (refined.seed, refined.output_dir) == (1, "runs/x/refined/seed1")
    # The block of the variant is merged into the block of the base, which has b2 too.
    assert (refined.optimizer.learning_rate, refined.optimizer.b2) == (1e-5, 0.98)
    base, merge = runs["base/seed0"].config, runs["merge/seed0"].config
    assert (base.train.max_steps, base.export.layout, base.model.path) == (0, "none", "nano")
    assert (merge.train.max_steps, merge.model.path) == (0, "runs/x/merge/merged_seed0")
    assert runs["t2i/seed0"].config.algorithm.tasks == "t2i"


def test_a_rounded_start_is_warned_of(tmp_path):
    study = load_study(write_study(tmp_path), ["export.dtype=bfloat16"])
    (first, second) = list_warnings(study, resolve_runs(study))
    assert "variants.t2i: export.dtype is bfloat16" in first and "variants.unified" in second
    study = load_study(write_study(tmp_path))  # whose base exports float32
    assert not [*list_warnings(study, resolve_runs(study))]


def test_jobs_wait_for_their_models(tmp_path):
    study = load_study(write_study(tmp_path, prepare={"runs/rows": "data --rows 4"}))
    jobs = {job.name: job for job in list_jobs(study, resolve_runs(study))}
    assert jobs["runs/rows"].command[-5:] == ["data", "--rows", "4", "--out", "runs/rows"]
    assert jobs["t2i/seed1"].after == ("runs/rows",)
    assert jobs["refined/seed1"].after == ("runs/rows", "unified/seed1")
    merging = jobs["merge/seed1/merge"]
    assert merging.after == ("runs/rows", "t2i/seed1", "unified/seed1")
    assert " ".join(merging.command).endswith(
        "merge --base nano --models runs/x/t2i/seed1/export runs/x/unified/seed1/export "
        "--out runs/x/merge/merged_seed1 --dtype float32 --rule=mean --params=lm_head/.*"
    )
    assert jobs["merge/seed1"].after == ("runs/rows", "merge/seed1/merge")
    names = list(jobs)
    for job in jobs.values():
        assert all(names.index(name) < names.index(job.name) for name in job.after)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"seed": [1]}, "seed: unknown key; did you mean seeds?"),
        ({"seeds": []}, "seeds: found []"),
        ({"seeds": [1, 1]}, "expected different numbers"),
        ({"baseline": "unifed"}, "baseline: no variant 'unifed'; did you mean unified?"),
        ({"metrics": {"reward": {"labl": "x"}}},
         "metrics.reward.labl: unknown key; did you mean label?"),
        ({"base": "quickstar"}, "base: config: found 'quickstar'"),
        ({"overrides": {"seed": 3}}, "overrides.seed: each run has its own"),
        ({"overrides": {"train.max_stps": 3}}, "did you mean train.max_steps?"),
        ({"prepare": {"x": "data --out y"}}, "prepare.x: found 'data --out y'"),
        ({"variants": {"a/b": {}}, "baseline": None}, "variants.a/b: not a name of a folder"),
        ({"variants": {"logs": {}}, "baseline": None}, "variants.logs: not a name of a folder"),
        ({"variants": {"unified": {"output_dir": "x"}}}, "variants.unified.output_dir: each run"),
        ({"variants": {"unified": {"after": "bse"}}}, "variants.unified.after: no variant 'bse'"),
        ({"variants": {"unified": {"merge": {"models": ["unified"]}}}}, "at least 2 items"),
        ({"variants": {"unified": {"algorithm.task": "t2i"}}}, "did you mean algorithm.tasks?"),
        ({"variants": {"unified": {"train.max_steps": "many"}}},
         "variants.unified: train.max_steps: found 'many'"),
        ({"variants": {"a": {"after": "b"}, "b": {"after": "a"}}, "baseline": None},
         "variants: a -> b -> a: each waits for the next"),
        ({"variants": {"unified": {"export.layout": "none"}, "b": {"after": "unified"}}},
         "variants.unified: export.layout: found none, but b starts from its export"),
        ({"variants": {"unified": {}, "b": {"after": "unified", "model.path": "x"}}},
         "variants.b.model.path: contradicts"),
        ({"variants": {"unified": {}, "b": {"model.path": "mini"},
                       "c": {"merge": {"models": ["unified", "b"]}}}},
         "merge.models: found models that start from different ones: unified from nano, b from "),
        ({"variants": {"unified": {"lora.rank": 4, "export.lora": "adapter",
                                   "export.layout": "transformers"}, "b": {"after": "unified"}}},
         "variants.unified: export.lora: found adapter, but b starts from its export"),
        ({"overrides": [1]}, "overrides: found [1]; expected a mapping"),
        ({"prepare": {"x": "data 'a"}}, "prepare.x: found \"data 'a\" (No closing quotation)"),
        ({"prepare": {"x": "data --out=y"}}, "prepare.x: found 'data --out=y'; expected a command"),
        ({"output_dir": "gs://a/b"}, "output_dir: found 'gs://a/b'; expected a directory"),
        ({"variants": {"unified": {}, "b": {"merge": {"models": ["unified"] * 2,
                                                      "factor": float("inf")}}}},
         "variants.b.merge.factor: found inf"),
    ],
)  # fmt: skip
def test_a_wrong_study_is_refused(changes, part, tmp_path):
    problems = find_problems(tmp_path, **changes)
    assert any(part in problem for problem in problems), problems


@pytest.mark.parametrize(
    ("merge", "line"),
    [
        ({"rule": "gausian"}, "variants.both.merge.rule: found 'gausian'; did you mean gaussian? "
         "(known: gaussian, mean, sum, ties)"),
        ({"models": ["t2i", "unified", "base"]},
         "variants.both.merge.models: found 3, but the rule gaussian merges 2; choose another rule "
         "or other models"),
        ({"params": "("}, "variants.both.merge.params: found '(', no regular expression: missing "
         "), unterminated subpattern at position 0; correct it"),
    ],
)  # fmt: skip
def test_merges_that_would_fail_after_the_trainings_are_refused(merge, line, tmp_path, capsys):
    tree = {"merge": {"models": ["t2i", "unified"]} | merge}
    path = write_study(tmp_path, variants=TREE["variants"] | {"both": tree})
    with pytest.raises(SystemExit) as error:
        command.main([str(path), "--dry-run"])
    assert error.value.code == 2 and f"error: {line}\n" in capsys.readouterr().err


def test_all_problems_come_together(tmp_path):
    variants = {"unified": {"algorithm.task": "t2i"}, "b": {"seeed": 1}}
    problems = find_problems(tmp_path, variants=variants)
    # One line for each, not one for each seed.
    assert [problem.partition(":")[0] for problem in problems] == ["variants.unified", "variants.b"]
    found = find_problems(tmp_path, baseline="x", seeds=[2, 2])
    assert len(found) == 2 and all(str(tmp_path) in problem for problem in found)


def test_words_of_the_command_line(tmp_path):
    path = write_study(tmp_path)
    study = load_study(path, ["seeds=[7]", "train.max_steps=2", "--log.every=1"])
    assert study.seeds == [7]
    config = resolve_runs(study)["unified/seed7"].config
    assert (config.train.max_steps, config.log.every, config.model.path) == (2, 1, "nano")
    with pytest.raises(InputError, match="found 'seeds', expected key=value"):
        load_study(path, ["seeds"])


def test_a_study_is_read_back_as_it_was_written(tmp_path):
    study = load_study(write_study(tmp_path))
    (tmp_path / "again.yaml").write_text(dump_study(study))
    assert load_study(tmp_path / "again.yaml") == study


def test_a_base_beside_the_study(tmp_path):
    (tmp_path / "own.yaml").write_text("base: quickstart\nlog: {every: 3}\n")
    study = load_study(write_study(tmp_path, base="own.yaml"))
    assert resolve_runs(study)["unified/seed0"].config.log.every == 3


@pytest.mark.parametrize("name", list_studies())
def test_shipped_studies_resolve(name):
    path = find_study(name)
    study = load_study(path)
    runs = resolve_runs(study)
    assert len(runs) == len(study.seeds) * len(study.variants) and study.baseline
    # The name of the folder is that of the study, and what is trained on is made before.
    assert study.output_dir == f"runs/{name}"
    assert {run.config.data.path for run in runs.values()} <= study.prepare.keys()
    assert {run.config.eval.path for run in runs.values()} <= study.prepare.keys()
    assert not [*list_warnings(study, runs)]
    head = path.read_text()
    assert re.search(rf"^# Command:  corl-jax study {name}( |\n)", head, re.MULTILINE)


def test_shipped_studies_make_the_same_data_in_the_same_folder():
    """A folder that is there is not made again, so another study's rows would be taken."""
    found = {}
    for name in list_studies():
        for path, words in load_study(find_study(name)).prepare.items():
            assert found.setdefault(path, words) == words, (name, path)
