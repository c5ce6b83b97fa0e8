"""`corl-jax evaluate --suite tsv` from files to files: with a model, and with predictions alone."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pandas as pd
import pytest

import corl_jax
from corl_jax.evaluate import __main__ as evaluate
from corl_jax.evaluate import tsv as tsv_command
from corl_jax.evaluate import tsv_answers
from corl_jax.evaluation.matching.answer_tags import ANSWER_TAG_MODES
from corl_jax.evaluation.matching.matchers import DEFAULT_MATCHER, MATCHERS
from corl_jax.evaluation.tsv.images import find_images, open_image
from corl_jax.evaluation.tsv.prompts import PROMPT_STYLES
from corl_jax.evaluation.tsv.table import read_table
from corl_jax.evaluation.units import read_units
from corl_jax.policies import batched, load_policy
from corl_jax.policies.family import SamplingOptions
from tests.support.tsv_files import encode_image, write_drawn_world, write_predictions, write_tsv

NANO = Path(corl_jax.__file__).parent / "assets" / "nano_janus"
ROWS, TOKENS = 6, 24


def run(*words) -> None:
    evaluate.main(["--suite", "tsv", *map(str, words)])


def refuse(capsys, *words) -> str:
    with pytest.raises(SystemExit) as ended:
        run(*words)
    assert ended.value.code == 2
    return capsys.readouterr().err


def read_report(out: Path) -> dict:
    return json.loads((out / "report.json").read_text())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return {
        kind: write_drawn_world(folder / f"drawn_{kind}.tsv", ROWS, kind)
        for kind in ("choice", "yes_no")
    }


def ask_nano(data, out, *words):
    run("--model", NANO, "--data", data, "--out", out, "--max-new-tokens", TOKENS, *words)


@pytest.fixture(scope="module")
def answered(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("answered") / "out"
    ask_nano(data["choice"], out, "--prompt-style", "corl")
    return out


def test_the_drawn_world_is_answered_as_by_generate(data, answered):
    """The nano was trained without an instruction, so its prompts are those of `generate`."""
    table = read_table(data["choice"])
    images = find_images(table)
    questions = [
        "\n".join([row["question"], "Options:", *(f"{x}. {row[x]}" for x in "ABCD")])
        for row in table.rows
    ]
    model = load_policy(NANO)
    options = SamplingOptions(model.processor.special, greedy=True, max_new_tokens=TOKENS)
    samples = batched.answer_questions(
        model, questions, lambda i: open_image(images[i][0]), options, batch_size=4
    )
    expected = {s.prompt: model.processor.decode(s.tokens) for s in samples}
    lines = (answered / "answers.jsonl").read_text().splitlines()
    answers = {line["index"]: line["answer"] for line in map(json.loads, lines)}
    assert answers == {row["index"]: expected[n] for n, row in enumerate(table.rows)}
    assert all(answer.startswith("<think>") for answer in answers.values())


def test_the_prediction_file_is_what_vlmevalkit_reads(data, answered):
    frame = pd.read_csv(answered / "nano_janus_drawn_choice.tsv", sep="\t")
    assert list(frame.columns) == [
        "index", "question", "category", "A", "B", "C", "D", "answer", "prediction", "thinking",
        "raw",
    ]  # fmt: skip
    assert len(frame) == ROWS
    assert set(frame["prediction"]) <= set("ABCD")
    assert frame["raw"].str.endswith("</answer>").all()
    report = read_report(answered)
    hits = (frame["prediction"] == frame["answer"]).mean()
    assert report["table"][0]["Overall"] == pytest.approx(hits)
    assert report["rates"]["none/Overall"]["n"] == ROWS
    settings = report["settings"]
    assert settings["matcher"] == "2026-08" and settings["roles"] == "pro"
    assert settings["dtype"] == "float32" and len(settings["model_sha256"]) == 64
    assert settings["instruction"].startswith("none")
    assert report["counts"]["answers_with_tag"] == ROWS
    command = (answered / "NEXT.txt").read_text().splitlines()[-1]
    assert command == (
        f"LMUData={data['choice'].parent} PRED_FORMAT=tsv vlmutil eval "
        f"{answered}/nano_janus_drawn_choice.tsv --judge exact_matching"
    )
    assert len(read_units(answered)) == ROWS


def test_a_killed_evaluation_goes_on_where_it_was(data, answered, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(answered, out)
    lines = (out / "answers.jsonl").read_bytes().splitlines(keepends=True)
    (out / "answers.jsonl").write_bytes(b"".join(lines[:2]) + lines[2][:10])
    asked = []
    answer_rows = batched.answer_rows

    def watch(model, rows, *args, **options):
        asked.extend(rows)
        return answer_rows(model, rows, *args, **options)

    monkeypatch.setattr(tsv_answers.batched, "answer_rows", watch)
    # Another batch size changes no answer.
    ask_nano(data["choice"], out, "--prompt-style", "corl", "--batch-size", 2)
    assert len(asked) == ROWS - 2
    assert sorted((out / "answers.jsonl").read_bytes().splitlines(keepends=True)) == sorted(lines)
    name = "nano_janus_drawn_choice.tsv"
    assert (out / name).read_bytes() == (answered / name).read_bytes()
    assert read_report(out)["counts"]["answered_before"] == 2
    # With all answers there the model is not even loaded.
    monkeypatch.setattr(tsv_answers, "load_policy", None)
    ask_nano(data["choice"], out, "--prompt-style", "corl", "--matcher", "2025-05")
    assert read_report(out)["settings"]["matcher"] == "2025-05"


def test_a_folder_of_other_answers_is_refused(data, answered, capsys, monkeypatch):
    monkeypatch.setattr(tsv_answers, "prepare_devices", None)
    words = ("--model", NANO, "--data", data["yes_no"], "--out", answered, "--max-new-tokens", 9)
    message = refuse(capsys, *words)
    for option in ("--data", "--prompt-style corl", "--roles pro", "--max-new-tokens 24", "--kind"):
        assert f"holds answers with {option}" in message
    assert "drawn_choice.tsv (sha256" in message and "drawn_yes_no.tsv (sha256" in message


def test_another_dtype_is_refused_before_the_model_is_loaded(data, answered, capsys, monkeypatch):
    monkeypatch.setattr(tsv_answers, "load_policy", None)
    words = ("--model", NANO, "--data", data["choice"], "--out", answered, "--prompt-style", "corl")
    message = refuse(capsys, *words, "--max-new-tokens", TOKENS, "--dtype", "bfloat16")
    assert "holds answers with --dtype float32; this command has bfloat16" in message


def test_yes_no_questions_in_vlmevalkits_style(data, tmp_path):
    out = tmp_path / "out"
    ask_nano(data["yes_no"], out)
    report = read_report(out)
    assert report["settings"]["kind"] == "yes_no" and report["settings"]["roles"] == "old"
    assert report["settings"]["first_question"].endswith("using a single word or phrase.")
    assert set(report["rates"]) >= {"Overall"} and report["rates"]["Overall"]["n"] == ROWS
    verdicts = [json.loads(line) for line in (out / "verdicts.jsonl").read_text().splitlines()]
    assert report["unread"]["count"] == sum(v["extracted"] is None for v in verdicts)


def test_a_row_may_have_several_images(tmp_path, capsys):
    images = [encode_image(seed, side=32) for seed in (1, 2)]
    rows = [
        {"index": 1, "image": images[0], "A": "x", "B": "y", "answer": "A"},
        {"index": 2, "image": str(images), "A": "x", "B": "y", "answer": "B"},
    ]
    out = tmp_path / "out"
    ask_nano(write_tsv(tmp_path / "two.tsv", rows), out)
    assert len((out / "answers.jsonl").read_text().splitlines()) == 2
    assert "warning: at most" not in capsys.readouterr().err


def test_the_default_length_is_what_the_model_has_room_for(data, tmp_path, capsys, monkeypatch):
    def stop(*_):
        raise RuntimeError("devices would start here")

    monkeypatch.setattr(tsv_answers, "prepare_devices", stop)
    words = ("--model", NANO, "--data", data["choice"], "--out", tmp_path / "out")
    with pytest.raises(RuntimeError, match="devices"):
        run(*words)
    assert "new tokens instead of 2048: the model has no more positions" in capsys.readouterr().err
    message = refuse(capsys, *words, "--max-new-tokens", 250)
    assert "expected at most 6, which leaves room for 250 in the model's 256" in message


def test_a_signal_stops_between_batches(data, tmp_path, monkeypatch):
    append, signals = tsv_answers.append_line, []

    def append_and_signal(*words):
        append(*words)
        if not signals:
            signals.append(signal.raise_signal(signal.SIGTERM))

    out = tmp_path / "out"
    monkeypatch.setattr(tsv_answers, "append_line", append_and_signal)
    with pytest.raises(SystemExit) as ended:
        ask_nano(data["choice"], out, "--prompt-style", "corl", "--batch-size", 2)
    assert ended.value.code == 75
    assert len((out / "answers.jsonl").read_text().splitlines()) == 2
    assert not (out / "report.json").exists()


def test_names_of_options_are_those_of_the_rules():
    assert tuple(MATCHERS) == tsv_command.MATCHER_NAMES
    assert tsv_command.MATCHER_NAMES[0] == DEFAULT_MATCHER
    assert tsv_command.TAG_MODES == ANSWER_TAG_MODES
    assert tsv_command.PROMPT_STYLES == PROMPT_STYLES


# ---- bad input, before any device


@pytest.fixture
def no_devices(monkeypatch):
    monkeypatch.setattr(tsv_answers, "prepare_devices", None)


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        ([], ["--model, --predictions: expected one of them"]),
        (["--model", NANO], ["--out: expected a folder"]),
        (["--predictions", "p.tsv", "--rows", 3, "--dtype", "float32", "--roles", "old"],
         ["--rows: has no effect on --predictions", "--dtype: has no", "--roles: has no"]),
        (["--model", NANO, "--predictions", "p.tsv", "--out", "o"], ["expected one of them"]),
        (["--model", NANO, "--out", "o", "--rows", 0, "--batch-size", -1],
         ["--rows: found 0", "--batch-size: found -1"]),
        (["--model", NANO, "--out", "o", "--rows", 7], ["--rows: found 7, but"]),
        (["--model", NANO, "--out", "o", "--roles", "new"], ["--roles: found new"]),
        (["--model", NANO, "--out", "o", "--kind", "mme"], ["has no column image_path"]),
        (["--model", NANO, "--out", "o", "--kind", "mnist"], ["--kind: found mnist"]),
        (["--model", "nowhere", "--out", "o", "--kind", "mnist"], ["nowhere", "--kind"]),
    ],
)  # fmt: skip
def test_bad_options_are_refused_together(
    data, tmp_path, monkeypatch, capsys, no_devices, words, messages
):
    monkeypatch.chdir(tmp_path)
    error = refuse(capsys, "--data", data["choice"], *words)
    assert all(message in error for message in messages), error


def test_a_folder_of_something_else_is_refused(data, tmp_path, capsys, no_devices):
    (tmp_path / "notes.txt").write_text("mine")
    words = ("--model", NANO, "--data", data["choice"], "--out")
    assert "--out" in refuse(capsys, *words, tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    assert "manifest.json: cannot be read" in refuse(capsys, *words, tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": 7, "settings": {}}')
    assert "is of another suite, or of another version" in refuse(capsys, *words, tmp_path)


def test_broken_images_are_found_before_the_model_is_loaded(tmp_path, capsys, no_devices):
    rows = [{"index": 1}, {"index": 2, "image": "A" * 101}, {"index": 3, "image": "B" * 104}]
    path = write_tsv(tmp_path / "x.tsv", rows)
    error = refuse(capsys, "--model", NANO, "--data", path, "--out", tmp_path / "out")
    assert "index 2: image is broken base64" in error and "index 3: image: found 78" in error
    assert not (tmp_path / "out").exists()


def test_excel_needs_openpyxl(data, tmp_path, capsys, no_devices, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "openpyxl", None)
    words = ("--model", NANO, "--data", data["choice"], "--out", tmp_path / "o", "--format", "xlsx")
    assert "openpyxl is not installed" in refuse(capsys, *words)


# ---- predictions alone

CHOICES = {"A": "a red car", "B": "a blue bus"}


def make_set(name: str) -> tuple[list[dict], dict]:
    """Returns rows of a data set and predictions for them."""
    rows = [{"index": i, **CHOICES, "answer": "AB"[i % 2], "category": "c"} for i in range(4)]
    answers = {0: "A", 1: "B", 2: "B", 3: "<think>A</think><answer>B</answer>"}
    if name == "MMBench_DEV_EN":
        rows = [{**row, "index": i % 2 + i // 2 * 1_000_000} for i, row in enumerate(rows)]
        return rows, {row["index"]: row["answer"] for row in rows[:3]} | {1_000_001: "A"}
    if name == "MMMU_DEV_VAL":
        rows = [{**row, "split": "dev" if row["index"] else "validation"} for row in rows]
        rows.append({"index": 4, "answer": "5", "category": "c", "split": "validation"})
        return rows, {**answers, 4: "five"}
    if name in ("POPE", "MME", "HallusionBench"):
        rows = [
            {
                "index": f"VD_a_b_0_{i // 2}_{i % 2}", "answer": ["Yes", "No"][i % 2],
                "image_path": f"{i // 2}.jpg",
                "category": "OCR" if name == "MME" else "adversarial,popular",
            }
            for i in range(4)
        ]  # fmt: skip
        return rows, {row["index"]: "Yes" for row in rows}
    return rows, answers


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("MMStar", [{"split": "none", "Overall": 0.5, "c": 0.5}]),
        ("MMBench_DEV_EN", [{"split": "none", "Overall": 0.5, "c": 0.5}]),
        ("MMMU_DEV_VAL", [
            {"split": "dev", "Overall": 1 / 3, "c": 1 / 3},
            {"split": "validation", "Overall": 0.5, "c": 0.5},
        ]),
        ("POPE", [
            {"split": split, "Overall": 200 / 3, "acc": 50.0, "precision": 50.0, "recall": 100.0}
            for split in ("Overall", "adversarial", "popular")
        ]),
        ("MME", [{"OCR": 50.0}]),
        ("HallusionBench", [
            {"split": split, "aAcc": 50.0, "fAcc": 0.0, "qAcc": 50.0}
            for split in ("Overall", "adversarial,popular")
        ]),
    ],
)  # fmt: skip
def test_a_prediction_file_is_rated_without_a_model(tmp_path, capsys, name, table):
    rows, answers = make_set(name)
    data = write_tsv(tmp_path / f"{name}.tsv", rows)
    predictions = write_predictions(tmp_path / "p.tsv", answers)
    run("--data", data, "--predictions", predictions, "--out", tmp_path / "out")
    report = read_report(tmp_path / "out")
    assert [pytest.approx(row) for row in table] == report["table"]
    assert report["counts"]["rows"] == len(rows) and report["needs_judge"] is None
    assert read_units(tmp_path / "out")
    shown = capsys.readouterr()
    assert "matcher 2026-08, answer_tag off" in shown.out


def test_the_tag_of_a_prediction_file_is_read_if_asked(tmp_path, capsys):
    rows, answers = make_set("MMStar")
    words = (
        "--data", write_tsv(tmp_path / "MMStar.tsv", rows),
        "--predictions", write_predictions(tmp_path / "p.tsv", answers),
    )  # fmt: skip
    run(*words)
    shown = capsys.readouterr()
    assert "1 of 4 predictions contain <answer>" in shown.err
    assert "no rule reads 1 of 4 answers (25.0%)" in shown.out
    assert "25.0% are more than 2%" in shown.err
    assert "index 3: '<think>A</think><answer>B</answer>'" in shown.err
    assert "none/Overall   50.0 %" in shown.out
    run(*words, "--answer-tag", "auto", "--mmmu-guess")
    shown = capsys.readouterr()
    assert "none/Overall   75.0 %" in shown.out and "more than 2%" not in shown.err
    assert "no rule reads 0 of 4 answers (0.0%)" in shown.out
    assert "--mmmu-guess: has no effect on choice" in shown.err


def test_judged_sets_never_show_a_final_number(tmp_path, capsys):
    rows = [
        {"index": i, "answer": i, "question_type": "free_form", "answer_type": "integer",
         "task": "t", "skills": "['s']", "choices": ""}
        for i in range(3)
    ]  # fmt: skip
    data = write_tsv(tmp_path / "MathVista_MINI.tsv", rows)
    predictions = write_predictions(tmp_path / "p.tsv", {0: "0", 1: "1", 2: "It is 2"})
    run("--data", data, "--predictions", predictions, "--out", tmp_path / "out")
    shown = capsys.readouterr().out
    assert "no final score: rules read only a part; vlmutil eval FILE --judge gpt-4o-mini" in shown
    report = read_report(tmp_path / "out")
    assert set(report["rates"]) == {"prefetch"} and not report["scores"]
    assert report["rates"]["prefetch"]["mean"] == pytest.approx(1 / 3)
    assert report["needs_judge"] == "gpt-4o-mini"
    assert not (tmp_path / "out" / "scores.jsonl").exists()
    assert "--judge gpt-4o-mini" in (tmp_path / "out" / "NEXT.txt").read_text()


def test_a_data_set_without_answers_is_not_rated(tmp_path, capsys):
    rows = [{"index": 1, **CHOICES}]
    data = write_tsv(tmp_path / "MMBench_TEST_EN.tsv", rows)
    run("--data", data, "--predictions", write_predictions(tmp_path / "p.tsv", {1: "A"}))
    assert "states no answers; nothing is rated" in capsys.readouterr().err


def test_mme_needs_both_questions_of_an_image(tmp_path, capsys):
    rows, answers = make_set("MME")
    data = write_tsv(tmp_path / "MME.tsv", rows)
    answers.popitem()
    predictions = write_predictions(tmp_path / "p.tsv", answers)
    error = refuse(capsys, "--data", data, "--predictions", predictions)
    assert "MME: image 1.jpg of category OCR has one question" in error
