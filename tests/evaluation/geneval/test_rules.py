"""GenEval's rules by hand: thresholds, counts, colours, positions, reasons, relations, masks."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from corl_jax.data.drawn_world import checker, generator
from corl_jax.data.drawn_world.scene import CATEGORIES
from corl_jax.errors import InputError
from corl_jax.evaluation.geneval.dense import score_image
from corl_jax.evaluation.geneval.detections import Detection, find_metadata_problems
from corl_jax.evaluation.geneval.masks import decode_counts, decode_mask
from corl_jax.evaluation.geneval.relations import RELATIONS, compute_iou, find_relations
from corl_jax.evaluation.geneval.rules import COLORS, Rules, judge_image, keep_detections

BOX = (0, 0, 10, 10)


def boxes(*scores, box=BOX, color=None):
    return [Detection(box, score, color) for score in scores]


def at(x, y=0, side=10, score=0.9, color=None):
    return Detection((x, y, x + side, y + side), score, color)


def demand(tag="two_object", *include, exclude=()):
    metadata = {"tag": tag, "prompt": "p", "include": list(include)}
    return metadata | ({"exclude": list(exclude)} if exclude else {})


def entry(name, count=1, **more):
    return {"class": name, "count": count, **more}


# ---- boxes that count


def test_the_threshold_is_strict_and_higher_for_counting():
    one = demand("single_object", entry("dog"))
    assert not judge_image(one, {"dog": boxes(0.3)}).correct
    # A detector's float32 of 0.3 is a little above the float64 of 0.3, and does not count either.
    assert not judge_image(one, {"dog": boxes(float(np.float32(0.3)))}).correct
    assert judge_image(one, {"dog": boxes(0.3001)}).correct
    counted = demand("counting", entry("dog"), exclude=[entry("dog", 2)])
    assert not judge_image(counted, {"dog": boxes(0.9)}).correct
    assert judge_image(counted, {"dog": boxes(0.91, 0.9, 0.5)}).correct


def test_at_most_sixteen_boxes_by_falling_score():
    scores = [0.4 + 0.01 * n for n in range(20)]
    kept = keep_detections({"dog": boxes(*scores), "cat": boxes(0.1)}, "colors")
    assert [box.score for box in kept["dog"]] == scores[::-1][:16]
    assert list(kept) == ["dog"]


def test_equal_scores_come_in_reversed_order():
    marked = [at(x, score=score) for x, score in ((0, 0.5), (1, 0.8), (2, 0.5), (3, 0.5))]
    kept = keep_detections({"dog": marked}, "colors")["dog"]
    assert [box.box[0] for box in kept] == [1, 3, 2, 0]


def test_overlaps_are_dropped_on_request_alone():
    pair = [at(0, score=0.9), at(1, score=0.8), at(30, score=0.7)]
    assert len(keep_detections({"dog": pair}, "colors")["dog"]) == 3
    kept = keep_detections({"dog": pair}, "colors", Rules(max_overlap=0.5))["dog"]
    assert [box.box[0] for box in kept] == [0, 30]
    # 10 x 11 of 2 * 121 - 110 pixels: the last pixel of a box is inside.
    iou = 110 / 132
    assert compute_iou(pair[0].box, pair[1].box) == pytest.approx(iou)
    assert len(keep_detections({"dog": pair}, "colors", Rules(max_overlap=iou))["dog"]) == 2
    assert compute_iou((0, 0, 9, 9), (20, 20, 29, 29)) == 0
    assert compute_iou((0, 0, 9, 9), (9, 9, 18, 18)) == pytest.approx(1 / 199)


# ---- demands


@pytest.mark.parametrize(
    ("metadata", "found", "reason"),
    [
        (demand("counting", entry("dog", 3), exclude=[entry("dog", 4)]), {"dog": boxes(0.95, 0.95)},
         "expected dog>=3, found 2"),
        (demand("counting", entry("dog"), exclude=[entry("dog", 3)]), {"dog": boxes(*[0.95] * 5)},
         "expected dog<3, found 5"),
        (demand("two_object", entry("dog"), entry("cat")), {},
         "expected dog>=1, found 0\nexpected cat>=1, found 0"),
        # Only the first box is looked at, though the second one is red.
        (demand("colors", entry("dog", color="red")),
         {"dog": [at(0, score=0.9, color="white"), at(9, score=0.8, color="red")]},
         "expected red dog>=1, found 0 red; and 1 white"),
        (demand("colors", entry("dog", 2, color="red")),
         {"dog": [at(0, color="white"), at(9, color="red")]},
         "expected red dog>=2, found 1 red; and 1 red, 1 white"),
        (demand("position", entry("cat", 2), entry("dog", position=["left of", 0])),
         {"cat": boxes(0.9), "dog": boxes(0.9)},
         "expected cat>=2, found 1\nno target for dog to be left of"),
        (demand("position", entry("cat"), entry("dog", position=["left of", 0])),
         {"cat": [at(0)], "dog": [at(50)]},
         "expected dog left of target, found right of target"),
        (demand("position", entry("cat"), entry("dog", position=["left of", 0])),
         {"cat": [at(0)], "dog": [at(0)]}, "expected dog left of target, found  target"),
        (demand("position", entry("cat"), entry("dog", position=["left of", 0])),
         {"cat": [at(0)], "dog": [at(50, 50)]},
         "expected dog left of target, found right of and below target"),
        # An object of the wrong colour is no target, and is not compared itself.
        (demand("position", entry("cat", color="red"), entry("dog", position=["left of", 0])),
         {"cat": [at(50, color="blue")], "dog": [at(0)]},
         "expected red cat>=1, found 0 red; and 1 blue\nno target for dog to be left of"),
        (demand("position", entry("cat"), entry("dog", color="red", position=["left of", 0])),
         {"cat": [at(0)], "dog": [at(50, color="blue")]},
         "expected red dog>=1, found 0 red; and 1 blue"),
    ],
)  # fmt: skip
def test_reasons(metadata, found, reason):
    verdict = judge_image(metadata, found)
    assert not verdict.correct and verdict.reason == reason


def test_every_pair_must_have_the_relation():
    metadata = demand("position", entry("cat", 2), entry("dog", position=["left of", 0]))
    cats = [at(50, score=0.9), at(80, score=0.8)]
    assert judge_image(metadata, {"cat": cats, "dog": [at(0)]}).correct
    one_behind = [at(50, score=0.9), at(-80, score=0.8)]
    assert not judge_image(metadata, {"cat": one_behind, "dog": [at(0)]}).correct
    # A third cat on the wrong side is not among the first two.
    assert judge_image(metadata, {"cat": [*cats, at(-80, score=0.5)], "dog": [at(0)]}).correct


def test_classified_colors_are_asked_of_the_first_boxes():
    calls = []

    def classify(name, boxes):
        calls.append((name, [box.score for box in boxes]))
        return ["red"] * len(boxes)

    metadata = demand("colors", entry("dog", 2, color="red"), entry("cat"), entry("owl"))
    found = {"dog": boxes(0.5, 0.9, 0.7), "cat": boxes(0.8), "owl": boxes(0.8)}
    assert judge_image(metadata, found, classify).correct
    assert calls == [("dog", [0.9, 0.7])]
    # Too few boxes: their colours are not asked.
    judge_image(metadata, {"dog": boxes(0.9)}, classify)
    assert len(calls) == 1
    with pytest.raises(InputError, match="boxes have no `color`"):
        judge_image(metadata, found)


def test_details_have_the_boxes_that_count():
    verdict = judge_image(demand("colors"), {"dog": boxes(0.2, 0.5), "cat": boxes(0.1)})
    assert verdict.details == {"dog": [[0, 0, 10, 10, 0.5]]} and verdict.correct


@pytest.mark.parametrize(
    ("change", "part"),
    [({"tag": 3}, "tag is 3"), ({"include": [{"class": "dog"}]}, "count is None"),
     ({"include": [entry("dog", 0)]}, "count is 0"),
     ({"include": [entry("dog", position=["left of", 0])]}, "earlier entry"),
     ({"include": [entry("cat"), entry("dog", position=["near", 0])]}, "earlier entry"),
     ({"exclude": {}}, "exclude is {}")],
)  # fmt: skip
def test_demands_that_cannot_be_judged(change, part):
    problems = list(find_metadata_problems(demand("colors", entry("cat")) | change))
    assert problems and part in problems[0]


# ---- relations


@pytest.mark.parametrize(
    ("a", "b", "relations"),
    [
        ((0, 0, 10, 10), (30, 0, 40, 10), ["left of"]),
        ((30, 0, 40, 10), (0, 0, 10, 10), ["right of"]),
        ((0, 0, 10, 10), (0, 30, 10, 40), ["above"]),
        ((0, 30, 10, 40), (0, 0, 10, 10), ["below"]),
        # (30 - 2) / 42.4 = 0.66 on both axes.
        ((30, 30, 40, 40), (0, 0, 10, 10), ["right of", "below"]),
        # 0.1 * 20 of 4: 2 / 4 is not above a half, with 4.5 it is: 2.5 / 4.5.
        ((4, 0, 14, 10), (0, 0, 10, 10), []),
        ((4.5, 0, 14.5, 10), (0, 0, 10, 10), ["right of"]),
        # Offsets within a tenth of the sides are none: 2 of 20.
        ((2, 2, 12, 12), (0, 0, 10, 10), []),
        ((0, 0, 10, 10), (0, 0, 10, 10), []),
        # The norm is that before the reduction: (8 - 4) / sqrt(64 + 9) = 0.468, though the
        # reduced offset lies on one axis alone.
        ((8, 3, 28, 23), (0, 0, 20, 20), []),
        # Below a thousandth of a pixel there is no direction.
        ((0.0005, 0, 0.0005, 0), (0, 0, 0, 0), []),
        ((0.002, 0, 0.002, 0), (0, 0, 0, 0), ["right of"]),
    ],
)  # fmt: skip
def test_relations_by_hand(a, b, relations):
    assert find_relations(a, b) == relations


coordinate = st.integers(-300, 300)
side = st.integers(1, 200)
box = st.builds(lambda x, y, w, h: (x, y, x + w, y + h), coordinate, coordinate, side, side)
OPPOSITE = dict(zip(RELATIONS, ("right of", "left of", "below", "above"), strict=True))


@given(box, box, st.integers(-50, 50))
def test_relations_turn_round_with_the_boxes(a, b, shift):
    relations = find_relations(a, b)
    assert {OPPOSITE[name] for name in relations} == set(find_relations(b, a))
    moved = [tuple(edge + shift for edge in box) for box in (a, b)]
    assert find_relations(*moved) == relations
    assert len(relations) <= 2 and compute_iou(a, b) == compute_iou(b, a) <= 1


# ---- dense scores


def test_dense_scores_by_hand():
    count = demand("counting", entry("dog", 3), exclude=[entry("dog", 4)])
    for number, dense in ((0, 0), (1, 1 / 3), (2, 2 / 3), (3, 1), (4, 2 / 3), (7, 0)):
        assert score_image(count, {"dog": boxes(*[0.95] * number)}).dense == pytest.approx(dense)
    pair = demand("position", entry("cat"), entry("dog", position=["left of", 0]))
    # One object of two is one condition of three: nothing for a relation without its target.
    assert score_image(pair, {"dog": [at(0)]}).dense == pytest.approx(1 / 3)
    assert score_image(pair, {"cat": [at(0)]}).dense == pytest.approx(1 / 3)
    assert score_image(pair, {"cat": [at(0)], "dog": [at(50)]}).dense == pytest.approx(2 / 3)
    assert score_image(pair, {"cat": [at(50)], "dog": [at(0)]}).dense == 1
    color = demand("color_attr", entry("cat", color="red"), entry("dog", color="blue"))
    found = {"cat": [at(0, color="red")], "dog": [at(9, color="red")]}
    assert score_image(color, found).dense == pytest.approx(3 / 4)
    other = demand("single_object", entry("dog"), exclude=[entry("cat")])
    assert score_image(other, {"dog": boxes(0.9), "cat": boxes(0.9)}).dense == pytest.approx(1 / 2)


names = st.sampled_from(["dog", "cat", "owl"])
palette = st.sampled_from(["red", "blue"])
objects = st.lists(
    st.builds(
        lambda name, x, y, score, color: (name, at(x * 12, y * 12, score=score, color=color)),
        names, st.integers(0, 5), st.integers(0, 5), st.sampled_from([0.2, 0.5, 0.95]), palette,
    ), max_size=8,
)  # fmt: skip


@st.composite
def demands(draw):
    include = []
    for place in range(draw(st.integers(1, 3))):
        row = entry(draw(names), draw(st.integers(1, 3)))
        if draw(st.booleans()):
            row["color"] = draw(palette)
        if place and draw(st.booleans()):
            row["position"] = [draw(st.sampled_from(RELATIONS)), draw(st.integers(0, place - 1))]
        include.append(row)
    exclude = [entry(draw(names), draw(st.integers(1, 3)))] if draw(st.booleans()) else []
    return demand(draw(st.sampled_from(["counting", "position"])), *include, exclude=exclude)


@given(demands(), objects)
def test_the_dense_score_is_one_exactly_for_correct_images(metadata, placed):
    found = {}
    for name, detection in placed:
        found.setdefault(name, []).append(detection)
    score = score_image(metadata, found)
    assert 0 <= score.dense <= 1
    assert (score.dense == 1) == (score.strict == 1) == (not score.reason)


# ---- the drawn world's own checker


def as_detections(image):
    """The checker's objects; those of no known shape are none."""
    found = {}
    for number, item in enumerate(checker.detect(image)):
        box = tuple(64 * edge for edge in item.box)
        if item.shape != checker.UNKNOWN:
            detection = Detection(box, 0.99 - 0.001 * number, item.color)
            found.setdefault(item.shape, []).append(detection)
    return found


def as_demand(spec):
    metadata = demand(spec["category"], *spec["include"])
    if spec["category"] == "counting":
        (row,) = spec["include"]
        metadata["exclude"] = [entry(row["class"], row["count"] + 1)]
    return metadata


def test_verdicts_are_those_of_the_drawn_world():
    """The two differ only where a shape appears more often than demanded: of such a shape GenEval
    looks at the first boxes, the checker at all."""
    rows = [generator.make_row(7, number, encode=False) for number in range(240)]
    images = [row["real_image"] for row in rows]
    specs = [json.loads(row["spec"]) for row in rows]
    agreed = {category: [0, 0] for category in CATEGORIES}
    for image in images:
        found, items = as_detections(image), checker.detect(image)
        for spec in specs[:40]:
            expected = checker.satisfies(items, spec, strict=False)
            verdict = judge_image(as_demand(spec), found)
            is_crowded = any(
                len(found.get(row["class"], ())) > row["count"] for row in spec["include"]
            )
            if not is_crowded:
                assert verdict.correct == expected, (spec, verdict.reason)
                agreed[spec["category"]][expected] += 1
            elif spec["category"] in ("single_object", "two_object", "counting"):
                assert verdict.correct == expected
    # The comparison must have seen both verdicts of every category.
    assert all(min(counts) > 0 for counts in agreed.values()), agreed
    own = [judge_image(as_demand(s), as_detections(i)).correct for s, i in zip(specs, images)]
    assert all(own)


# ---- masks


def test_masks_of_run_lengths():
    # Columns first: the first column of three pixels is 0 0 1, the second 1 0 0.
    mask = decode_mask({"size": [3, 2], "counts": [2, 2, 2]}, None)
    assert mask.tolist() == [[False, True], [False, False], [True, False]]
    assert decode_mask({"size": [2, 2], "counts": [0, 4]}, None).all()


def encode_counts(counts):
    """COCO's compression, written anew: five bits a character, differences from the fourth on."""
    text = ""
    for place, count in enumerate(counts):
        number = count - counts[place - 2] if place > 2 else count
        while True:
            bits, number = number & 31, number >> 5
            more = not ((number == 0 and not bits & 16) or (number == -1 and bits & 16))
            text += chr(48 + bits + 32 * more)
            if not more:
                break
    return text


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=20))
def test_compressed_run_lengths(counts):
    assert decode_counts(encode_counts(counts)) == counts


def test_a_compressed_text_by_hand():
    # 6 -> "6", 1 -> "1", 40 = 8 + 1 * 32 -> "X1" with the bit for more in the first character.
    assert decode_counts("61X1") == [6, 1, 40]
    # The fourth is a difference from the second: 4 - 1 = 3.
    assert decode_counts("61X13") == [6, 1, 40, 4]


def test_masks_of_png_files(tmp_path):
    Image.fromarray(np.array([[0, 255], [1, 0]], np.uint8)).save(tmp_path / "m.png")
    assert decode_mask("m.png", tmp_path).tolist() == [[False, True], [True, False]]


@pytest.mark.parametrize(
    ("value", "part"),
    [(3, "expected"), ("missing.png", "cannot be read"),
     ({"size": [2, 2], "counts": [1]}, "run lengths"),
     ({"size": [2, 2], "counts": [-1, 5]}, "run lengths"), ({"size": [2], "counts": [4]}, "size"),
     ({"size": [2, 2], "counts": "é"}, "compressed"), ({"size": [2, 2], "counts": "X"}, "middle")],
)  # fmt: skip
def test_masks_that_are_refused(value, part, tmp_path):
    with pytest.raises(InputError, match=part):
        decode_mask(value, tmp_path)


def test_colors_are_those_of_geneval():
    assert len(COLORS) == 10 and COLORS[0] == "red" and COLORS[-1] == "white"
    assert dataclasses.replace(Rules(), threshold=0.5) != Rules()
