"""The page of a report, from run directories written by hand."""

from __future__ import annotations

import base64
import html.parser
import io
import json
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from corl_jax.report import __main__ as command
from corl_jax.report.command import run_report, write_run_report
from corl_jax.report.page import render_page
from corl_jax.report.read import choose_names, read_run, read_runs
from corl_jax.runs.terminal import format_duration
from corl_jax.train import milestones
from tests.support import report_runs
from tests.support.report_runs import PROMPTS, STEPS


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    return report_runs.write_run(tmp_path_factory.mktemp("report") / "work" / "train")


@pytest.fixture(scope="session")
def page(run):
    return Page(render_page(read_runs([run])))


class Page(html.parser.HTMLParser):
    """The visible text of a page, its tags with their attributes, and whether all tags end."""

    VOID = frozenset({"meta", "link", "img", "input", "br", "line", "rect", "circle"})

    def __init__(self, content: bytes):
        super().__init__()
        self.words: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self.feed(content.decode())
        assert not self._open, self._open
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self._open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self._open[-1:] not in (["style"], ["script"]):
            self.words.append(data)

    def find(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_says_what_was_trained(page):
    for text in (
        "work/train", "finished, 6 steps", "nano (janus), 958,731 parameters, 500,000 trained",
        "grpo, tasks: unified, learning rate 0.0002", "shapes_checker, 0.5 x my.py:judge",
        "4 prompts a step, 2 completions a prompt", "1 x cpu", "1 h 2 min, 2 s a step",
        "0123456789ab", "0.10.2", "3.11.7",
    ):  # fmt: skip
        assert text in page.text, text


def test_shows_changes_with_intervals(page):
    # Both intervals have 0.1 to each side: the difference has 0.1 * sqrt(2).
    assert "▲ +60.0 (+45.9 to +74.1)" in page.text
    assert "≈ +2.0 (-12.1 to +16.1)" in page.text
    assert "Images: counting" in page.text


def test_pairs_the_images_of_a_prompt_and_marks_them(page):
    marks = [attrs["aria-label"] for attrs in page.find("span") if attrs.get("class") == "mark"]
    # For each prompt step 0 at the left, and steps 0, 3 and 6 at the right.
    assert len(marks) == 4 * 4
    by_prompt = [
        [text == "matches the prompt" for text in marks[at : at + 4]] for at in (0, 4, 8, 12)
    ]
    assert by_prompt == [
        [False, False, True, True], [False, False, True, True],
        [False, False, False, True], [True, True, False, True],
    ]  # fmt: skip
    assert "step 6: 100.0% of 4 images match their prompt (4 of the 4 shown here)" in page.text
    shown = [attrs for attrs in page.find("div") if "data-at" in attrs and "hidden" not in attrs]
    assert {attrs["data-at"] for attrs in shown if "class" not in attrs} == {"2"}, "the last step"
    (slider, other) = page.find("input")
    assert (slider["data-steps"], slider["max"], other["data-steps"]) == ("0 3 6", "2", "3 6")


def test_shows_images_as_they_are(run, page):
    source = next(attrs["src"] for attrs in page.find("img") if attrs["alt"] == PROMPTS[0])
    with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as image:
        np.testing.assert_array_equal(np.asarray(image), report_runs.draw_images(0, 4)[0])


def test_shows_the_best_and_the_worst_groups(page):
    for text in ("t2i, step 6: highest mean reward", "mm2t, step 6: lowest mean reward"):
        part = page.text.partition(text)[2]
        numbers = re.findall(r"prompt (\d) <b> · mean reward (\S+)", part)[:3]
        assert [number for number, _ in numbers] == ["7", "6", "5"]
    assert "reward 0.715 advantage 1.5" in page.text
    assert "<answer>3</answer>" in page.text and "solution: <answer>2</answer>" in page.text


def test_shows_reward_against_accuracy(page):
    part = page.text.partition("Reward against accuracy")[2]
    assert "Reward and accuracy: image generation" in part
    rows = re.findall(r"(\d) (\S+) ([+-]\S+) \S+% \(\S+ - \S+\) ([+-]\S+) points", part)
    # At step 0 the reward of step 1; the accuracy of images rises, that of answers hardly.
    assert rows[:3] == [("0", "0.1", "+0", "+0.0"), ("3", "0.3", "+0.2", "+30.0"),
                        ("6", "0.6", "+0.5", "+60.0")]  # fmt: skip
    assert rows[5] == ("6", "1", "+0", "+2.0")


def test_shows_where_the_time_goes(page):
    assert "A step takes 2 s (median)." in page.text
    assert "sampling 0.5 s, 25%" in page.text and "other 0.25 s, 12%" in page.text
    assert "Images per second 640" in page.text


def test_shows_options_that_differ_from_the_defaults(page):
    part = page.text.partition("Options that differ from the defaults")[2].partition("All ")[0]
    assert "optimizer.learning_rate 0.0002 4e-06" in part
    assert 'shapes_checker, my.py:judge weight=0.5 options={"a": 1}' in part
    assert "algorithm.kl_coef" not in part and "algorithm.name" not in part


def test_shows_what_was_given_at_the_start(page, run, tmp_path):
    assert "Config mini/unified , on top of mini/<sft> ." in page.text
    assert "train.max_steps 6 90 seed 7 not set, default 0 x.y [1] not set" in page.text
    shutil.copytree(run, tmp_path / "run")
    for given in (None, HOSTILE, {"config": HOSTILE, "files": 1, "overrides": [], "replaced": 2}):
        (tmp_path / "run" / "provenance.json").write_text(json.dumps({"given": given}))
        text = Page(render_page(read_runs([tmp_path / "run"]))).text
        part = text.partition("Given at the last start")[2].partition("differ from")[0]
        found = "with no other option." if isinstance(given, dict) else "Not recorded."
        assert found in part


def test_needs_nothing_outside(page):
    assert len(page.find("script")) == 1
    for tag, attributes in page.tags:
        for name in ("src", "href"):
            value = attributes.get(name) or "#"
            assert value.startswith(("data:", "#")), (tag, value)
    assert "url(" not in page.text and "@import" not in page.text


HOSTILE = "</script><img src=x onerror=alert(1)>\"'&{{ 7 * 7 }}\ud83d\x00"


def test_escapes_every_text(tmp_path):
    run = report_runs.write_run(
        tmp_path / "</title><script>", model={"path": HOSTILE.replace("\x00", "")},
        optimizer={"learning_rate": HOSTILE.replace("\x00", "")},
    )  # fmt: skip
    lines = [report_runs.training_line(1) | {f"t2i/rewards/{HOSTILE}/mean": 1.0}]
    report_runs.write_lines(run, [*lines, {"step": 2, f"eval/{HOSTILE}": 1.0,
                                           f"eval/{HOSTILE}_stderr": 0.1}])  # fmt: skip
    for name, value in (("provenance.json", {"commit": HOSTILE, "devices": HOSTILE,
                                             "versions": {HOSTILE: HOSTILE}, "model": 3}),
                        ("summary.json", {"steps": HOSTILE, "seconds": []})):  # fmt: skip
        (run / name).write_text(json.dumps(value))
    change = json.dumps({"step": HOSTILE, "changes": [HOSTILE, 3]})
    (run / "config_changes.jsonl").write_text(change + "\n{\n[]\n")
    page = Page(render_page(read_runs([run, run])))
    assert "{{ 7 * 7 }}" in page.text and "onerror=alert(1)" in page.text
    assert len(page.find("script")) == 1 and len(page.find("html")) == 1
    assert not [attrs for attrs in page.find("img") if "onerror" in attrs]


# ---- runs that are not as they should be


def test_a_run_in_progress(tmp_path):
    run = report_runs.write_run(tmp_path / "run")
    (run / "summary.json").unlink()
    report_runs.write_lines(run, [report_runs.evaluation_line(0, 0.2, 0.5),
                                  report_runs.training_line(1)])  # fmt: skip
    page = Page(render_page(read_runs([run])))
    assert f"not finished: step 1 of {STEPS} is the newest" in page.text
    assert "20.0% (10.0 - 30.0)" in page.text and "▲" not in page.text.partition("▲ better")[0]


@pytest.mark.parametrize("text", ["", "\n", "{", '{"step": 0}\n', '{"step": 1, "reward": null}\n'])
def test_a_log_that_says_nothing(text, tmp_path):
    tmp_path.joinpath("metrics.jsonl").write_text(text)
    page = Page(render_page(read_runs([tmp_path])))
    for sentence in (
        "No evaluation is in the log.", "No step of the training is in the log.",
        "The run has no images", "The run has no files samples/step_*.parquet",
        "No step with its time is in the log.", "The run has not both",
        "config.yaml could not be read", "not recorded",
    ):  # fmt: skip
        assert sentence in page.text, sentence


def test_damaged_files_are_named_and_left_out(tmp_path):
    run = report_runs.write_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 7, "reward": 9.5\n\xff\xfe\n[1]\n{"step": "8"}\n{"step": 7, "rew')
    (run / "images" / "held_out_000003.png").write_bytes(b"no image")
    (run / "samples" / "step_000006.parquet").write_bytes(b"PAR1")
    (run / "summary.json").write_text("{")
    page = Page(render_page(read_runs([run])))
    assert "5 line(s) of metrics.jsonl could not be read" in page.text
    assert "images/held_out_000003.png could not be read" in page.text
    assert "samples/step_000006.parquet could not be read" in page.text
    assert "summary.json could not be read" in page.text
    assert "t2i, step 3: highest mean reward" in page.text, "the step before"
    assert page.find("input")[0]["data-steps"] == "0 6"


def test_samples_without_a_column_are_named(tmp_path):
    run = report_runs.write_run(tmp_path / "run")
    path = run / "samples" / "step_000006.parquet"
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(path).drop(["reward"]), path)
    assert "no column reward" in Page(render_page(read_runs([run]))).text


def test_pages_without_notes_are_shown_whole(tmp_path):
    """Those of older versions, and of prompts that changed between two evaluations."""
    run = report_runs.write_run(tmp_path / "run")
    for path in (run / "images").glob("held_out_*.png"):
        with Image.open(path) as image:
            image.convert("RGB").save(path)
    page = Page(render_page(read_runs([run])))
    pages = [attrs for attrs in page.find("img") if attrs.get("class") == "page"]
    assert [attrs["data-at"] for attrs in pages] == ["0", "1", "2"]
    assert ["hidden" in attrs for attrs in pages] == [True, True, False]


def test_large_images_are_made_smaller(tmp_path):
    """Of 16 steps 13 are shown, and each image at 256 pixels instead of 384."""
    run = report_runs.write_run(tmp_path / "run")
    for step in range(7, 20):
        report_runs.write_evaluation_page(run, step, [True] * 4, side=384)
    page = Page(content := render_page(read_runs([run])))
    steps = page.find("input")[0]["data-steps"].split()
    assert len(steps) == 13 and steps[0] == "0" and steps[-1] == "19"
    assert len(content) < 56 * 80_000, "noise, the worst of all images"


# ---- several runs


def test_two_runs_side_by_side(run, tmp_path):
    other = report_runs.write_run(tmp_path / "other" / "train", optimizer={"learning_rate": 0.1})
    report_runs.write_lines(other, [report_runs.training_line(step) for step in range(1, 200)])
    page = Page(render_page(read_runs([run, other])))
    assert "Comparison of 2 training runs" in page.text
    part = page.text.partition("Options in which the runs differ")[2]
    assert "optimizer.learning_rate 0.0002 0.1" in part.partition("Options that differ")[0]
    assert page.text.count("work/train other/train") > 5, "heads of columns and legends"
    dashed = [attrs for attrs in page.find("polyline") if "stroke-dasharray" in attrs]
    faint = [attrs for attrs in page.find("polyline") if attrs.get("opacity") == "0.3"]
    assert dashed and faint, "the second run is dashed, and smoothed because it is long"


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/a/x"], ["a/x"]),
        (["/a/x", "/b/x"], ["a/x", "b/x"]),
        (["/a/x/train", "/b/x/train"], ["a/x/train", "b/x/train"]),
        (["/a/x", "/a/x"], ["a/x (1)", "a/x (2)"]),
        (["/a/x", "/b/x", "/a/x"], ["a/x (1)", "b/x", "a/x (2)"]),
        (["/"], ["/"]),
    ],
)
def test_runs_have_short_names_that_differ(paths, names):
    assert choose_names([Path(path) for path in paths]) == names


def test_a_later_line_of_a_step_counts(tmp_path):
    report_runs.write_lines(tmp_path, [{"step": 2, "a": 1.0}, {"step": 1, "a": True},
                                       {"step": 1, "a": 3}, {"step": 2, "a": 4.0}])  # fmt: skip
    assert read_run(tmp_path, "x").read_points("a") == [(1, 3.0), (2, 4.0)]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.25, "0.25 s"), (59.6, "1 min 0 s"), (601, "10 min 1 s"), (3725, "1 h 2 min")],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text


# ---- the command, and the end of a training


def test_the_command_writes_page_and_figures(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command.main([str(run)])
    assert capsys.readouterr().out.startswith("report.html  (")
    command.main([str(run), "--figures", "figures"])
    assert capsys.readouterr().out.split() == ["figures/before_after.png", "figures/curves.svg"]
    assert {path.name for path in tmp_path.iterdir()} == {"figures", "report.html"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN/config.yaml"], "is a file; expected the output_dir"),
        (["RUN/.."], "did you mean"),
        (["RUN", "--out", "RUN"], "is a directory; expected the name of an HTML file"),
        (["RUN", "--out", "RUN/nowhere/x.html"], "no such directory; create it first"),
        (["RUN", "--figures", "RUN/config.yaml"], "is a file; expected the name of a directory"),
    ],
)
def test_wrong_arguments(arguments, message, run, capsys):
    with pytest.raises(SystemExit) as end:
        command.main([text.replace("RUN", str(run)) for text in arguments])
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_the_same_page_is_not_written_again(tmp_path):
    run = report_runs.write_run(tmp_path / "run")
    path = write_run_report(run)
    before = path.stat().st_mtime_ns, path.read_bytes()
    time.sleep(0.01)
    write_run_report(run)
    assert (path.stat().st_mtime_ns, path.read_bytes()) == before
    report_runs.write_lines(run, [])
    assert write_run_report(run).read_bytes() != before[1]


def test_a_failure_warns_and_does_not_end_the_run(tmp_path, monkeypatch):
    said: list[str] = []
    outputs = SimpleNamespace(
        directory=SimpleNamespace(root=tmp_path), log=SimpleNamespace(say=said.append)
    )
    (tmp_path / "report.html").mkdir()
    report_runs.write_lines(tmp_path, [])
    milestones.write_report(outputs)
    (line,) = said
    assert line.startswith("warning: report.html: cannot be written (IsADirectoryError")
    assert f"corl-jax report {tmp_path}" in line


def test_a_page_takes_a_moment(run, tmp_path):
    began = time.perf_counter()
    run_report([run], tmp_path / "report.html", None)
    assert time.perf_counter() - began < 10
