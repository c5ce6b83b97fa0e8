"""TSV files are read as VLMEvalKit reads them, and what cannot be used is refused by name."""

from __future__ import annotations

import base64
import io
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from corl_jax.errors import InputError
from corl_jax.evaluation.tsv import table as tables
from corl_jax.evaluation.tsv.images import check_images, find_images, open_image
from corl_jax.evaluation.tsv.kinds import KINDS, recognise_kind
from corl_jax.evaluation.tsv.table import list_options, read_predictions, read_table
from tests.support.tsv_files import encode_image, write_predictions, write_tsv


def refuse(function, *args) -> str:
    with pytest.raises(InputError) as caught:
        function(*args)
    return str(caught.value)


def test_types_are_those_that_pandas_finds(tmp_path):
    rows = [
        {"index": 1, "A": "red", "B": 5, "C": 5, "D": "None"},
        {"index": 2, "A": "NA", "B": 7, "D": "x"},
        {"index": 3, "A": 'a "b"\tc', "B": 7, "D": "null"},
    ]
    table = read_table(write_tsv(tmp_path / "x.tsv", rows))
    # An integer column with gaps has floats, and several words are absent values.
    assert list_options(table.rows[0]) == {"A": "red", "B": 5, "C": 5.0}
    assert [f"{value}" for value in list_options(table.rows[0]).values()] == ["red", "5", "5.0"]
    assert list_options(table.rows[1]) == {"B": 7, "D": "x"}
    assert table.rows[2]["A"] == 'a "b"\tc'
    assert [row["index"] for row in table.rows] == [1, 2, 3]


def test_one_index_that_is_no_number_makes_all_of_them_texts(tmp_path):
    table = read_table(write_tsv(tmp_path / "x.tsv", [{"index": 1}, {"index": "v_2"}]))
    assert [row["index"] for row in table.rows] == ["1", "v_2"]
    table = read_table(write_tsv(tmp_path / "y.tsv", [{"index": "a01"}, {"index": "02"}]))
    assert [row["index"] for row in table.rows] == ["a01", "02"]


def test_rows_without_an_image_are_dropped_and_counted(tmp_path):
    rows = [{"index": 1}, {"index": 2, "image": ""}, {"index": 3, "image": "1"}]
    table = read_table(write_tsv(tmp_path / "x.tsv", rows))
    assert [row["index"] for row in table.rows] == [1, 3] and table.num_dropped == 1
    images = find_images(table)
    assert images[0] == images[1] and len(str(images[0][0])) > 64


def test_a_field_may_have_several_megabytes(tmp_path):
    image = encode_image(side=1100)
    assert len(image) > 4_000_000
    table = read_table(write_tsv(tmp_path / "x.tsv", [{"index": 1, "image": image}]))
    images = find_images(table)
    check_images(table, images)
    assert open_image(images[0][0]).size == (1100, 1100)


def test_a_field_may_list_several_images(tmp_path):
    several = [encode_image(1), encode_image(2)]
    table = read_table(write_tsv(tmp_path / "x.tsv", [{"index": 1, "image": str(several)}]))
    assert find_images(table) == [tuple(several)]


def test_images_may_be_files(tmp_path):
    (tmp_path / "img").mkdir()
    Image.new("RGB", (8, 8), (9, 8, 7)).save(tmp_path / "img" / "a.png")
    path = tmp_path / "x.tsv"
    path.write_text(
        "index\timage_path\tquestion\n1\timg/a.png\tq\n"
        f"2\t['img/a.png', '{tmp_path}/img/a.png']\tq\n3\t\tq\n"
    )
    table = read_table(path)
    images = find_images(table)
    assert [len(sources) for sources in images] == [1, 2] and table.num_dropped == 1
    assert open_image(images[1][1]).getpixel((0, 0)) == (9, 8, 7)
    path.write_text("index\timage_path\tquestion\n1\timg/b.png\tq\n")
    assert "index 1: image_path: found no file" in refuse(find_images, read_table(path))


def test_transparency_is_dropped_as_in_vlmevalkit():
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[..., 0] = 200
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    image = open_image(base64.b64encode(buffer.getvalue()).decode())
    assert image.mode == "RGB" and image.getpixel((0, 0)) == (200, 0, 0)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("A" * 101, "index 2: image is broken base64"),
        ("A" * 104, "index 2: image: found 78 bytes"),
        ("data:image/png;base64," + "A" * 80, "begins with 'data:'"),
        (encode_image()[:-400], "truncated"),
        ("[" + "'x', " * 30, "broken base64"),
        ("['" + "A" * 80, "index 2"),
    ],
)
def test_a_broken_image_is_named_by_its_row(tmp_path, image, message):
    table = read_table(write_tsv(tmp_path / "x.tsv", [{"index": 1}, {"index": 2, "image": image}]))
    assert message in refuse(check_images, table, find_images(table))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("7", "index 2: image is '7', a reference to a row that does not exist"),
        ("2", "is a reference itself"),
        ("[" + "x" * 70 + "]", "index 2: image is no list"),
        ("[" + " " * 70 + "]", "is an empty list"),
    ],
)
def test_a_reference_or_list_that_leads_nowhere_is_refused(tmp_path, image, message):
    table = read_table(write_tsv(tmp_path / "x.tsv", [{"index": 1}, {"index": 2, "image": image}]))
    assert message in refuse(find_images, table)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no table that pandas reads"),
        ("index\timage\tquestion\n", "has no rows"),
        ("index,image,question\n1,a,b\n", "expected also index, question"),
        ("index\tquestion\n1\tq\n", "found no column image or image_path"),
        ("index\timage\tquestion\n1\t\tq\n", "no row has a value in column image"),
        ("index\timage\tquestion\n1\tx\tq\n1\tx\tq\n", "index 1 stands twice"),
        ("index\timage\tquestion\n\tx\tq\n", "row 1: index is empty"),
        ("index\timage\tquestion\n1\tx\t\n", "index 1: question is empty"),
        ('index\timage\tquestion\n1\t"x\tq\n', "no table that pandas reads"),
        ("index\timage\tquestion\n1\tx\tq\tr\ts\n2\tx\tq\tr\ts\tt\n", "no table"),
        (b"index\timage\tquestion\n1\tx\t\xff\xfe\n", "in UTF-8"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer"),
    ],
)
def test_a_file_that_is_no_data_set_is_refused(tmp_path, content, message):
    path = tmp_path / "x.tsv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message in refuse(read_table, path)


def test_a_missing_file_and_another_ending_are_refused(tmp_path):
    assert "cannot be read" in refuse(read_table, tmp_path / "x.tsv")
    assert "expected .tsv" in refuse(read_table, tmp_path / "x.csv")


def test_without_pandas_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    message = refuse(read_table, tmp_path / "x.tsv")
    assert "pip install 'corl-jax[evaluate]'" in message


# ---- predictions


@pytest.fixture
def data_set(tmp_path):
    return read_table(write_tsv(tmp_path / "x.tsv", [{"index": 1}, {"index": 2}, {"index": 3}]))


def test_predictions_are_texts_as_pandas_makes_them(tmp_path, data_set):
    path = write_predictions(tmp_path / "p.tsv", {3: "None", 1: "B", 2: ""})
    rows, missing = read_predictions(path, data_set)
    assert [row["prediction"] for row in rows] == ["B", "nan", "nan"] and missing == 0
    path = write_predictions(tmp_path / "p.tsv", {3: "5", 1: ""})
    rows, missing = read_predictions(path, data_set)
    assert [row["prediction"] for row in rows] == ["nan", "5.0"] and missing == 1


def test_predictions_need_no_images(tmp_path):
    path = tmp_path / "x.tsv"
    path.write_text("index\tquestion\n1\tq\n2\tq\n")
    assert len(read_table(path, needs_images=False).rows) == 2
    path.write_text("index\timage\tquestion\n1\t\tq\n2\tx\tq\n")
    assert read_table(path, needs_images=False).num_dropped == 1


def test_predictions_may_be_json(tmp_path, data_set):
    path = tmp_path / "p.json"
    path.write_text('[{"index": "1", "prediction": "B"}, {"index": "2", "prediction": 5}]')
    rows, _ = read_predictions(path, data_set)
    assert [row["prediction"] for row in rows] == ["B", "5"]
    path.write_text('{"a": 1}')
    assert "is no table" in refuse(read_predictions, path, data_set)
    path.write_text("{")
    assert "is no table" in refuse(read_predictions, path, data_set)


def test_predictions_of_another_data_set_are_refused(tmp_path, data_set):
    path = write_predictions(tmp_path / "p.tsv", {1: "B", 9: "C"})
    assert "index 9 is not in" in refuse(read_predictions, path, data_set)
    path.write_text("index\tanswer\n1\tB\n")
    assert "expected also prediction" in refuse(read_predictions, path, data_set)


# ---- kinds


def make_table(name: str, rows: list[dict]) -> tables.Table:
    columns = tuple(dict.fromkeys(["index", *(key for row in rows for key in row)]))
    return tables.Table(
        Path(f"{name}.tsv"), name, columns, [{**row, "index": 0} for row in rows], 0
    )


CHOICE = {"A": "x", "B": "y", "answer": "A"}
ANSWERS = {"category": "c", "image_path": "i", "answer": "Yes"}


@pytest.mark.parametrize(
    ("name", "row", "kind"),
    [
        ("MMStar", CHOICE, "choice"),
        ("MMBench_DEV_EN_V11", CHOICE, "mmbench"),
        ("CCBench", CHOICE, "mmbench"),
        ("MMMU_DEV_VAL", CHOICE, "mmmu"),
        ("POPE", ANSWERS, "pope"),
        ("MME", ANSWERS, "mme"),
        ("MME_small", ANSWERS, "mme"),
        ("MME-RealWorld", CHOICE, "choice"),
        ("HallusionBench", ANSWERS, "hallusionbench"),
        ("MathVista_MINI", {"answer": "1", "question_type": "", "answer_type": ""}, "mathvista"),
        ("MathVision_MINI", {"answer": "1", "choices": "[]"}, "mathvision"),
        ("MathVerse_MINI_Vision_Only", {"answer": "1"}, "mathverse"),
        ("WeMath", {**CHOICE, "key": "2steps_1", "ID": 1}, "wemath"),
        ("LogicVista", {"answer": "A"}, "logicvista"),
        ("MMVet", {"answer": "x"}, "mmvet"),
        ("AI2D_TEST", CHOICE, "choice"),
        ("TextVQA_VAL", {"answer": "x"}, "open"),
        ("mine", CHOICE, "choice"),
        ("mine", ANSWERS, "yes_no"),
        ("mine", {"answer": "red"}, "open"),
    ],
)
def test_the_kind_is_recognised_by_name_then_by_columns(name, row, kind):
    assert recognise_kind(make_table(name, [row]), None) == kind


def test_a_kind_may_be_given_and_must_have_its_columns():
    table = make_table("POPE", [CHOICE])
    assert recognise_kind(table, "choice") == "choice"
    assert "--kind: found coice; did you mean choice" in refuse(recognise_kind, table, "coice")
    message = refuse(recognise_kind, make_table("MME", [{"answer": "Yes"}]), None)
    assert "has no column category, image_path, which mme has" in message
    assert set(KINDS) >= {"choice", "yes_no", "open"}
