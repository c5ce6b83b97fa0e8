"""Charts, changes, groups, options and figures of a report, by hand."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as xml

import numpy as np
import pytest
from PIL import Image

from corl_jax.errors import InputError
from corl_jax.estimates import Estimate, read_estimate
from corl_jax.evaluation.intervals import Rate
from corl_jax.report.changes import compare
from corl_jax.report.charts import (
    COLORS,
    WIDTH,
    Cross,
    Line,
    choose_ticks,
    draw_crosses,
    draw_lines,
    draw_parts,
    draw_path,
    format_tick,
    is_overlapping,
    place_names,
    smooth,
    thin_out,
)
from corl_jax.report.curves import estimate_band, pair_steps
from corl_jax.report.figures import choose_tiles, draw_before_after, wrap_caption, write_figures
from corl_jax.report.groups import read_groups
from corl_jax.report.options import list_defaults, list_options
from corl_jax.report.read import read_run, read_runs
from corl_jax.runs.pictures import Tile, load_font
from tests.support import report_runs


def test_a_difference_of_rates_by_hand():
    """Newcombe's example: 56/70 against 48/80, Wilson intervals, method 10."""
    rates = (Rate.of(48, 80), Rate.of(56, 70))
    first, last = (Estimate(rate.mean, rate.low, rate.high, True) for rate in rates)
    change = compare(first, last)
    assert change.difference == pytest.approx(0.2)
    assert [change.low, change.high] == pytest.approx([0.0524, 0.3339], abs=1e-4)
    assert change.verdict == "better" and compare(last, first).verdict == "worse"
    assert compare(first, first).verdict == "same"


def test_estimates_are_read_with_their_intervals():
    line = {"a": 0.5, "a_low": 0.4, "a_high": 0.7, "b": 2.0, "b_stderr": 0.5, "c": 1, "d": None,
            "e": math.nan, "f": "x"}  # fmt: skip
    assert read_estimate(line, "a") == Estimate(0.5, 0.4, 0.7, True)
    mean = read_estimate(line, "b")
    assert [mean.low, mean.high] == pytest.approx([1.02, 2.98], abs=1e-4) and not mean.is_rate
    assert read_estimate(line, "c") == Estimate(1.0, 1.0, 1.0, False)
    assert [read_estimate(line, name) for name in "defg"] == [None] * 4
    assert read_estimate(line, "a").format() == "50.0% (40.0 - 70.0)"
    assert mean.format() == "2 (1.02 - 2.98)"
    assert read_estimate(line, "c").format() == "1"
    assert Estimate(-0.5, -0.7, -0.3, False).format() == "-0.5 (-0.7 to -0.3)"


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 1, [0, 0.25, 0.5, 0.75, 1]), (-3, 7, [-2.5, 0, 2.5, 5]), (0, 100, [0, 25, 50, 75, 100]),
        (0.9921, 1.0006, [0.9925, 0.995, 0.9975, 1]), (5, 5, [5]),
    ],
)  # fmt: skip
def test_ticks_are_round(low, high, ticks):
    assert choose_ticks(low, high) == ticks


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.25, "0.25"),
        (2e-6, "2e-06"),
        (1500, "1500"),
        (25000, "25k"),
        (3.2e6, "3.2M"),
        (-2e9, "-2G"),
    ],
)
def test_ticks_are_short(value, text):
    assert format_tick(value) == text


def test_long_lines_are_thinned_and_smoothed():
    points = [(step, float(step % 2)) for step in range(1001)]
    thin = thin_out(points)
    assert len(thin) == 400 and (thin[0], thin[-1]) == (points[0], points[-1])
    assert smooth(points, 3)[1:3] == [(1, pytest.approx(1 / 3)), (2, pytest.approx(2 / 3))]
    assert smooth(points[:1], 3) == points[:1]


@pytest.mark.parametrize(
    "points",
    [[], [(3, 1.0)], [(0, 0.0), (9, 0.0)], [(0, -1e9), (9, 1e9)], [(0, 1e-12), (1, 2e-12)]],
)
def test_a_chart_is_well_formed_and_inside_of_its_frame(points):
    lines = [
        Line("a <&\x00\ud83d", points, [(x, y - 1, y + 1) for x, y in points]),
        Line("b", points),
    ]
    path = [(step, y, 0.5) for step, y in points]
    for svg in (
        draw_lines("t & <b>", lines),
        draw_lines("t", lines, is_rate=True),
        draw_path("t", [("a", path)], "x", "y"),
    ):
        root = xml.fromstring(svg)
        assert "nan" not in svg
        width, height = map(float, root.get("viewBox").split()[2:])
        for line in root.iter("{http://www.w3.org/2000/svg}polyline"):
            for place in line.get("points").split():
                x, y = map(float, place.split(","))
                assert 0 <= x <= width and 0 <= y <= height


def test_a_run_keeps_its_color_in_charts_where_others_are_missing():
    svg = draw_lines("t", [Line("first", []), Line("second", [(0, 1.0), (1, 2.0)])])
    assert COLORS[1] in svg and COLORS[0] not in svg
    assert "second" in svg and "first" not in svg


def test_parts_add_up_to_the_bar():
    root = xml.fromstring(draw_parts([("a", 1.0), ("b", 3.0)], "{:g} s".format))
    first, second = (
        part for part in root.iter("{http://www.w3.org/2000/svg}rect") if part.get("height") == "26"
    )
    assert float(second.get("width")) + 1 == pytest.approx(3 * (float(first.get("width")) + 1))
    assert "3 s, 75%" in "".join(root.itertext())
    xml.fromstring(draw_parts([("a", 0.0)], str))


def test_names_of_points_do_not_lie_on_each_other():
    """Three points close together: their names stand on different sides."""
    points, widths = [(100.0, 100.0), (104.0, 103.0), (97.0, 96.0)], [60.0, 60.0, 60.0]
    places = place_names(points, widths)
    boxes = [(x, y - 13, x + 60, y) for x, y in places]
    pairs = [(a, b) for at, a in enumerate(boxes) for b in boxes[at + 1 :]]
    assert len(pairs) == 3 and not any(is_overlapping(a, b) for a, b in pairs)
    # A point alone has its name above, to the right.
    assert place_names([(10.0, 50.0)], [20.0]) == [(17.0, 44.0)]


def test_the_name_of_a_point_at_the_edge_stays_in_the_chart():
    ((x, _),) = place_names([(WIDTH - 30.0, 50.0)], [60.0])
    assert x + 60 <= WIDTH - 30


def test_a_cross_reaches_from_end_to_end():
    """Ends in pixels increase with x and decrease with y, around the point."""
    cross = Cross("a<b", (0.1, 0.2, 0.4), (0.5, 0.6, 0.7))
    svg = draw_crosses("t", [cross, Cross("c", (0, 0, 0), (1, 1, 1))], "x", "y", True)
    root = xml.fromstring(svg)
    path = next(e for e in root.iter() if e.tag.endswith("path")).get("d")
    left, y, right, x, low, high = map(float, re.findall(r"[\d.]+", path))
    assert left < x < right and high < y < low
    assert (x - left) / (right - x) == pytest.approx(0.5, rel=0.02)
    texts = [e.text for e in root.iter() if e.tag.endswith("text")]
    assert "a<b" in texts and "60%" in texts


def test_rewards_are_paired_with_evaluations(tmp_path):
    lines = [report_runs.evaluation_line(0, 0.1, 0.1), report_runs.training_line(2),
             report_runs.evaluation_line(3, 0.2, 0.1), report_runs.training_line(4),
             report_runs.evaluation_line(4, 0.3, 0.1)]  # fmt: skip
    report_runs.write_lines(tmp_path, lines)
    record = read_run(tmp_path, "x")
    steps = pair_steps(record, "t2i/reward", "eval/draw/accuracy")
    assert [(s.step, round(s.reward, 9), s.accuracy.mean) for s in steps] == [
        (0, 0.2, 0.1), (3, 0.2, 0.2), (4, 0.4, 0.3)
    ]  # fmt: skip
    assert pair_steps(record, "nothing", "eval/draw/accuracy") == []


def test_rewards_have_the_interval_of_their_mean(tmp_path):
    report_runs.write_config(tmp_path)
    report_runs.write_lines(tmp_path, [report_runs.training_line(2), {"step": 3, "t2i/reward": 1}])
    record = read_run(tmp_path, "x")
    # 4 prompts: 1.96 * 0.2 / 2; step 3 has no standard deviation.
    assert estimate_band(record, "t2i/reward") == [
        (2, pytest.approx(0.004, abs=1e-5), pytest.approx(0.396, abs=1e-5))
    ]
    assert estimate_band(record, "mm2t/reward") == estimate_band(record, "loss") == []


def test_few_groups_are_not_shown_twice(tmp_path):
    report_runs.write_samples(tmp_path, 1, rows=3, group=12)
    notes: list[str] = []
    images, texts = read_groups(tmp_path, notes)
    assert not notes and images.step == 1
    assert [group.prompt[-5] for group in images.best + images.worst] == ["2", "0"]
    (best,) = images.best
    assert len(best.completions) == 8 and best.left_out == 4
    rewards = [completion.reward for completion in best.completions]
    assert rewards == sorted(rewards, reverse=True)
    assert all(c.uri.startswith("data:image/png") and c.text is None for c in best.completions)
    assert texts.best[0].uri.startswith("data:image/png")
    assert all(c.uri is None for c in texts.best[0].completions)


def test_options_have_their_defaults():
    defaults = dict(list_defaults())
    assert defaults["algorithm.name"] == "grpo" and "model.path" not in defaults
    first = {"algorithm": {"name": "grpo", "unknown": 1}, "model": {"path": "a"}}
    rows = {row.key: row for row in list_options([first, {"algorithm": {"name": "rloo"}}])}
    assert rows["algorithm.name"].values == ["grpo", "rloo"] and rows["algorithm.name"].varies
    assert (
        rows["model.path"].values == ["a", "not set"] and rows["model.path"].default == "required"
    )
    assert rows["algorithm.unknown"].differs
    assert not list_options([{"algorithm": {"name": "grpo"}}])[0].differs


# ---- figures


def test_the_figure_shows_before_and_after(tmp_path):
    run = report_runs.write_run(tmp_path / "run")
    pixels = draw_before_after(run)
    assert pixels.shape[1] == 2 * 880
    # The frames of the left half are red but for the last image, those of the right half green.
    line = pixels[pixels.shape[0] // 2 - 60]
    starts = [20 + at * 210 + side for side in (0, 900) for at in range(4)]
    colors = [tuple(line[x + 1]) for x in starts]
    red, green = (179, 38, 30), (20, 120, 58)
    assert colors == [red] * 3 + [green] + [green] * 4


def tile(caption: str, passed: bool) -> Tile:
    return Tile((0, 0, 8, 8), 1, 0, caption, passed, {})


def test_the_figure_has_as_many_right_images_as_all():
    """40 prompts: 10 stay right, 20 become right, 10 stay wrong -> 2, 4 and 2 of 8."""
    before = [tile(str(at), at % 4 == 0) for at in range(40)]
    after = [tile(str(at), at % 4 < 3) for at in range(40)]
    chosen = choose_tiles(before, after)
    assert chosen == sorted(chosen) and len(chosen) == 8
    kinds = [(before[at].passed, after[at].passed) for at in chosen]
    assert kinds.count((True, True)) == kinds.count((False, False)) == 2
    assert kinds.count((False, True)) == 4
    same = [tile("x", True)] * 9
    assert choose_tiles(same, same) == [0], "every prompt once"
    few = [tile(str(at), False) for at in range(3)]
    assert choose_tiles(few, few) == [0, 1, 2]


def test_prompts_fit_below_their_image():
    font = load_font()
    lines = wrap_caption("word " * 200 + "\nend", font)
    assert len(lines) == 4 and lines[-1].endswith("…")
    assert all(font.getlength(line) <= 190 for line in wrap_caption("x" * 500, font))
    assert wrap_caption("", font) == [""]


def test_figures_are_files(tmp_path):
    runs = [report_runs.write_run(tmp_path / name) for name in ("a", "b")]
    picture, curves = write_figures(read_runs(runs), tmp_path / "new" / "figures")
    with Image.open(picture) as image:
        assert image.size[0] == 1760 and len(np.unique(np.asarray(image))) > 100
    root = xml.parse(curves).getroot()
    assert len([child for child in root if child.tag.endswith("svg")]) == 4


def test_a_run_without_two_evaluations_has_no_figure(tmp_path):
    run = report_runs.write_run(tmp_path / "run")
    for step in (3, 6):
        (run / "images" / f"held_out_{step:06d}.png").unlink()
    with pytest.raises(InputError, match="found 1 file"):
        draw_before_after(run)
    pages = [run / "images" / f"held_out_{step:06d}.png" for step in (0, 6)]
    for path in pages:
        Image.new("RGB", (8, 8)).save(path)
    with pytest.raises(InputError, match="older version"):
        draw_before_after(run)
    pages[1].write_bytes(b"no image")
    with pytest.raises(InputError, match="unreadable"):
        draw_before_after(run)
