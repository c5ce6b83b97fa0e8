"""The rules for answers about one's own images: each row of the table by hand, and its traps."""

from __future__ import annotations

import json

import numpy as np
import pytest

from corl_jax.data.drawn_world import generator as drawn_world
from corl_jax.data.self_questions.generator import make_generated_record
from corl_jax.data.self_questions.objects import PLURALS, form_geneval_plural
from corl_jax.data.self_questions.records import make_record
from corl_jax.errors import InputError
from corl_jax.rewards import registry
from corl_jax.rewards.samples import Context, Samples
from corl_jax.rewards.self_answers import judge_answer, read_demand

CONTEXT = Context(None, None, None, None, None, 0, 0)


def thing(noun, color=None, count=1, relation=None):
    entry = {"class": noun, "count": count}
    if color:
        entry["color"] = color
    if relation:
        entry["position"] = [relation, 0]
    return entry


SINGLE = ("single_object", [thing("dog")])
HOT_DOG = ("single_object", [thing("hot dog")])
TV = ("single_object", [thing("tv")])
PERSON = ("single_object", [thing("person")])
FRUIT = ("single_object", [thing("orange")])
TWO = ("two_object", [thing("oven"), thing("sheep")])
COUNT = ("counting", [thing("clock", count=2)])
SHEEP = ("counting", [thing("sheep", count=3)])
RED = ("colors", [thing("car", "red")])
BLUE_FRUIT = ("colors", [thing("orange", "blue")])
# "a photo of a dog left of a cat"
LEFT = ("position", [thing("cat"), thing("dog", relation="left of")])
ABOVE = ("position", [thing("cat"), thing("dog", relation="above")])
PAIR = ("color_attr", [thing("car", "red"), thing("dog", "blue")])
FRUITS = ("color_attr", [thing("orange", "orange"), thing("car", "blue")])

RIGHT = [
    (SINGLE, "dog"), (SINGLE, "A DOG."), (SINGLE, "The main items are two dogs!"),
    (SINGLE, "the dog's tail"), (SINGLE, "<think>a cat</think><answer>dog</answer>"),
    (HOT_DOG, "It is a hot-dog"), (HOT_DOG, "hot dogs"), (TV, "tvs"), (PERSON, "people"),
    (PERSON, "persons"), (FRUIT, "an orange"), (FRUIT, "oranges"),
    (TWO, "There is a oven and a sheep"), (TWO, "sheep, ovens"), (TWO, "An oven beside sheeps"),
    (COUNT, "two clocks"), (COUNT, "2"), (COUNT, "There are 2 clocks: two of them."),
    (COUNT, "II or 2 things"), (SHEEP, "three sheep"), (SHEEP, "3 sheeps"),
    (RED, "red"), (RED, "The car is Red."), (RED, "It's a dark-red car"), (RED, "red, very red"),
    (BLUE_FRUIT, "The orange is blue"), (BLUE_FRUIT, "blue"),
    (LEFT, "The dog is left of the cat"), (LEFT, "A dog to the left of a cat."),
    (LEFT, "the dog is on the left of the cat"), (LEFT, "The cat is right of the dog"),
    (LEFT, "The cat is to the right of the dog"), (LEFT, "dog to the left side of the cat"),
    (LEFT, "There is a dog and a cat. The dogs are left of the cats."),
    (ABOVE, "The dog is on top of the cat"), (ABOVE, "The dog is over the cat"),
    (ABOVE, "The cat is under the dog"), (ABOVE, "The cat sits beneath a dog"),
    (ABOVE, "The cat is below the dog"), (ABOVE, "the dog is above the cat, the cat below the dog"),
    (PAIR, "The car is red and the dog is blue"), (PAIR, "a red car and a blue dog"),
    (PAIR, "The car is red, the dog is blue"), (PAIR, "red car, blue dog"),
    (PAIR, "car: red, dog: blue"), (PAIR, "Red: car; blue: dog"), (PAIR, "car red dog blue"),
    (PAIR, "The dog is blue and the car is red"), (PAIR, "blue dogs and red cars"),
    (PAIR, "The color of the car is red and the color of the dog is blue."),
    (PAIR, "There is a car and a blue dog. The car is red."),
    (PAIR, "The car looks bright red, and the dog seems to be blue"),
    (FRUITS, "The orange is orange and the car is blue"), (FRUITS, "orange orange, blue car"),
]  # fmt: skip
WRONG = [
    (SINGLE, ""), (SINGLE, "cat"), (SINGLE, "hot dog"), (SINGLE, "hot dogs"), (SINGLE, "dogma"),
    (SINGLE, "<think>dog</think><answer>cat</answer>"), (HOT_DOG, "dog"), (HOT_DOG, "a hot cat"),
    (TV, "a tv remote"), (TV, "two tv remotes"), (PERSON, "personal"), (FRUIT, "red"),
    (TWO, "an oven"), (TWO, "a microwave oven"), (TWO, "sheep and a toaster"),
    (COUNT, "two hundred clocks"), (COUNT, "2 hundred clocks"), (COUNT, "twenty-two clocks"),
    (COUNT, "22 clocks"), (COUNT, "two or three clocks"), (COUNT, "two and three"),
    (COUNT, "clocks"), (COUNT, "2nd clock"), (COUNT, "twofold"), (COUNT, "1 2 3 4"),
    (COUNT, "two, one of them big"), (COUNT, "two point five"), (COUNT, "zero or two"),
    (SHEEP, "sheep"),
    (RED, "infrared"), (RED, "reddish"), (RED, "blue"), (RED, "red and blue"), (RED, "red-brown"),
    (RED, "an orange red car"), (RED, ""), (BLUE_FRUIT, "orange"), (BLUE_FRUIT, "red orange"),
    (LEFT, "The dog is right of the cat"), (LEFT, "The cat is left of the dog"),
    (LEFT, "dog, cat, left of"), (LEFT, "The dog is left of the bird and the cat"),
    (LEFT, "The dog is left of the hot dog"), (LEFT, "The dog is near the cat"),
    (LEFT, "The dog is left of or right of the cat"),
    (LEFT, "The dog is left of the cat. The dog is right of the cat."),
    (LEFT, "left of the dog the cat"), (LEFT, "The dog is above the cat"),
    (ABOVE, "The cat is above the dog"), (ABOVE, "The dog is under the cat"),
    (ABOVE, "the dog is on the cat"), (ABOVE, "overhead dog cat"),
    (PAIR, "The car is blue and the dog is red"), (PAIR, "a blue car and a red dog"),
    (PAIR, "red car and dog"), (PAIR, "Blue: car; red: dog"), (PAIR, "car: blue, dog: red"),
    (PAIR, "red and blue car and dog"),
    (PAIR, "The car and the dog are red and blue"), (PAIR, "The car is red"),
    (PAIR, "The car is red and the dog is red"), (PAIR, "The car is infrared, the dog is blue"),
    (PAIR, "The car is red and the hot dog is blue"), (PAIR, "car red blue dog green dog"),
    (PAIR, "The car is red and blue, the dog"), (PAIR, "The red car is green, the dog is blue"),
    (FRUITS, "The orange is blue and the car is orange"), (FRUITS, "orange and blue car"),
]  # fmt: skip


@pytest.mark.parametrize(("record", "answer"), RIGHT)
def test_right_answers(record, answer):
    assert judge_answer(answer, read_demand(*record)) == 1.0


@pytest.mark.parametrize(("record", "answer"), WRONG)
def test_wrong_answers(record, answer):
    assert judge_answer(answer, read_demand(*record)) == 0.0


def test_strict_counting_needs_the_class():
    demand = read_demand(*COUNT)
    judged = [judge_answer(x, demand, strict=True) for x in ("two clocks", "a clock, 2", "two")]
    assert judged == [1.0, 1.0, 0.0]
    assert judge_answer("two tvs", demand) == 1.0
    assert judge_answer("two tvs", demand, strict=True) == 0.0


@pytest.mark.parametrize(
    ("record", "answer", "points"),
    [
        (TWO, "an oven", 0.5), (TWO, "oven and sheep", 1.0), (TWO, "dog", 0.0),
        (PAIR, "The car is red", 0.5), (PAIR, "a red car and a red dog", 0.5),
        (PAIR, "The car is blue and the dog is red", 0.0), (PAIR, "a red car, a blue dog", 1.0),
        (LEFT, "The dog is right of the cat", 0.0), (COUNT, "two clocks and one", 0.0),
        (SINGLE, "dog", 1.0),
    ],
)  # fmt: skip
def test_partial_gives_half_a_point_an_object(record, answer, points):
    assert judge_answer(answer, read_demand(*record), partial=True) == points


@pytest.mark.parametrize("noun", PLURALS)
def test_every_object_is_found_in_each_of_its_forms(noun):
    demand = read_demand("single_object", [thing(noun)])
    for form in (noun, PLURALS[noun], form_geneval_plural(noun)):
        assert judge_answer(f"It shows {form.upper()}.", demand) == 1.0
    others = [other for other in PLURALS if other != noun]
    assert judge_answer(" and ".join(others), demand) == 0.0


def list_records():
    generated = [make_generated_record(17, index) for index in range(240)]
    rows = [drawn_world.make_row(5, index, encode=False) for index in range(60)]
    return generated, [make_record(row["tag"], json.loads(row["include"])) for row in rows]


def mean_the_same(first, second):
    """Whether an answer to one record answers the other as well."""

    def key(record):
        include = record.include
        if record.tag == "colors":
            return include[0]["color"]
        if record.tag == "counting":
            return include[0]["count"]
        if record.tag == "position":
            other, (relation, _) = include[0]["class"], include[1]["position"]
            statement = (include[1]["class"], relation, other)
            turned = {"right of": "left of", "below": "above"}.get(relation)
            return (other, turned, include[1]["class"]) if turned else statement
        return frozenset((entry["class"], entry.get("color")) for entry in include)

    return key(first) == key(second)


@pytest.mark.parametrize("part", [0, 1])
def test_own_answers_are_right_and_those_of_other_records_wrong(part):
    records = list_records()[part]
    compared = 0
    for record in records:
        demand = read_demand(record.tag, record.include)
        assert judge_answer(record.answer, demand, strict=True) == 1.0
        for other in records:
            if other.tag == record.tag:
                expected = float(mean_the_same(record, other))
                assert judge_answer(other.answer, demand) == expected, (record, other.answer)
                compared += 1
    assert compared > 500


@pytest.mark.parametrize("seed", range(3))
def test_letters_articles_and_punctuation_do_not_matter(seed):
    rng = np.random.default_rng(seed)
    for index in range(60):
        record = make_generated_record(seed, index)
        words = record.answer.replace(" ", "  ").upper() + rng.choice([".", "!", " ...", "?\n"])
        assert judge_answer(words, read_demand(record.tag, record.include)) == 1.0


def score(texts, tags, includes, **options):
    samples = Samples({"tag": tags, "include": includes}, texts=texts)
    bound = registry.bind_reward("self_answer", options)
    return registry.score([bound], samples, CONTEXT)["self_answer"]


def test_the_reward_scores_rows_and_leaves_out_rows_without_a_record():
    include = json.dumps(TWO[1])
    scores = score(
        ["an oven", "an oven and a sheep", "oven"],
        ["two_object", "two_object", None],
        [include, TWO[1], include],
    )
    np.testing.assert_array_equal(scores, [0.0, 1.0, np.nan])
    assert score(["an oven"], ["two_object"], [include], partial=True) == [0.5]
    assert score(["two"], ["counting"], [json.dumps(COUNT[1])], strict=True) == [0.0]


def test_rows_that_are_no_records_are_refused_together():
    robot = json.dumps([{"class": "robot", "count": 1}])
    with pytest.raises(InputError) as error:
        score(["x"] * 3, ["single_object", "colour", "single_object"], [robot, robot, "["])
    lines = error.value.problems
    assert [line.split(":")[0] for line in lines] == ["row 0", "row 1", "row 2"]
    assert '"plural": TEXT' in lines[0]
    own = json.dumps([{"class": "robot", "count": 1, "plural": "robots"}])
    assert score(["robots", "robot", "rob"], ["single_object"] * 3, [own] * 3).tolist() == [1, 1, 0]


def test_long_and_strange_answers_end():
    demand = read_demand(*FRUITS)
    for text in ("orange " * 3000, "two " * 3000, "\u0661 \ud83d", "and " * 2000, "9" * 9000):
        assert judge_answer(text, demand) == 0.0
