"""Evaluation: intervals by hand, the scorers on perfect and wrong work, the same rows in any
batches and on a mesh, and the command from files to files."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from corl_jax import policies
from corl_jax.compare import __main__ as compare
from corl_jax.config import schema
from corl_jax.data.dataset import Loader, LoaderOptions
from corl_jax.data.drawn_world import generator
from corl_jax.data.drawn_world.held_out import HeldOutShapes
from corl_jax.data.drawn_world.scene import CATEGORIES
from corl_jax.devices.mesh import batch_sharding, make_mesh, param_shardings
from corl_jax.errors import InputError
from corl_jax.evaluate import __main__ as evaluate
from corl_jax.evaluate import shapes as shapes_command
from corl_jax.evaluation import SUITES, EvaluationInputs, shapes
from corl_jax.evaluation.intervals import Rate
from corl_jax.evaluation.shapes import evaluate_shapes
from corl_jax.evaluation.units import read_units
from corl_jax.params import map_with_path
from corl_jax.policies import PolicyFiles, load_policy
from corl_jax.policies.family import SamplingOptions
from corl_jax.policies.janus import network, sampling
from corl_jax.policies.janus.checkpoint import KIND
from corl_jax.policies.janus.family import FAMILY
from corl_jax.policies.janus.images import decode_images
from corl_jax.policies.janus.layout import RULES
from corl_jax.rewards.samples import Policy
from corl_jax.runs import pictures
from corl_jax.types import Prompts
from corl_jax.weights.export import save_checkpoint
from tests.support import metrics_page
from tests.support.tiny_models import tiny_parquet, tiny_tokenizer_dir

ROWS = 6
NAMES = (
    "draw/accuracy",
    *(f"draw/{category}" for category in CATEGORIES),
    *(f"answer/{name}" for name in ("accuracy", "mc", "oe", "format")),
)
SHORT = {"cfg_scale": 5.0, "max_new_tokens": 6, "dtype": jnp.float32}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory, tiny_config):
    """A random Janus with room for the instructions, as a directory that commands take."""
    config = dataclasses.replace(
        tiny_config,
        llama=dataclasses.replace(
            tiny_config.llama, vocab_size=400, num_layers=1, max_position_embeddings=1024
        ),
    )
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        noise = 0.15 * rng.standard_normal(leaf.shape).astype(np.float32)
        return noise + 1 if path.endswith("/scale") else noise

    folder = tmp_path_factory.mktemp("models") / "tiny"
    params = map_with_path(draw, network.abstract(config))
    save_checkpoint(folder, KIND, config, params, layout="jax")
    words = tiny_tokenizer_dir(folder.parent / "words", image_size=16, patch_size=4)
    shutil.copytree(words, folder, dirs_exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def model(model_dir):
    return load_policy(model_dir)


@pytest.fixture(scope="module")
def drawn():
    """Columns of rows of the drawn world, pictures as arrays."""
    rows = [generator.make_row(11, i, split="test", encode=False) for i in range(150)]
    return {name: [row[name] for row in rows] for name in rows[0]}


def loader(model, batch_size: int, rows: int = ROWS) -> Loader:
    options = LoaderOptions(
        tasks=("t2i", "mm2t"), batch_size=batch_size, seed=0, shuffle=False, lengths="dataset"
    )
    return Loader(HeldOutShapes(rows, 5), model.processor, options)


def measure(model, batches, seed: int = 3, **options):
    policy = Policy(model.family, model.sizes, model.params, model.processor, jnp.float32)
    sampling = SamplingOptions(model.processor.special, **SHORT)
    return evaluate_shapes(EvaluationInputs(policy, batches, sampling, seed, **options))


@pytest.fixture(scope="module")
def report(model):
    return measure(model, loader(model, 4))


# ---- rates


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [
        (5, 10, 0.23659, 0.76341),
        (0, 10, 0.0, 0.27753),
        (10, 10, 0.72247, 1.0),
        (1, 1, 0.20654, 1.0),
        (81, 263, 0.25527, 0.36621),  # Newcombe 1998, table I, method 3
        (15, 148, 0.06237, 0.16053),
    ],
)
def test_wilson_intervals_by_hand(hits, n, low, high):
    rate = Rate.of(hits, n)
    assert (rate.mean, rate.n) == (hits / n, n)
    assert (rate.low, rate.high) == pytest.approx((low, high), abs=1e-4)
    assert rate.low <= rate.mean <= rate.high


def test_no_try_says_nothing(drawn):
    rate = Rate.of(0, 0)
    assert math.isnan(rate.mean) and (rate.low, rate.high, rate.n) == (0.0, 1.0, 0)
    rates = shapes.compute_rates([True], ["counting"], [])
    report = shapes.ShapesReport(rates, np.zeros((1, 4, 4, 3), np.uint8), ["p"], [True], [])
    assert set(report.metrics()) == {
        f"eval/draw/{name}{suffix}"
        for name in ("accuracy", "counting")
        for suffix in ("", "_low", "_high")
    }
    assert report.as_json()["rates"]["answer/mc"]["mean"] is None
    assert json.loads(json.dumps(report.as_json(), allow_nan=False))["rows"] == 1


def test_the_page_of_metrics_lists_them(report):
    found = report.metrics()
    assert not metrics_page.missing(found)
    elsewhere = [
        "eval/seconds", "eval/TASK/NAME", "eval/TASK/NAME_stderr", "eval/answer/unread",
        "eval/answer/f1", "eval/answer/f1_low", "eval/answer/f1_high",
    ]  # fmt: skip
    assert metrics_page.never(["Evaluations"], found) == elsewhere


# ---- scorers


def test_perfect_work_scores_one(drawn):
    passed = shapes.score_images(np.stack(drawn["real_image"]), drawn)
    answers = shapes.score_answers(drawn["sft_answer"], drawn)
    rates = shapes.compute_rates(passed, drawn["category"], answers)
    assert tuple(rates) == NAMES
    assert all(rate.mean == 1.0 and rate.n for rate in rates.values())
    assert rates["answer/mc"].n + rates["answer/oe"].n == rates["answer/accuracy"].n == 150
    assert sum(rates[f"draw/{category}"].n for category in CATEGORIES) == 150


def test_wrong_work_scores_about_nothing(drawn):
    others = np.roll(np.stack(drawn["real_image"]), 1, axis=0)
    assert np.mean(shapes.score_images(others, drawn)) < 0.06
    blank = np.full_like(others, 248)
    assert not any(shapes.score_images(blank, drawn))
    answers = shapes.score_answers(["<think>.</think><answer>what?</answer>"] * 150, drawn)
    assert not any(a["correct"] for a in answers) and all(a["format"] for a in answers)
    bare = [text.rpartition("</think>")[2] for text in drawn["sft_answer"]]
    answers = shapes.score_answers(bare, drawn)
    assert all(a["correct"] for a in answers) and not any(a["format"] for a in answers)


def test_half_an_open_answer_is_not_right():
    columns = {
        "qa_problem": ["?"],
        "qa_solution": ["<answer>a red ring</answer>"],
        "qa_type": ["OE"],
    }
    (answer,) = shapes.score_answers(["<answer>a red</answer>"], columns)
    assert not answer["correct"]


@pytest.mark.parametrize(("spelling", "kind"), [("mcq", "MC"), ("Open-ended", "OE")])
def test_question_types_in_usual_spellings_count_as_what_they_are(spelling, kind):
    columns = {"qa_problem": ["?"], "qa_solution": ["<answer>A</answer>"], "qa_type": [spelling]}
    answers = shapes.score_answers(["<answer>A</answer>"], columns)
    assert answers[0]["qa_type"] == kind and answers[0]["correct"]
    assert shapes.compute_rates([True], ["counting"], answers)[f"answer/{kind.lower()}"].n == 1


def test_held_out_rows_are_no_training_rows():
    held = HeldOutShapes(40, 7)
    train = [generator.make_row(7, i, split="train") for i in range(40)]
    pictures = {row["real_image"]["bytes"] for row in train}
    assert not pictures & {held[i]["real_image"]["bytes"] for i in range(40)}
    assert held.column("spec") == HeldOutShapes(40, 7).column("spec")
    assert held.column("spec") != HeldOutShapes(40, 8).column("spec")


# ---- the same rows in any company


def assert_same(report, other):
    # The same codes; their pixels are cut to whole numbers after rounding that a batch decides.
    difference = np.abs(report.images.astype(int) - other.images.astype(int))
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-3
    assert report.answers == other.answers
    assert (report.passed, report.prompts) == (other.passed, other.prompts)


def test_each_row_counts_once(report, model):
    held = HeldOutShapes(ROWS, 5)
    assert report.prompts == held.column("prompt")  # of batches of 4, the second is half repeats
    assert [a["question"] for a in report.answers] == held.column("qa_problem")
    assert report.images.shape == (ROWS, 16, 16, 3) and report.images.dtype == np.uint8
    assert report.rates["draw/accuracy"].n == report.rates["answer/format"].n == ROWS
    assert len({image.tobytes() for image in report.images}) == ROWS
    assert any(a["answer"] for a in report.answers)


def test_batch_size_changes_nothing(report, model):
    assert_same(report, measure(model, loader(model, 3)))


def test_a_partial_batch_compiles_nothing_new(report, model):
    first, second = loader(model, 4).batch(0), loader(model, 4).batch(1)
    partial = Prompts(
        second.index[:2],
        {name: values[:2] for name, values in second.columns.items()},
        jax.tree.map(lambda x: x[:2], second.encoded),
    )
    programs = sampling.image_program.default, sampling.text_program.default, decode_images
    before = [program._cache_size() for program in programs]
    assert_same(report, measure(model, [first, partial]))
    assert [program._cache_size() for program in programs] == before


def test_rows_cut_and_seeds_matter(report, model):
    fewer = measure(model, loader(model, 4), rows=3)
    assert fewer.prompts == report.prompts[:3]
    np.testing.assert_array_equal(fewer.images, report.images[:3])
    other = measure(model, loader(model, 4), seed=4)
    assert all((a != b).any() for a, b in zip(report.images, other.images, strict=True))
    assert other.answers == report.answers  # greedy


def test_a_mesh_changes_nothing(report, model):
    mesh = make_mesh(data=4, devices=jax.devices()[:4])
    params = jax.device_put(model.params, param_shardings(model.params, mesh, RULES))
    rows = batch_sharding(mesh)
    with jax.set_mesh(mesh):
        spread = measure(
            dataclasses.replace(model, params=params), loader(model, 4),
            place=lambda tree: jax.device_put(tree, rows),
        )  # fmt: skip
    assert_same(report, spread)


# ---- bad rows


def test_bad_columns_stop_before_sampling(model, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("sampled")

    monkeypatch.setattr(sampling, "sample_images", never)
    batch = loader(model, 4).batch(0)
    columns = {k: v for k, v in batch.columns.items() if k not in ("spec", "qa_type")}
    with pytest.raises(InputError) as error:
        encoded = {"t2i": batch.encoded["t2i"]}
        measure(model, [dataclasses.replace(batch, columns=columns, encoded=encoded)])
    assert [p.split(" is ")[0] for p in error.value.problems[1:]] == [
        "evaluation: column spec", "evaluation: column qa_type"
    ]  # fmt: skip
    broken = {
        **batch.columns,
        "spec": ["{", *batch.columns["spec"][1:]],
        "category": [*batch.columns["category"][:3], "pets"],
        "qa_solution": [batch.columns["qa_solution"][0], "<answer> </answer>", None, "x"],
        "qa_type": ["mcq", "Open-ended", "essay", None],
    }
    with pytest.raises(InputError) as error:
        measure(model, [dataclasses.replace(batch, columns=broken)])
    text = str(error.value)
    assert len(error.value.problems) == 6
    assert "row 2: qa_type: found 'essay'" in text and "row 3: qa_type is empty" in text
    assert "row 0: spec" in text and "row 3: category is 'pets'" in text
    assert "row 1: qa_solution is empty" in text and "row 2: qa_solution is empty" in text
    with pytest.raises(InputError, match="no rows"):
        measure(model, [])


def test_rows_in_memory_are_of_the_world_that_fits_the_model(tiny_config):
    args = argparse.Namespace(suite="shapes", data=None, rows=3, seed=7, world=None)
    for size, world in ((16, "small"), (64, "full")):
        siglip = dataclasses.replace(tiny_config.siglip, image_size=size)
        config = dataclasses.replace(tiny_config, siglip=siglip)
        rows = shapes_command.open_rows(args, PolicyFiles(FAMILY, config, None, Path()))
        assert rows.column("spec") == HeldOutShapes(3, 7, world).column("spec")


def test_the_page_frames_right_and_wrong_images(report):
    title = pictures.LINE + pictures.MARGIN
    page = report.draw("step 0", 2, 2).pixels
    plain = report.draw("", 2, 2).pixels
    assert page.shape == (plain.shape[0] + title, *plain.shape[1:])
    assert np.array_equal(page[title + pictures.MARGIN :], plain[pictures.MARGIN :])
    for passed, ink in ((True, (20, 120, 50)), (False, (190, 30, 30))):
        marked = dataclasses.replace(report, passed=[passed] * ROWS)
        frame = marked.draw("", 1).pixels[pictures.MARGIN - 1, pictures.MARGIN : 100]
        assert (frame == ink).all()


def test_the_option_lists_the_suites():
    description = schema.Eval.model_fields["suite"].description
    assert all(f"{name}:" in description for name in SUITES)


def test_the_command_refuses_a_suite_that_needs_a_run(model_dir, capsys):
    for suite in ("rewards", "shape"):
        error = refusal(capsys, model_dir, "--suite", suite)
        assert f"--suite: found {suite}; " in error and "shapes" in error


# ---- rewards


def test_held_out_rows_count_once():
    """Seven rows in batches of three: the last batch runs into a second pass."""
    rewards = np.array([1, 2, 3, 4, 5, 6, 7, np.nan], np.float32)

    def batches(first, last):
        for start in range(3 * first, 3 * last, 3):
            yield Prompts(np.arange(start, start + 3), {})

    def score(prompts):
        return {"t2i/r": np.repeat(rewards[prompts.index % 7], 2)}

    def measure(rows):
        loader = SimpleNamespace(source=range(7), batch_size=3, iterate=batches)
        inputs = EvaluationInputs(None, loader, SHORT, seed=0, rows=rows, score=score)
        return SUITES["rewards"].evaluate(inputs).metrics()

    everything = measure(99)
    assert everything["eval/t2i/r"] == pytest.approx(4.0)
    spread = np.std(np.repeat(np.arange(1.0, 8), 2), ddof=1) / np.sqrt(14)
    assert everything["eval/t2i/r_stderr"] == pytest.approx(spread)
    assert measure(4)["eval/t2i/r"] == pytest.approx(2.5)


# ---- the command


def run(model_dir, *args: str) -> None:
    evaluate.main(["--model", str(model_dir), "--max-new-tokens", "6", *args])


def test_command_writes_its_report(model_dir, report, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    options = ("--rows", str(ROWS), "--batch-size", "4", "--seed", "5", "--world", "full")
    run(model_dir, *options, "--out", str(out))
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["metric", "mean", "95%", "interval", "n"]
    assert [line.split()[0] for line in printed[1:]] == list(NAMES)
    assert sorted(file.name for file in out.iterdir()) == [
        "answers.jsonl", "grid.png", "report.json", "scores.jsonl"
    ]  # fmt: skip
    found = json.loads((out / "report.json").read_text())
    assert found["rows"] == ROWS and found["settings"]["dtype"] == "float32"
    assert [d["prompt"] for d in found["drawings"]] == report.prompts
    assert found["rates"]["draw/accuracy"]["n"] == ROWS
    lines = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == list(range(ROWS))
    assert [line["answer"] for line in lines] == [a["answer"] for a in report.answers]
    units = read_units(out)
    assert [unit.name for unit in units] == [f"{n:05}: {p}" for n, p in enumerate(report.prompts)]
    for metric in ("draw", "answer"):
        mean = np.mean([unit.values[metric] for unit in units])
        assert found["rates"][f"{metric}/accuracy"]["mean"] == pytest.approx(mean)
    compare.main([str(out), str(out)])
    assert "draw: all units" in capsys.readouterr().out
    with Image.open(out / "grid.png") as grid:
        assert grid.width == ROWS * (128 + pictures.MARGIN) + pictures.MARGIN


def test_command_reads_files(model_dir, tmp_path, capsys):
    path = generator.write_rows(tmp_path / "data", 5, 2, split="test")
    run(model_dir, "--data", str(path), "--batch-size", "4")
    printed = capsys.readouterr()
    assert printed.out.splitlines()[1].split()[-1] == "5"
    assert printed.err.splitlines()[-1].startswith("5 rows in ")


def refusal(capsys, model_dir, *args: str) -> str:
    with pytest.raises(SystemExit) as stop:
        run(model_dir, *args)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_command_refuses_bad_input_before_any_device_work(model_dir, tmp_path, capsys, monkeypatch):
    def never(*args):
        raise AssertionError("loaded weights")

    monkeypatch.setattr(policies, "load_policy", never)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    error = refusal(
        capsys, tmp_path / "no-model", "--data", str(tmp_path / "no.parquet"), "--cfg-scale=nan",
        "--batch-size=0", "--temperature=0", "--out", str(tmp_path / "out"),
    )  # fmt: skip
    for name in ("--batch-size", "--cfg-scale", "--temperature", "--out", "no-model", "no.parquet"):
        assert name in error
    assert "--rows: found 0" in refusal(capsys, model_dir, "--rows=0")
    assert "--seed: found -1" in refusal(capsys, model_dir, "--seed=-1")
    published = tiny_parquet(tmp_path / "published.parquet", 3)
    error = refusal(capsys, model_dir, "--data", str(published))
    assert "column spec" in error and "column category" in error
    rows = [generator.make_row(0, i) for i in range(3)]
    rows[0]["real_image"] = {"bytes": b"no picture", "path": None}
    rows[1]["prompt"] = " "
    rows[2]["spec"] = "[]"
    broken = tiny_parquet(tmp_path / "broken.parquet", rows)
    error = refusal(capsys, model_dir, "--data", str(broken))
    assert "row 0: image" in error and "row 1: prompt is empty" in error
    assert "row 2: spec" in error
    assert "has 3 rows" in refusal(capsys, model_dir, "--data", str(broken), "--rows", "4")
    good = tiny_parquet(tmp_path / "good.parquet", [generator.make_row(0, 0)])
    error = refusal(capsys, model_dir, "--data", str(good), "--world", "full")
    assert "--world: --data has its own rows" in error
    error = refusal(capsys, model_dir, "--data", str(good), "--max-new-tokens", "1024")
    assert "its mm2t prompt has" in error
