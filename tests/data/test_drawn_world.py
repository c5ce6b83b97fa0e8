"""The drawn world: rows, splits, questions, parquet, the exact checker, the mini tokenizer."""

from __future__ import annotations

import collections
import io
import json
import math
import re

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scipy import ndimage

from corl_jax.data import __main__ as data_command
from corl_jax.data import instructions
from corl_jax.data.drawn_world import checker, generator, language, scene
from corl_jax.data.drawn_world.scene import Object, Scene
from corl_jax.errors import InputError
from corl_jax.policies.janus import network
from corl_jax.policies.janus.checkpoint import KIND
from corl_jax.policies.janus.tokens import special_tokens
from corl_jax.weights.checkpoint import load_config, load_params
from tools.small_models import tokenizer as mini_tokenizer
from tools.small_models.__main__ import main
from tools.small_models.janus_sizes import make_mini_config

ROWS = 3000
FORMAT = re.compile(r"<think>.*?</think>[.\s]*<answer>.*?</answer>", re.DOTALL)


@pytest.fixture(scope="module")
def rows():
    return [generator.make_row(11, index, encode=False) for index in range(ROWS)]


@pytest.fixture(scope="module")
def specs(rows):
    return [json.loads(row["spec"]) for row in rows]


@pytest.fixture(scope="module")
def detections(rows):
    return checker.detect_all(np.stack([row["real_image"] for row in rows]))


def accuracy(images, specs):
    return np.mean(checker.check_all(np.stack(images), specs))


def blurred(image, sigma):
    return ndimage.gaussian_filter(image.astype(np.float32), (sigma, sigma, 0))


def test_checker_accepts_what_the_renderer_draws(detections, specs):
    held = [checker.satisfies(d, s) for d, s in zip(detections, specs, strict=True)]
    assert np.mean(held) >= 0.999


def test_checker_refuses_mismatched_pictures(detections, specs):
    rng = np.random.default_rng(0)
    pairs = [(i, int(j)) for i in range(ROWS) for j in rng.integers(ROWS, size=3)]
    keys = [scene.normalize_spec(spec) for spec in specs]
    passed = collections.defaultdict(list)
    for i, j in pairs:
        if keys[i] != keys[j]:
            verdict = checker.satisfies(detections[i], specs[j])
            passed[specs[j]["category"]].append(verdict)
    assert np.mean([v for verdicts in passed.values() for v in verdicts]) < 0.05
    assert all(np.mean(verdicts) < 0.05 for verdicts in passed.values()), passed.keys()


@pytest.mark.parametrize(("sigma", "noise"), [(0, 8), (0, 20), (1, 0), (1.5, 0), (1, 8)])
def test_checker_tolerates_blur_and_noise(rows, specs, sigma, noise):
    rng = np.random.default_rng(1)
    images = [
        np.clip(blurred(row["real_image"], sigma) + rng.normal(0, noise, (64, 64, 3)), 0, 255)
        for row in rows[:600]
    ]
    assert accuracy([image.astype(np.uint8) for image in images], specs[:600]) >= 0.995


def test_checker_tolerates_two_pixels_of_blur(rows, specs):
    images = [blurred(row["real_image"], 2).astype(np.uint8) for row in rows[:600]]
    assert accuracy(images, specs[:600]) >= 0.98


@pytest.mark.parametrize("size", [48, 128])
def test_checker_works_at_other_sizes(size):
    rows = [generator.make_row(3, index, size, encode=False) for index in range(150)]
    assert accuracy([r["real_image"] for r in rows], [r["spec"] for r in rows]) >= 0.98


def test_detections_say_where_and_what():
    drawn = Scene((Object("ring", "blue", 0.25, 0.3, 0.3), Object("cross", "red", 0.7, 0.7, 0.28)))
    found = checker.detect(scene.render(drawn))
    assert [(d.shape, d.color) for d in found] == [("ring", "blue"), ("cross", "red")]
    for detection, one in zip(found, drawn.objects, strict=True):
        assert np.allclose(detection.center, (one.x, one.y), atol=0.01)
        assert np.allclose(detection.box, one.box, atol=0.02)


def test_touching_objects_of_two_colors_are_two():
    drawn = Scene((Object("square", "blue", 0.3, 0.5, 0.3), Object("square", "red", 0.6, 0.5, 0.3)))
    found = checker.detect(scene.render(drawn))
    assert [(d.shape, d.color) for d in found] == [("square", "blue"), ("square", "red")]


@pytest.mark.parametrize("value", [0, 127, 255])
def test_a_plain_picture_holds_nothing(value):
    assert checker.detect(np.full((64, 64, 3), value, np.uint8)) == []


def test_noise_satisfies_nothing(specs):
    rng = np.random.default_rng(2)
    images = rng.integers(0, 256, (100, 64, 64, 3)).astype(np.uint8)
    assert accuracy(images, specs[:100]) == 0


def test_semantics_by_hand():
    def spec(category, *include):
        return {"category": category, "include": list(include)}

    red_circle = Object("circle", "red", 0.25, 0.5, 0.3)
    image = scene.render(Scene((red_circle, Object("square", "blue", 0.75, 0.5, 0.3))))
    circle, square = {"class": "circle", "count": 1}, {"class": "square", "count": 1}
    right, above = {"position": ["right of", 0]}, {"position": ["above", 0]}
    cases = [
        (spec("two_object", circle, square), True, True),
        (spec("single_object", circle), False, True),  # one more than demanded
        (spec("counting", circle), False, True),
        (spec("colors", circle | {"color": "blue"}), False, False),
        (spec("color_attr", circle | {"color": "red"}, square | {"color": "blue"}), True, True),
        (spec("color_attr", circle | {"color": "blue"}, square | {"color": "red"}), False, False),
        (spec("position", circle, square | right), True, True),
        (spec("position", circle, square | above), False, False),
    ]
    for demand, strict, loose in cases:
        assert checker.check(image, demand) is strict, demand
        assert checker.check(image, json.dumps(demand), strict=False) is loose, demand


def test_rows_depend_on_seed_and_index_alone():
    row = generator.make_row(5, 42)
    assert row == generator.make_row(5, 42)
    assert row != generator.make_row(6, 42)
    assert json.loads(row["spec"]) == generator.sample_spec_of_row(5, 42)


def test_every_category_has_its_share(rows):
    counts = collections.Counter(row["category"] for row in rows)
    assert set(counts) == set(scene.CATEGORIES)
    assert min(counts.values()) > ROWS / 6 * 0.8


def test_splits_are_disjoint_where_they_say_so():
    def keys(split):
        drawn = [generator.sample_spec_of_row(8, index, split) for index in range(3000)]
        return {
            name: {scene.normalize_spec(s) for s in drawn if s["category"] == name}
            for name in scene.CATEGORIES
        }

    train, test = keys("train"), keys("test")
    for name in scene.CATEGORIES:
        assert bool(train[name] & test[name]) != (name in scene.SPLIT_CATEGORIES), name
    assert len(train["single_object"]) == len(test["single_object"]) == 5


def test_held_out_ignores_order_and_wording():
    a, b = {"class": "circle", "count": 1}, {"class": "square", "count": 1}
    left = {"category": "position", "include": [a, b | {"position": ["left of", 0]}]}
    right = {"category": "position", "include": [b, a | {"position": ["right of", 0]}]}
    above = {"category": "position", "include": [b, a | {"position": ["above", 0]}]}
    combination = scene.normalize_spec
    assert combination(left) == combination(right) != combination(above)
    assert left["include"][1]["position"] == ["left of", 0]


def test_questions_are_answerable_and_in_the_templates(rows):
    for row in rows:
        kind, solution = row["qa_type"], row["qa_solution"]
        question, _, tail = row["qa_problem"].partition("\n\n")
        template = instructions.MCQ if kind == "MC" else instructions.VQA
        assert f"{question}\n\n{tail}" == template.format(question=question)
        assert FORMAT.fullmatch(row["sft_answer"]) and row["sft_answer"].endswith(solution)
        answer = solution.removeprefix("<answer>").removesuffix("</answer>")
        assert solution == f"<answer>{answer}</answer>"
        if kind == "OE":
            assert 1 <= len(answer.split()) <= 3 and "Options" not in question
            continue
        lines = question.split("\n")
        assert lines[1] == "Options:"
        options = dict(line.split(". ") for line in lines[2:])
        assert answer in options and len(set(options.values())) == len(options) <= 4


def test_answers_are_true_of_the_picture(rows, detections):
    """Two kinds of question, answered again from the detections."""
    checked = 0
    for row, found in zip(rows, detections, strict=True):
        question = row["qa_problem"].split("\n")[0]
        answer = row["qa_solution"].removeprefix("<answer>").removesuffix("</answer>")
        if row["qa_type"] == "MC":
            (answer,) = re.findall(rf"^{answer}\. (.*)$", row["qa_problem"], re.MULTILINE)
        if match := re.match(r"What color is the (\w+)\?", question):
            expected = {d.color for d in found if d.shape == match[1]}
        elif match := re.match(r"How many (\w+) are there\?", question):
            names = ["object" if match[1] == "objects" else d.shape for d in found]
            number = sum(match[1] in ("objects", language.make_plural(name)) for name in names)
            expected = {language.NUMBERS[number]}
        else:
            continue
        checked += 1
        assert expected == {answer}, row
    assert checked > ROWS / 5


def test_option_letters_are_balanced(rows):
    letters = collections.Counter(r["qa_solution"] for r in rows if r["qa_type"] == "MC")
    assert letters["<answer>C</answer>"] > sum(letters.values()) / 8


def test_parquet_is_in_the_published_layout(tmp_path):
    path = generator.write_rows(tmp_path / "data", 230, 1, start=7, split="train")
    assert path.name == "train-00000-of-00001.parquet"
    file = pq.ParquetFile(path)
    assert [file.metadata.row_group(i).num_rows for i in range(3)] == [100, 100, 30]
    features = json.loads(file.schema_arrow.metadata[b"huggingface"])["info"]["features"]
    assert features["real_image"] == {"_type": "Image"}
    assert list(features) == file.schema_arrow.names
    row = file.read().slice(200, 1).to_pylist()[0]
    assert row == generator.make_row(1, 207, split="train")
    image = Image.open(io.BytesIO(row["real_image"]["bytes"]))
    assert (image.format, image.mode, image.size) == ("PNG", "RGB", (64, 64))


def test_command_reports_all_problems_and_writes_nothing(tmp_path, capsys):
    (tmp_path / "file").write_text("kept")
    arguments = ["--out", str(tmp_path), "--rows", "0", "--seed", "-1", "--image-size", "8"]
    with pytest.raises(SystemExit, match="2"):
        data_command.main(arguments)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and any("directory with files" in line for line in lines)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(generator, "make_row", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generator.write_rows(tmp_path / "data", 10, 0)
    assert list(tmp_path.iterdir()) == []


def test_write_accepts_an_empty_directory(tmp_path):
    generator.write_rows(tmp_path, 2, 0)
    with pytest.raises(InputError):
        generator.write_rows(tmp_path, 2, 0)


@pytest.fixture(scope="module")
def tokenizer():
    return mini_tokenizer.train_tokenizer(0)


def test_round_trip_of_any_text(tokenizer):
    for text in ("a photo of a red circle", "é ½ 漢 \x07 42\n\n x", "<think>a.</think>"):
        encoded = tokenizer.encode(text)
        assert encoded.tokens[0] == "<｜begin▁of▁sentence｜>"
        assert tokenizer.decode(encoded.ids) == text


def test_texts_are_short(tokenizer, rows):
    for row in rows[:500]:
        lengths = [
            len(tokenizer.encode(row[k]).ids) for k in ("qa_problem", "sft_answer", "prompt")
        ]
        assert lengths[0] + lengths[1] < 160 and lengths[2] < 24


def test_every_word_of_the_world_is_one_token(tokenizer):
    for word in (*scene.SHAPES, *scene.COLORS, *language.NUMBERS[1:5]):
        assert len(tokenizer.encode(f" {word}", add_special_tokens=False).ids) == 1, word


def test_model_stays_small(tokenizer):
    assert {tokenizer.token_to_id(t) for t in mini_tokenizer.SPECIAL_TOKENS} == set(
        range(
            tokenizer.get_vocab_size() - len(mini_tokenizer.SPECIAL_TOKENS),
            tokenizer.get_vocab_size(),
        )
    )
    shapes_of = jax.tree.leaves(
        network.abstract(make_mini_config(mini_tokenizer.count_embedding_rows(tokenizer)))
    )
    assert sum(math.prod(leaf.shape) for leaf in shapes_of) * 2 < 7.8e6


def test_command_writes_a_checkpoint_that_loads(tmp_path, capsys):
    main(["--out", str(tmp_path / "mini")])
    assert "parameters" in capsys.readouterr().out
    config = load_config(tmp_path / "mini", KIND)
    tokens = special_tokens(tmp_path / "mini")
    assert config == make_mini_config(config.llama.vocab_size)
    assert tokens.bos < tokens.eos < tokens.pad < tokens.boi < tokens.image
    read = jax.tree.map(np.shape, load_params(tmp_path / "mini", KIND))
    assert read == jax.tree.map(lambda leaf: leaf.shape, network.abstract(config))
    with pytest.raises(SystemExit, match="2"):
        main(["--out", str(tmp_path / "mini")])
