"""The key tables: strict, invertible, and complete for the released checkpoints."""

from __future__ import annotations

import math

import numpy as np
import pytest

from corl_jax.errors import InputError
from corl_jax.params import flatten, unflatten
from corl_jax.policies.janus.checkpoint import KIND
from corl_jax.policies.janus.network import PRESETS
from corl_jax.weights.storage import make_whole_box
from corl_jax.weights.table import CONV, DENSE, DROP_LEADING, Row, Table, Transform
from tests.support.weight_files import full_keys

COUNTS = {  # specification 3.3: (transformers' layout, original layout with the attention pool)
    "Janus-Pro-1B": (2_076_636_811, 2_089_232_011),
    "Janus-Pro-7B": (7_407_773_323, 7_420_368_523),
}
CODEBOOK_USED = "gen_vision_model.quantize.codebook_used"


@pytest.fixture(scope="module")
def keys():
    return full_keys()


@pytest.mark.parametrize("layout", ["original", "transformers"])
@pytest.mark.parametrize("model", COUNTS)
def test_every_key_of_the_released_checkpoints_has_a_leaf(keys, layout, model):
    shapes = KIND.shapes(PRESETS[model.lower()])
    found = {key: tuple(shape) for key, shape in keys[layout][model].items()}
    table = KIND.tables[layout]
    slots = table.make_slots(shapes)
    assert table.find_problems(slots, found, model) == []
    carried = {key for key in found if table.is_carried(key)}
    assert {slot.key for slot in slots} == found.keys() - carried
    assert len(carried) == (14 if layout == "original" else 0)


@pytest.mark.parametrize("model", COUNTS)
def test_parameter_counts_are_the_specifications(keys, model):
    in_leaves = sum(math.prod(shape) for shape in KIND.shapes(PRESETS[model.lower()]).values())
    in_original = sum(
        math.prod(shape) for key, shape in keys["original"][model].items() if key != CODEBOOK_USED
    )
    assert (in_leaves, in_original) == COUNTS[model]


def test_both_tables_pair_the_keys_as_the_specification_does(keys):
    shapes = KIND.shapes(PRESETS["janus-pro-1b"])

    def rows(slot):
        shape = shapes[slot.path] if slot.layer is None else shapes[slot.path][1:]
        (first, *_) = slot.box(make_whole_box(shape))
        return None if first == (0, slot.shape[0]) else first

    slots = {name: table.make_slots(shapes) for name, table in KIND.tables.items()}
    # Key -> its leaves; a fused tensor has several.
    leaves = {name: {} for name in slots}
    for name, of_layout in slots.items():
        for slot in of_layout:
            leaves[name].setdefault(slot.key, []).append((slot.path, slot.layer))
    rows_of = {(slot.key, slot.path): rows(slot) for slot in slots["original"]}
    for original, transformers, note in keys["pairs"]:
        if transformers is None:
            assert KIND.tables["original"].is_carried(original)
            continue
        (target,) = leaves["transformers"][transformers]
        assert target in leaves["original"][original]
        expected = tuple(map(int, note.split()[1].split(":"))) if note.startswith("rows") else None
        assert rows_of[original, target[0]] == expected


def test_every_leaf_is_stacked_alike_in_both_tables():
    for path in KIND.shapes(PRESETS["janus-pro-1b"]):
        stacked = {name: table.find_row(path)[0].stacked for name, table in KIND.tables.items()}
        assert len(set(stacked.values())) == 1, path
        assert stacked["original"] == ("/layers/" in path), path


@pytest.mark.parametrize("transform", [DENSE, CONV, DROP_LEADING])
def test_a_transform_and_its_inverse_cancel(transform):
    shape = {DENSE: (3, 5), CONV: (2, 3, 4, 5), DROP_LEADING: (1, 4, 6)}[transform]
    tensor = np.arange(math.prod(shape)).reshape(shape)
    leaf = transform.to_leaf(tensor)
    np.testing.assert_array_equal(transform.to_torch(leaf), tensor)
    assert transform.torch_shape(leaf.shape) == shape


def test_a_split_axis_is_read_whole():
    """[out, 4 D] in the order column, row, feature -> [row, column, D, out]."""
    merging = Transform((2, 1, 3, 0), split=(2, 2, -1))
    tensor = np.arange(24.0).reshape(2, 12)  # D = 3
    leaf = merging.to_leaf(tensor)
    assert leaf.shape == (2, 2, 3, 2) and merging.torch_shape(leaf.shape) == (2, 12)
    assert leaf[1, 0, 2, 1] == tensor[1, 0 * 6 + 1 * 3 + 2]
    assert np.array_equal(merging.to_torch(leaf), tensor)
    table = Table("t", (Row("kernel", "kernel", merging),))
    (slot,) = table.make_slots({"kernel": leaf.shape})
    # Half of the outputs is a box of the tensor; one of the four positions is none.
    assert slot.box(((0, 2), (0, 2), (0, 3), (1, 2))) == ((1, 2), (0, 12))
    with pytest.raises(ValueError, match="cannot be split over devices"):
        slot.box(((0, 1), (0, 2), (0, 3), (0, 2)))


def test_conv_kernels_become_height_width_in_out():
    tensor = np.random.default_rng(0).standard_normal((7, 3, 2, 4))  # out, in, height, width
    leaf = CONV.to_leaf(tensor)
    assert leaf.shape == (2, 4, 3, 7)
    assert leaf[1, 2, 0, 5] == tensor[5, 0, 1, 2]


def test_stacked_and_plain_rows_expand_to_slots():
    table = Table("t", (Row("a.{layer}.b.{i}.w", "a/b/{i}/kernel", DENSE), Row("c", "c/scale")))
    slots = table.make_slots({"a/b/4/kernel": (2, 3, 5), "c/scale": (6,)})
    assert [(s.key, s.layer, s.shape) for s in slots] == [
        ("a.0.b.4.w", 0, (5, 3)),
        ("a.1.b.4.w", 1, (5, 3)),
        ("c", None, (6,)),
    ]


def test_all_problems_are_listed_together():
    table = Table("t", (Row("a.{layer}", "a/x"), Row("b", "b"), Row("c", "c")), dropped=("buf",))
    slots = table.make_slots({"a/x": (2, 4), "b": (3,), "c": (5,)})
    found = {"a.0": (4,), "a.2": (4,), "b": (9,), "c": (5,), "buf": (1,)}
    problems = table.find_problems(slots, found, "dir")
    assert len(problems) == 3
    assert problems[0] == "dir: a.1 is missing, expected with shape [4]"
    assert "b has shape [9], expected [3]" in problems[1]
    assert "a.2 is unknown" in problems[2]


@pytest.mark.parametrize(
    ("rows", "leaves", "message"),
    [
        ([Row("a", "x"), Row("b", "x")], {"x": (1,)}, "2 rows of the t table"),
        ([Row("a", "x")], {"y": (1,)}, "no row of the t table"),
        ([Row("a", "x"), Row("a", "y")], {"x": (1,), "y": (1,)}, "fed by both x and y"),
        ([Row("a", "x", part=(0, 2)), Row("a", "y", part=(1, 2))], {"x": (1,)}, "only parts [0]"),
        ([Row("a", "x", DENSE)], {"x": (1, 2, 3)}, "rank 3"),
    ],
)
def test_an_ambiguous_table_is_refused(rows, leaves, message):
    with pytest.raises(InputError, match=message.replace("[", r"\[").replace("]", r"\]")):
        Table("t", tuple(rows)).make_slots(leaves)


def test_a_key_belongs_to_a_table_with_a_row_for_it():
    table = Table("t", (Row("a.{i}", "x/{i}"), Row("b", "z")))
    assert table.matches("a.1") and table.matches("b")
    assert not table.matches("c")
    assert not table.matches("a.01")  # not how a layout writes 1


def test_flatten_and_unflatten_cancel():
    tree = {"a": {"0": {"kernel": 1}, "1": {"kernel": 2}}, "b": 3}
    assert flatten(tree) == {"a/0/kernel": 1, "a/1/kernel": 2, "b": 3}
    assert unflatten(flatten(tree)) == tree
