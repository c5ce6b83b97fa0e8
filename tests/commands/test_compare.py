"""`corl-jax compare`: pairs of units by hand, and folders that are no pairs."""

from __future__ import annotations

import json

import numpy as np
import pytest

from corl_jax.compare.__main__ import main
from corl_jax.errors import InputError
from corl_jax.evaluation.comparison import compare_units
from corl_jax.evaluation.units import Unit, format_units, read_units


def write_folder(folder, units, **settings):
    folder.mkdir()
    report = {"settings": {"suite": "geneval-score", "seed": 20, **settings}}
    (folder / "report.json").write_text(json.dumps(report))
    (folder / "scores.jsonl").write_text(format_units(units))
    return folder


def make_units(values, category="colors", metric="correct", start=0):
    return [
        Unit(f"{number:05}", category, {metric: float(value)})
        for number, value in enumerate(values, start)
    ]


def compare(*arguments):
    main([str(argument) for argument in arguments])


def refuse(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        compare(*arguments)
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_rows_by_hand():
    first = make_units([0, 0, 1, 1]) + make_units([0.5, 0.5], "position", start=4)
    second = make_units([1, 0, 1, 1]) + make_units([0.5, 1.0], "position", start=4)
    # The order of the units of B does not matter.
    rows = {row.category: row for row in compare_units(first, second[::-1])}
    assert {name: row.units for name, row in rows.items()} == {
        "colors": 4, "position": 2, "mean of categories": 6, "all units": 6,
    }  # fmt: skip
    differences = {name: row.result.difference for name, row in rows.items()}
    assert differences == pytest.approx({
        "colors": 0.25, "position": 0.25, "mean of categories": 0.25, "all units": 0.25,
    })  # fmt: skip
    assert rows["mean of categories"].result.first == 0.5
    assert rows["all units"].result.second == pytest.approx(4.5 / 6)
    # No unit is worse: the mean of 4 draws of (1, 0, 0, 0) is at most 0 with (3/4)^4.
    assert rows["colors"].result.p_value == pytest.approx(2 * 0.75**4, abs=0.02)
    assert rows["colors"].result.low == 0


def test_equal_numbers_of_units_have_one_mean():
    units = make_units([0, 1]) + make_units([1, 1], "position", start=2)
    assert [row.category for row in compare_units(units, units)] == [
        "colors", "position", "all units",
    ]  # fmt: skip
    assert [row.category for row in compare_units(units[:2], units[:2])] == ["colors"]


def test_weights_of_the_suite():
    first = make_units([0, 0]) + make_units([0], "position", start=2)
    second = make_units([1, 0]) + make_units([1], "position", start=2)
    row = compare_units(first, second, weights={"colors": 0.4, "position": 0.1})[-1]
    assert row.category == "weighted mean" and row.result.difference == pytest.approx(0.3)
    # A category is missing, so there is no overall score.
    rows = compare_units(first[:2], second[:2], weights={"colors": 0.4, "position": 0.1})
    assert [row.category for row in rows] == ["colors"]


def test_a_metric_may_apply_to_some_units_alone():
    units = [Unit("a", "c", {"x": 1.0, "y": 0.0}), Unit("b", "c", {"x": 0.0})]
    rows = compare_units(units, units)
    assert [(row.metric, row.units) for row in rows] == [("x", 2), ("y", 1)]


def test_the_command(tmp_path, capsys):
    rng = np.random.default_rng(0)
    values = rng.integers(0, 5, 60) / 4
    better = np.minimum(values + 0.25, 1)
    a = write_folder(tmp_path / "a", make_units(values), model="old", cfg_scale=5)
    b = write_folder(tmp_path / "b", make_units(better), model="new", cfg_scale=5)
    compare(a, b)
    printed = capsys.readouterr()
    line = next(line for line in printed.out.splitlines() if line.startswith("correct: colors"))
    assert f"{np.mean(better) - np.mean(values):+.4f}" in line and "60" in line
    assert printed.err == "note: model: A old, B new\n"
    compare(a, b, "--json", "--draws", 500)
    report = json.loads(capsys.readouterr().out)
    (score,) = report["scores"]
    assert score["low"] > 0 and score["p_value"] == pytest.approx(2 / 501)
    assert report["different_settings"] == {"model": ["old", "new"]}
    compare(a, a, "--json")
    (score,) = json.loads(capsys.readouterr().out)["scores"]
    assert score["difference"] == 0 and score["p_value"] == 1


def test_folders_that_are_no_pairs(tmp_path, capsys):
    a = write_folder(tmp_path / "a", make_units([0, 1, 1]))
    shorter = write_folder(tmp_path / "short", make_units([0]) + make_units([1], start=7))
    printed = refuse(capsys, a, shorter)
    assert "A lacks 1 of the 2 units of the other: '00007'" in printed
    assert "B lacks 2 of the 3 units of the other: '00001', '00002'" in printed
    other = write_folder(tmp_path / "other", make_units([0, 1, 1]), suite="shapes", seed=21)
    printed = refuse(capsys, a, other)
    assert "setting suite: A has geneval-score, B has shapes" in printed
    assert "setting seed" not in printed  # other suites have other settings
    other = write_folder(tmp_path / "reseeded", make_units([0, 1, 1]), seed=21)
    assert "setting seed: A has 20, B has 21" in refuse(capsys, a, other)
    judged = write_folder(tmp_path / "judged", make_units([0, 1, 1]), judge="qwen")
    assert "setting judge: A has None, B has qwen" in refuse(capsys, a, judged)
    moved = write_folder(tmp_path / "moved", make_units([0, 1, 1], "position", "score"))
    printed = refuse(capsys, a, moved)
    assert "3 units have another category in B than in A, such as 00000 with colors" in printed
    assert "3 units have other metrics" in printed
    empty = tmp_path / "empty"
    empty.mkdir()
    printed = refuse(capsys, a, empty)
    assert "report.json: cannot be read" in printed and "scores.jsonl: cannot be read" in printed


def test_prompts_with_any_characters_are_read_again(tmp_path):
    units = [Unit("a\u2028b\x85c\nd", "é", {"x": 0.5}), Unit("", "", {})]
    assert read_units(write_folder(tmp_path / "a", units)) == units
    (tmp_path / "a" / "scores.jsonl").write_text("")
    with pytest.raises(InputError, match="is empty"):
        read_units(tmp_path / "a")


@pytest.mark.parametrize(
    "line",
    [
        '{"unit": "a", "category": "c", "values": {"m": 1%s}}' % ("0" * 400),
        "[" * 100_000,
        r'{"unit": "\ud800", "category": "c", "values": {"m": 1}}',
        '{"unit": "a", "category": "c", "values": {}}',
    ],
    ids=("a number beyond floats", "nested deeply", "half of a character", "no scores"),
)
def test_a_hostile_line_is_refused_with_its_file(capsys, tmp_path, line):
    folder = write_folder(tmp_path / "a", make_units([0, 1]))
    (folder / "scores.jsonl").write_text(line + "\n")
    assert "a/scores.jsonl" in refuse(capsys, folder, folder)


@pytest.mark.parametrize(
    "weights", ["x", [1], {"colors": "x"}, {"colors": None}, {"colors": 1e999}]
)
def test_category_weights_are_numbers(capsys, tmp_path, weights):
    folder = write_folder(tmp_path / "a", make_units([0, 1]))
    report = json.loads((folder / "report.json").read_text()) | {"category_weights": weights}
    (folder / "report.json").write_text(json.dumps(report))
    assert "a/report.json: category_weights is " in refuse(capsys, folder, folder)
