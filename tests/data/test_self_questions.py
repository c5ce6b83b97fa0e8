"""Self-made records: templates letter by letter, independence of order, left out, read, refused."""

from __future__ import annotations

import collections
import dataclasses
import functools
import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from corl_jax.data import __main__ as data_command
from corl_jax.data.column_values import find_value_problem
from corl_jax.data.drawn_world import checker
from corl_jax.data.drawn_world import generator as drawn_world
from corl_jax.data.geneval_demands import CLASSES
from corl_jax.data.loader_options import LoaderOptions
from corl_jax.data.self_questions.generator import make_generated_record, write_records
from corl_jax.data.self_questions.known import KNOWN_OBJECTS
from corl_jax.data.self_questions.objects import (
    COLORS,
    OWN_OBJECTS,
    PLURALS,
    TAGS,
    add_article,
    form_geneval_plural,
)
from corl_jax.data.self_questions.reader import read_excluded, read_records
from corl_jax.data.self_questions.records import COLUMNS, make_record
from corl_jax.data.sources import open_source
from corl_jax.data.usable_rows import UsableRows
from corl_jax.errors import InputError
from corl_jax.rewards.self_answers import judge_answer, read_demand

# Tag, objects -> prompt, question, answer: a row of each kind as the published file has it.
PUBLISHED = [
    ("single_object", [{"class": "elephant", "count": 1}],
     "a photo of an elephant", "What is the main item in this image?", "elephant"),
    ("two_object", [{"class": "toaster", "count": 1}, {"class": "oven", "count": 1}],
     "a photo of a toaster and an oven", "What are two items in this image?",
     "There is a toaster and a oven"),
    ("counting", [{"class": "clock", "count": 2}],
     "a photo of two clocks", "How many items in this image?", "two clocks"),
    ("colors", [{"class": "car", "count": 1, "color": "orange"}],
     "a photo of an orange car", "What is the color of the object?", "orange"),
    ("position",
     [{"class": "teddy bear", "count": 1},
      {"class": "dog", "count": 1, "position": ["right of", 0]}],
     "a photo of a dog right of a teddy bear",
     "What are two objects and What is position relationship between two main items? "
     "Use one sentence.",
     "The dog is right of the teddy bear"),
    ("color_attr",
     [{"class": "tv", "count": 1, "color": "purple"},
      {"class": "umbrella", "count": 1, "color": "orange"}],
     "a photo of a purple tv and an orange umbrella",
     "What are two objects and the colors of two objects in the image? Use one sentence",
     "The tv is purple and the umbrella is orange"),
]  # fmt: skip


def write_lines(path, rows):
    path.write_text(
        "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
    )
    return path


@pytest.mark.parametrize(("tag", "include", "prompt", "question", "answer"), PUBLISHED)
def test_templates_are_the_published_ones(tag, include, prompt, question, answer):
    record = make_record(tag, include)
    assert (record.prompt, record.question, record.answer) == (prompt, question, answer)
    assert list(record.as_row()) == list(COLUMNS)


@pytest.mark.parametrize(
    ("noun", "count", "words"),
    [("toothbrush", 2, "two toothbrushs"), ("person", 3, "three persons")],
)
def test_the_answer_to_counting_has_the_words_of_a_given_prompt(noun, count, words):
    record = make_record("counting", [{"class": noun, "count": count}], f"a photo of {words}")
    assert record.answer == words
    assert judge_answer(words, read_demand(record.tag, record.include), strict=True) == 1.0


def test_counting_forbids_one_object_more():
    line = make_record("counting", [{"class": "clock", "count": 2}]).as_json()
    assert line["exclude"] == [{"class": "clock", "count": 3}]
    assert list(line) == ["tag", "include", "exclude", "prompt", "question", "answer"]


def test_the_list_has_160_objects_with_plurals():
    assert len(CLASSES) == len(OWN_OBJECTS) == 80 and len(PLURALS) == 160
    for noun, plural in (
        ("person", "people"), ("knife", "knives"), ("bus", "buses"), ("bench", "benches"),
        ("sheep", "sheep"), ("scissors", "scissors"), ("computer mouse", "computer mice"),
        ("wine glass", "wine glasses"), ("butterfly", "butterflies"), ("key", "keys"),
        ("axe", "axes"), ("fox", "foxes"), ("wolf", "wolves"),
    ):  # fmt: skip
        assert PLURALS[noun] == plural
    words = {word for noun in OWN_OBJECTS for word in noun.split()}
    assert not words & {*COLORS, *CLASSES}
    assert (form_geneval_plural("bench"), form_geneval_plural("bus")) == ("benchs", "buses")
    assert (add_article("oven"), add_article("hair drier")) == ("an oven", "a hair drier")


def test_a_record_depends_on_seed_and_index_alone():
    backwards = [make_generated_record(3, index) for index in reversed(range(40))]
    assert [make_generated_record(3, index) for index in range(40)] == backwards[::-1]
    assert make_generated_record(3, 0) != make_generated_record(4, 0)


def test_categories_and_their_parts_are_equally_likely():
    records = [make_generated_record(0, index) for index in range(3000)]
    tags = collections.Counter(record.tag for record in records)
    assert set(tags) == set(TAGS)
    # 500 of each are expected; 4 standard deviations are 82.
    assert all(abs(number - 500) < 82 for number in tags.values())
    counts = collections.Counter(r.include[0]["count"] for r in records if r.tag == "counting")
    assert set(counts) == {2, 3, 4} and min(counts.values()) > 110
    relations = collections.Counter(
        r.include[1]["position"][0] for r in records if r.tag == "position"
    )
    assert len(relations) == 4 and min(relations.values()) > 80
    colors = {entry["color"] for r in records if r.tag == "color_attr" for entry in r.include}
    assert colors == set(COLORS)
    nouns = {entry["class"] for record in records for entry in record.include}
    assert nouns == set(PLURALS)


def test_excluded_prompts_are_redrawn_and_the_others_stay(tmp_path):
    before = [make_generated_record(1, index) for index in range(200)]
    left_out = [record for record in before if record.tag == "single_object"]
    # GenEval spells some plurals in another way; the demand is the same.
    counted = next(record for record in before if record.tag == "counting")
    line = counted.as_json() | {"prompt": "a photo of spelled otherwise"}
    path = write_lines(tmp_path / "x.jsonl", [line, *(record.as_json() for record in left_out)])
    excluded = read_excluded(path)
    after = [make_generated_record(1, index, excluded) for index in range(200)]
    assert not {record.prompt for record in after} & {record.prompt for record in left_out}
    assert counted not in after
    for old, new in zip(before, after, strict=True):
        assert old == new or old in excluded
        assert old.tag == new.tag


def test_a_category_that_is_excluded_completely_is_refused(tmp_path):
    lines = [make_record("single_object", [{"class": noun, "count": 1}]) for noun in PLURALS]
    path = write_lines(tmp_path / "x.jsonl", [record.as_json() for record in lines])
    excluded = read_excluded(path)
    with pytest.raises(InputError, match="leave none of the category single_object"):
        [make_generated_record(0, index, excluded) for index in range(40)]


def test_published_records_are_read_into_columns(tmp_path):
    records = [make_generated_record(5, index) for index in range(60)]
    path = write_lines(tmp_path / "r.jsonl", [record.as_json() for record in records])
    assert read_records(path) == records


RECORD = {
    "tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a photo of a dog",
    "question": "What is the main item in this image?", "answer": "dog",
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"answer": None}, "answer: found NoneType; expected a text; write the true answer"),
        ({"answer": " "}, "answer: found an empty text"),
        ({"question": ...}, "question is missing; expected a JSON object with tag"),
        ({"answer": ...}, "answer is missing; write the true answer to its question"),
        ({"tag": "colours"}, "tag: found 'colours'; did you mean colors?"),
        ({"tag": 3}, "tag: found '3'"),
        ({"include": []}, "include: found []; expected a list of 1 entries"),
        ({"include": {"class": "dog"}}, "expected a list of 1"),
        ({"include": ["dog"]}, "include[0]: found 'dog'; expected {class, count"),
        ({"include": [{"class": "dgo", "count": 1}]}, "did you mean 'dog'?"),
        ({"include": [{"class": "robot", "count": 1}]}, '"plural": TEXT in the same entry'),
        ({"include": [{"class": "dog", "count": 2}]}, "count: found 2; expected 1"),
        ({"include": [{"class": "dog", "count": True}]}, "count: found True"),
        ({"include": [{"class": "dog", "count": 1, "size": 3}]}, "size: unknown key"),
        ({"include": [{"class": "dog", "count": 1, "color": "teal"}]}, "color: found 'teal'"),
        ({"include": [{"class": "dog", "count": 1, "position": ["above", 0]}]},
         "position: found one; expected one in the second entry"),
        ({"tag": "colors"}, "color: missing; expected one of black"),
        ({"tag": "counting"}, "count: found 1; expected 2 to 12 for tag counting"),
        ({"tag": "counting", "include": [{"class": "dog", "count": 2}],
          "exclude": [{"class": "dog", "count": 2}]}, "exclude: found"),
        ({"tag": "two_object", "include": [{"class": "dog", "count": 1}] * 2}, "dog twice"),
        ({"tag": "position", "include": [{"class": "dog", "count": 1},
          {"class": "cat", "count": 1}]}, "include[1]: position: missing"),
        ({"tag": "position", "include": [{"class": "dog", "count": 1},
          {"class": "cat", "count": 1, "position": ["near", 0]}]}, "position: found ['near', 0]"),
        ({"source": "x"}, "'source' is an unknown key"),
    ],
)  # fmt: skip
def test_what_is_no_record_is_refused_by_file_and_line(change, part, tmp_path):
    row = {key: value for key, value in (RECORD | change).items() if value is not ...}
    path = write_lines(tmp_path / "r.jsonl", [RECORD, row])
    with pytest.raises(InputError) as error:
        read_records(path)
    assert all(line.startswith(f"{path}:2: ") for line in error.value.problems)
    assert part in str(error.value)


def test_every_bad_line_is_named(tmp_path):
    path = write_lines(tmp_path / "r.jsonl", ["{\n", RECORD, "[]\n", RECORD | {"answer": ""}])
    with pytest.raises(InputError) as error:
        read_records(path)
    starts = [problem.removeprefix(f"{path}:")[0] for problem in error.value.problems]
    assert starts == ["1", "3", "4"]


def test_an_own_object_needs_its_plural_only(tmp_path):
    include = [{"class": "robot", "count": 3, "plural": "robots"}]
    record = make_record("counting", include)
    assert record.prompt == "a photo of three robots"
    path = write_lines(tmp_path / "r.jsonl", [record.as_json()])
    assert read_records(path) == [record]


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"class": "robot"}, '"plural": TEXT'),
        ({"count": 1}, "count: found 1; expected 2 to 12 for tag counting"),
    ],
)
def test_a_row_whose_answers_cannot_be_judged_is_left_out_before_it_is_used(change, part, tmp_path):
    first, second = (make_record("counting", [{"class": "dog", "count": n}]) for n in (2, 3))
    first = dataclasses.replace(first, include=[{"class": "dog", "count": 2} | change])
    source = open_source(str(write_records(tmp_path / "rows", [first, second])))
    check = functools.partial(find_value_problem, "include")
    options = LoaderOptions(tasks=(), batch_size=1, seed=0, readable={"include": check})
    usable = UsableRows(source, None, dataclasses.replace(options, max_bad_fraction=0.5))
    assert usable[0].columns == second.as_row() and usable.left_out["bad"] == [0]
    with pytest.raises(InputError) as error:
        UsableRows(source, None, options)[0]
    assert part in str(error.value)


@pytest.mark.parametrize("world", ["small", "full"])
def test_rows_of_the_drawn_world_are_records_too(world):
    rows = [
        drawn_world.make_row(9, index, world=world, encode=False, image_size=64)
        for index in range(60)
    ]
    for row in rows:
        spec = json.loads(row["spec"])
        assert row["tag"] == row["category"] == spec["category"]
        assert json.loads(row["include"]) == spec["include"]
        assert find_value_problem("include", row["include"]) is None
        assert all(entry["class"] in KNOWN_OBJECTS for entry in spec["include"])
        expected = make_record(row["tag"], spec["include"])
        assert (row["question"], row["answer"]) == (expected.question, expected.answer)
        # The prompt has the world's wording, and the words of the record.
        demanded = set(expected.prompt.removeprefix("a photo of ").split())
        assert demanded <= set(row["prompt"].split())
    images = np.stack([row["real_image"] for row in rows])
    assert np.mean(checker.check_all(images, [row["spec"] for row in rows])) > 0.95


def run(*arguments):
    data_command.main([str(argument) for argument in arguments])


def test_the_command_writes_records(tmp_path, capsys):
    kind = ("--kind", "self_questions")
    run(*kind, "--out", tmp_path / "a", "--rows", 12, "--seed", 2)
    run(*kind, "--out", tmp_path / "b", "--rows", 4, "--seed", 2, "--start", 8)
    first = pq.read_table(tmp_path / "a").to_pylist()
    assert first == [make_generated_record(2, index).as_row() for index in range(12)]
    assert pq.read_table(tmp_path / "b").to_pylist() == first[8:]
    lines = [make_generated_record(2, index).as_json() for index in range(12)]
    path = write_lines(tmp_path / "r.jsonl", lines)
    run(*kind, "--out", tmp_path / "c", "--records", path)
    assert pq.read_table(tmp_path / "c").to_pylist() == first
    run(*kind, "--out", tmp_path / "d", "--rows", 12, "--seed", 2, "--exclude", path)
    prompts = {row["prompt"] for row in pq.read_table(tmp_path / "d").to_pylist()}
    assert not prompts & {row["prompt"] for row in first}
    assert "12 prompts of" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--rows", "3"], "--seed: missing"),
        (["--rows", "0", "--seed", "1"], "--rows: 0 found, an integer of at least 1 expected"),
        (["--rows", "3", "--seed", "1", "--world", "small"], "--world: has an effect with"),
        (["--records", "none.jsonl"], "none.jsonl: cannot be read"),
        (["--records", "none.jsonl", "--seed", "1"], "--seed: contradicts --records"),
    ],
)
def test_the_command_refuses(arguments, part, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        run("--kind", "self_questions", "--out", tmp_path / "a", *arguments)
    assert error.value.code == 2
    assert part in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
