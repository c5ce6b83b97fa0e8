"""`--suite own_answers`: images are drawn or taken, asked about, judged, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import corl_jax
from corl_jax.data.drawn_world.generator import make_row
from corl_jax.data.images import decode_image
from corl_jax.data.self_questions.reader import parse_asked_record
from corl_jax.data.self_questions.records import QUESTIONS
from corl_jax.errors import InputError
from corl_jax.evaluate import __main__ as evaluate
from corl_jax.evaluate import geneval_detect, own_answers_run
from corl_jax.evaluation.geneval.folders import list_images
from corl_jax.evaluation.same_answer import write_judge_prompt
from corl_jax.evaluation.units import read_units
from corl_jax.policies import batched, load_policy
from corl_jax.policies.family import SamplingOptions
from corl_jax.rewards.answers import read_answer
from corl_jax.rewards.self_answers import judge_answer, read_demand
from tests.support.judge_server import serve_judge

NANO = Path(corl_jax.__file__).parent / "assets" / "nano_janus"
TOKENS = "12"
DEMANDS = [
    {"tag": "single_object", "include": [{"class": "dog", "count": 1}],
     "prompt": "a photo of a dog"},
    {"tag": "counting", "include": [{"class": "bench", "count": 2}],
     "exclude": [{"class": "bench", "count": 3}], "prompt": "a photo of two benchs"},
    {"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "red"}],
     "prompt": "a photo of a red cat", "question": QUESTIONS["colors"], "answer": "red"},
]  # fmt: skip


@pytest.fixture(autouse=True)
def _one_local_device(monkeypatch):
    first = jax.local_devices()[:1]
    monkeypatch.setattr("corl_jax.evaluate.draw_run.jax.local_devices", lambda: first)


@pytest.fixture
def server():
    with serve_judge() as http:
        yield http


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def prompts(tmp_path):
    return write_lines(tmp_path / "records.jsonl", DEMANDS)


def write_folders(root, seed, samples=1, count=6):
    """GenEval's folders of the drawn world's real images; prompts are the same for all seeds."""
    kinds = {"counting", "single_object", "colors"}
    rows = [make_row(9, i, 32, world="small") for i in range(40)]
    rows = [row for row in rows if row["tag"] in kinds][:count]
    for number, row in enumerate(rows):
        folder = root / f"{number:05d}"
        (folder / "samples").mkdir(parents=True)
        record = {key: row[key] for key in ("tag", "prompt", "question", "answer")}
        include = json.loads(row["include"])
        (folder / "metadata.jsonl").write_text(json.dumps(record | {"include": include}))
        for sample in range(samples):
            # The first image shows the prompt, others show anything.
            shown = row if not sample else make_row(seed, number, 32, world="small")
            image = folder / "samples" / f"{sample:04d}.png"
            image.write_bytes(shown["real_image"]["bytes"])
    return root


@pytest.fixture
def folders(tmp_path):
    return write_folders(tmp_path / "own", seed=5, samples=2)


def write_results(path, root, is_right):
    """GenEval's official results; `is_right(number, sample)` is the verdict."""
    rows = []
    for image in sorted(root.glob("*/samples/*.png")):
        metadata = json.loads((image.parents[1] / "metadata.jsonl").read_text())
        verdict = is_right(int(image.parts[-3]), int(image.stem))
        rows.append(
            {"filename": str(image), "tag": metadata["tag"], "prompt": metadata["prompt"],
             "correct": verdict, "reason": "", "metadata": json.dumps(metadata), "details": "{}"}
        )  # fmt: skip
    return write_lines(path, rows)


def run(*words):
    evaluate.main(["--suite", "own_answers", *map(str, words)])


def ask(images, out, *more):
    run("--model", NANO, "--images", images, "--out", out, "--max-new-tokens", TOKENS, *more)


def draw(model, prompts, out, *more):
    run("--model", model, "--prompts", prompts, "--out", out, "--images-per-prompt", 2,
        "--batch-size", 4, "--max-new-tokens", 8, *more)  # fmt: skip


def refuse(capsys, *words):
    with pytest.raises(SystemExit) as caught:
        run(*words)
    assert caught.value.code == 2
    return capsys.readouterr().err


# ---- records


def test_questions_and_answers_are_made_of_metadata():
    dog, benches, cat = (parse_asked_record(json.dumps(row)) for row in DEMANDS)
    assert (dog.question, dog.answer) == (QUESTIONS["single_object"], "dog")
    # The published answers have the prompts' plurals.
    assert (benches.question, benches.answer) == (QUESTIONS["counting"], "two benchs")
    assert cat.answer == "red"
    five = {
        **DEMANDS[1],
        "include": [{"class": "dog", "count": 5}],
        "prompt": "a photo of five dogs",
    }
    five.pop("exclude")
    assert parse_asked_record(json.dumps(five)).answer == "five dogs"
    with pytest.raises(InputError, match="templates count to 4 only; found 5; write both"):
        parse_asked_record(json.dumps(five | {"prompt": "five dogs"}))


# ---- the command


def test_images_are_drawn_asked_and_judged(model, prompts, tmp_path, capsys):
    out = tmp_path / "out"
    draw(model, prompts, out)
    printed = capsys.readouterr().out
    assert "6 drawn, 0 kept" in printed and "no imbalance table: it needs --verdicts" in printed
    assert "answers: 9 asked" in printed  # about 6 images, and 3 about a grey one
    assert json.loads((out / "images/00001/metadata.jsonl").read_text()) == DEMANDS[1]
    # The detector's suite reads the same folders.
    assert [demand["tag"] for _, demand in list_images(out, geneval_detect.read_demand)] == [
        demand["tag"] for demand in DEMANDS for _ in range(2)
    ]
    rows = read_lines(out / "answers.jsonl")
    assert [row["source"] for row in rows] == ["own"] * 6 + ["blank"] * 3
    assert rows[2]["image"] == "00001/samples/0000.png" and rows[2]["truth"] == "two benchs"
    assert {row["geneval_correct"] for row in rows} == {None}
    units = read_units(out)
    assert [unit.name for unit in units] == ["00000", "00001", "00002"]
    assert all(unit.values.keys() == {"answered"} for unit in units)
    report = json.loads((out / "report.json").read_text())
    assert report["imbalance"] == {} and report["answers"]["own"]["all"]["accuracy"]["n"] == 6
    settings = report["settings"]
    assert (settings["seed"], settings["max_new_tokens"], settings["judge"]) == (20, 8, "rules")
    # The verdicts come from the files of geneval-score. Nothing is drawn or asked for them.
    boxes = [{"class": "dog", "score": 0.9, "box": [0, 0, 5, 5]}]
    detections = [
        {"filename": f"{number:05d}/samples/{sample:04d}.png", **DEMANDS[number],
         "detections": boxes if sample else []}
        for number in range(3) for sample in range(2)
    ]  # fmt: skip
    found = write_lines(tmp_path / "detections.jsonl", detections)
    scores = tmp_path / "scores"
    evaluate.main(["--suite", "geneval-score", "--results", str(found), "--drawn", str(out),
                   "--out", str(scores)])  # fmt: skip
    draw(model, prompts, out, "--verdicts", scores)
    printed = capsys.readouterr().out
    assert "0 drawn, 6 kept" in printed and "answers: 0 asked" in printed
    assert "hacking gap" in printed and "U|G" in printed
    report = json.loads((out / "report.json").read_text())
    assert report["drawing"]["mean"] == pytest.approx(1 / 6)
    assert report["imbalance"]["single_object"]["drawing"]["mean"] == 0.5
    assert [unit.values["drawn"] for unit in read_units(out)] == [0.5, 0.0, 0.0]
    rows = read_lines(out / "answers.jsonl")
    assert [row["geneval_correct"] for row in rows[:3]] == [False, True, False]


def test_images_that_exist_are_asked_as_by_generate(folders, tmp_path, capsys):
    foreign = write_folders(tmp_path / "foreign", seed=6, count=5)
    results = write_results(tmp_path / "r.jsonl", folders, lambda number, sample: sample == 0)
    others = write_results(tmp_path / "f.jsonl", foreign, lambda number, sample: number > 1)
    out = tmp_path / "out"
    ask(folders, out, "--verdicts", results, "--foreign", foreign, "--foreign-verdicts", others)
    rows = read_lines(out / "answers.jsonl")
    by_source = {
        name: [row for row in rows if row["source"] == name] for name in ("own", "foreign", "blank")
    }
    assert [len(part) for part in by_source.values()] == [12, 5, 6]
    loaded = load_policy(NANO, jnp.float32)
    choose_roles = loaded.family.choose_roles
    assert choose_roles is not None
    model = dataclasses.replace(loaded, processor=choose_roles(loaded.processor, None).processor)
    options = SamplingOptions(
        model.processor.special, greedy=True, max_new_tokens=int(TOKENS), dtype=jnp.float32
    )
    samples = batched.answer_questions(
        model, [row["question"] for row in by_source["own"]],
        lambda i: decode_image(folders / by_source["own"][i]["image"]), options,
    )  # fmt: skip
    expected = {sample.prompt: model.processor.decode(sample.tokens) for sample in samples}
    assert [row["answer"] for row in by_source["own"]] == [expected[i] for i in range(12)]
    assert len(set(expected.values())) > 1
    for row in rows:
        metadata = folders / f"{row['image'][:5]}" / "metadata.jsonl"
        if row["image"]:
            demand = read_demand(row["tag"], json.loads(metadata.read_text())["include"])
            assert row["correct"] == (judge_answer(row["answer"], demand) == 1.0)
    # By hand: own images 0 are right, foreign images 0 beside them, of which 2 do not count.
    report = json.loads((out / "report.json").read_text())
    right = [row["correct"] for row in by_source["own"] if row["geneval_correct"]]
    units = {unit.name: unit.values for unit in read_units(out)}
    misread = sum(values["misread"] for values in units.values())
    assert len(right) == 6 and sum(right) == 6 - 2 * misread
    assert [("foreign_answered" in units[f"{i:05d}"]) for i in range(6)] == [
        False, False, True, True, True, False,
    ]  # fmt: skip
    assert report["settings"]["foreign"] == str(foreign)
    assert report["imbalance"]["mean"]["drawing"]["mean"] == pytest.approx(0.5)
    # Other foreign images are asked about, and nothing else.
    capsys.readouterr()
    ask(folders, out, "--foreign", write_folders(tmp_path / "more", seed=7, samples=3))
    captured = capsys.readouterr()
    assert "6 of 18 images have no own image of the same prompt" in captured.err
    assert "answers: 7 asked" in captured.out  # the first five are the same files as before


def test_a_language_model_judges(folders, server, tmp_path, capsys):
    out = tmp_path / "out"
    ask(folders, out)
    rules = read_lines(out / "answers.jsonl")
    ask(folders, out, "--judge", server.url, "--judge-model", "qwen")
    assert "answers: 0 asked" in capsys.readouterr().out
    rows = read_lines(out / "answers.jsonl")
    assert {row["judge"] for row in rows} == {"qwen"}
    assert all(row["correct"] for row in rows) and not all(row["correct"] for row in rules)
    texts = {(row["question"], row["truth"], row["answer"]) for row in rows}
    sent = [body["messages"][1]["content"] for _, body, _ in server.requests[1:]]
    # The first request only looks whether the server answers.
    assert sorted(sent) == sorted(
        write_judge_prompt(question, truth, read_answer(answer))
        for question, truth, answer in texts
    )
    # Its verdicts are kept.
    report = json.loads((out / "report.json").read_text())
    assert report["settings"]["judge"] == "qwen"
    assert report["settings"]["judge_url"] == f"{server.url}/v1/chat/completions"
    ask(folders, out, "--judge", server.url, "--judge-model", "qwen")
    assert len(server.requests) == len(texts) + 2
    assert read_lines(out / "answers.jsonl") == rows


def test_a_judge_that_fails_keeps_the_answers(folders, server, tmp_path, capsys):
    out = tmp_path / "out"
    server.failures += [200, 400]
    words = ("--model", NANO, "--images", folders, "--out", out, "--max-new-tokens", TOKENS)
    assert "status 400" in refuse(capsys, *words, "--judge", server.url)
    assert not (out / "report.json").exists() and not (out / "scores.jsonl").exists()
    run(*words, "--judge", server.url)
    assert "answers: 0 asked" in capsys.readouterr().out and (out / "report.json").exists()


def test_a_signal_stops_between_batches(folders, tmp_path, monkeypatch, capsys):
    append, signals = own_answers_run.append_line, []

    def append_and_signal(*words):
        append(*words)
        if not signals:
            signals.append(signal.raise_signal(signal.SIGTERM))

    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(own_answers_run, "append_line", append_and_signal)
        with pytest.raises(SystemExit) as ended:
            ask(folders, out, "--batch-size", 2)
    assert ended.value.code == 75
    kept = len(read_lines(out / "answers.jsonl"))
    assert 0 < kept < 15 and not (out / "report.json").exists()
    with (out / "answers.jsonl").open("a") as file:
        file.write('{"source": "own", "ima')  # a line that a kill cut off
    capsys.readouterr()
    ask(folders, out, "--batch-size", 2)
    assert f"answers: {12 + 3 - kept} asked" in capsys.readouterr().out
    assert len(read_lines(out / "answers.jsonl")) == 18


# ---- bad input, before any device


@pytest.fixture
def _no_model(monkeypatch):
    def load_nothing(*words):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(own_answers_run, "load_policy", load_nothing)
    monkeypatch.setattr(own_answers_run, "prepare_devices", load_nothing)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": "What?"}, "answer is missing; write it, or leave out question, too"),
        ({"tag": "colour"}, "tag: found 'colour'; "),
        (
            {"include": [{"class": "dgo", "count": 1}]},
            "class: 'dgo' is not one of the .* mean 'dog'",
        ),
        ({"question": "What is it?", "answer": "a dog"}, "no rule judges; .* with --judge URL"),
    ],
)
@pytest.mark.usefixtures("_no_model")
def test_records_that_cannot_be_judged_are_refused(change, message, tmp_path, capsys):
    path = write_lines(tmp_path / "records.jsonl", [{**DEMANDS[0], **change}])
    err = refuse(capsys, "--model", NANO, "--prompts", path, "--out", tmp_path / "out")
    assert re.search(message, err), err
    folder = tmp_path / "own" / "00000" / "samples"
    folder.mkdir(parents=True)
    shutil.copy(path, folder.parent / "metadata.jsonl")
    picture = make_row(1, 1, 32)["real_image"]["bytes"]
    (folder / "0000.png").write_bytes(picture)
    err = refuse(capsys, "--model", NANO, "--images", tmp_path / "own", "--out", tmp_path / "out")
    assert re.search(message, err), err
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("_no_model")
def test_images_and_verdicts_that_do_not_fit_are_refused(folders, tmp_path, capsys):
    base = ("--model", NANO, "--out", tmp_path / "out")
    err = refuse(capsys, *base, "--images", tmp_path / "nowhere")
    assert "--images: " in err and "No such file" in err
    words = (*base, "--images", folders)
    err = refuse(capsys, *words, "--foreign", tmp_path / "nowhere")
    assert "--foreign: " in err
    foreign = write_folders(tmp_path / "foreign", seed=6)
    (foreign / "00001").rename(foreign / "x")
    (foreign / "00002").rename(foreign / "00001")
    err = refuse(capsys, *words, "--foreign", foreign)
    assert "take folders of the same prompts in the same order" in err
    results = write_results(tmp_path / "r.jsonl", folders, lambda number, sample: True)
    lines = read_lines(results)
    bad = tmp_path / "bad.jsonl"
    cases = [
        (lines[1:], "1 images have no verdict, such as 00000/samples/0000.png"),
        ([*lines, {**lines[0], "filename": "a/b.png"}], "1 verdicts no image, such as a/b.png"),
        ([*lines, lines[0]], "00000/samples/0000.png has two verdicts"),
        ([{**lines[0], "prompt": "a cow"}, *lines[1:]], "found the prompt 'a cow' of tag"),
        ([{**lines[0], "correct": "yes"}, *lines[1:]], "expected true or false"),
    ]
    for rows, message in cases:
        err = refuse(capsys, *words, "--verdicts", write_lines(bad, rows))
        assert message in err and "--verdicts: " in err
    (folders / "manifest.json").write_text(json.dumps({"settings": {"seed": 20}}))
    (tmp_path / "report.json").write_text(json.dumps({"settings": {"seed": 3}}))
    err = refuse(capsys, *words, "--verdicts", results)
    assert "are about images with seed 3; these have 20" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("_no_model")
def test_options_without_effect_are_refused(folders, prompts, tmp_path, capsys):
    base = ("--model", NANO, "--out", tmp_path / "out")
    assert "expected one of them" in refuse(capsys, *base)
    assert "expected one of them" in refuse(capsys, *base, "--images", "a", "--prompts", "b")
    words = (*base, "--images", folders)
    err = refuse(capsys, *words, "--seed", 3, "--rows", 2, "--foreign-verdicts", "x", "--strict",
                 "--judge", "http://h:1", "--process-id", 0)  # fmt: skip
    for option in ("--seed: has no effect on --images", "--rows: ", "--foreign-verdicts: ",
                   "--strict: ", "--process-id: the suite runs in one process"):  # fmt: skip
        assert option in err
    assert "expected less than" in refuse(capsys, *words, "--max-new-tokens", 250)
    err = refuse(capsys, *base, "--prompts", prompts, "--verdicts", "x.jsonl")
    assert "12 images of" in err and "draw them first, without --verdicts" in err
    # A judge that is not there is noticed at once.
    err = refuse(capsys, *words, "--judge", "http://127.0.0.1:9")
    assert "no answer after" in err and "start the server" in err
    assert "--judge: found" in refuse(capsys, *words, "--judge", "h:1")
    assert not (tmp_path / "out").exists()


def test_another_setting_in_the_same_folder_is_refused(folders, tmp_path, capsys):
    out = tmp_path / "out"
    ask(folders, out)
    words = ("--model", NANO, "--images", folders, "--out", out)
    assert "--max-new-tokens 12" in refuse(capsys, *words, "--max-new-tokens", 13)
    err = refuse(capsys, *words, "--max-new-tokens", TOKENS, "--dtype", "bfloat16")
    assert "--dtype float32; this command has bfloat16" in err
