"""Which files are read as data, and what is read of files that differ from the published layout."""

from __future__ import annotations

import json
import logging
import shlex
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from corl_jax.data import __main__ as data_command
from corl_jax.data import parquet
from corl_jax.data.dataset import Loader, LoaderOptions
from corl_jax.data.images import decode_image
from corl_jax.data.parquet import ParquetSource
from corl_jax.data.questions import read_questions
from corl_jax.data.row_files import find_files
from corl_jax.errors import InputError, Problems
from tests.support.tiny_models import encode, tiny_image, tiny_parquet, tiny_row

REQUIRED = ("prompt", "real_image")


def touch(folder: Path, *names: str) -> list[str]:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return [str(folder / name) for name in names]


def run_suggested(message: str) -> None:
    """Runs the `python -c CODE` of a message, in this process."""
    words = shlex.split(message[message.index("python -c ") :])
    exec(words[2], {})


# ---- splits


MIXED = {
    "folders": ("default/test/0.parquet", "default/train/0.parquet"),
    "nested": ("data/train/a/0.parquet", "data/test/b/0.parquet"),
    "hive": ("split=test/0.parquet", "split=train/0.parquet"),
    "suffixes": ("x_test.parquet", "x_train.parquet"),
    "a small split": ("coco_minival.parquet", "coco_train.parquet"),
    "infixes": ("foo-validation-0.parquet", "foo-train-0.parquet"),
    "digits": ("train2017.parquet", "val2017.parquet"),
    "upper case": ("Train.parquet", "TEST.parquet"),
    "humps": ("rowsTest.parquet", "rowsTrain.parquet"),
    "words in one": ("testdata/0.parquet", "traindata/0.parquet"),
    "dev": ("train.parquet", "dev.parquet"),
    "evaluation": ("training/0.parquet", "evaluation/0.parquet"),
    "held out": ("rows.parquet", "rows_held_out.parquet"),
    "one without": ("x.parquet", "x_test.parquet"),
    "folder without": ("main/0.parquet", "main/1.parquet", "testset/0.parquet"),
    "folders named as files": ("train.parquet/0.parquet", "test.parquet/0.parquet"),
    "train in test": ("test/train-0.parquet", "train/train-0.parquet"),
    "names of the hub": ("train-00000-of-00001.parquet", "other-00000-of-00001.parquet"),
    "folders of the hub": ("default/train/0000.parquet", "default/other/0000.parquet"),
}


@pytest.mark.parametrize("names", MIXED.values(), ids=MIXED)
@pytest.mark.parametrize("pattern", ["", "/**/*.parquet"], ids=["directory", "glob"])
def test_splits_are_never_mixed(tmp_path, names, pattern):
    """And what the message proposes is accepted and holds the rows to train on."""
    paths = touch(tmp_path, *names)
    with pytest.raises(InputError, match="holds the split") as error:
        find_files(f"{tmp_path}{pattern}")
    proposed = str(error.value).rpartition("for example ")[2]
    listed = proposed[1:-1].split(", ") if proposed.startswith("[") else proposed
    chosen = find_files(listed)
    assert 0 < len(chosen) < len(paths)
    training = [path for path in paths if "train" in path.removeprefix(str(tmp_path)).lower()]
    assert set(chosen) <= set(training or paths[:-1])


def test_names_that_only_look_like_splits_are_one_data_set(tmp_path):
    folder = tmp_path / "test" / "eval-set"  # above the given root, so no part of a split
    names = ("testimony/0", "protest/1", "latest/x", "contest", "development", "evaluate", "trains")
    paths = touch(folder, *(f"{name}.parquet" for name in names))
    assert find_files(folder) == sorted(paths)
    assert find_files(f"{folder}/**/*.parquet") == sorted(paths)


def test_a_named_split_is_read(tmp_path):
    paths = touch(tmp_path, "a/train/0.parquet", "a/train/1.parquet", "a/test/0.parquet")
    for entry in ("a/train", "a/tr*", "a/train/*.parquet", "**/train/*"):
        assert find_files(tmp_path / entry) == paths[:2]
    assert find_files(tmp_path / "a/test") == paths[2:]
    same = touch(tmp_path / "b", "test.parquet", "eval-0.parquet")  # two words for one split
    assert find_files(tmp_path / "b") == sorted(same)


def test_a_list_may_name_several_splits_and_says_so(tmp_path, caplog):
    paths = touch(tmp_path, "train.parquet", "dev.parquet")
    assert find_files(paths) == paths
    assert "the splits train, validation" in caplog.text


def test_hub_splits_and_revisions(tmp_path, monkeypatch):
    import huggingface_hub

    calls = []

    def download(repo, **options):
        calls.append((repo, options["revision"], options["allow_patterns"]))
        return str(tmp_path)

    paths = touch(tmp_path, "default/train/0000.parquet", "default/test/0000.parquet")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(InputError, match=r"example hf://datasets/o/n@v1/default/train$"):
        find_files("o/n@v1")
    assert find_files("hf://datasets/o/n@refs/convert/parquet/default/train") == paths[:1]
    assert calls == [
        ("o/n", "v1", ["*.parquet"]),
        ("o/n", "refs/convert/parquet", ["default/train/*.parquet"]),
    ]


# ---- paths


def test_one_file_under_two_spellings_is_named_twice(tmp_path, monkeypatch):
    tiny_parquet(tmp_path / "a.parquet", 1)
    (tmp_path / "b.parquet").symlink_to("a.parquet")
    monkeypatch.chdir(tmp_path)
    for other in ("a.parquet", "./a.parquet", "../" + tmp_path.name + "/a.parquet", "b.parquet",
                  str(tmp_path / "a.parquet"), "[a].parquet"):  # fmt: skip
        with pytest.raises(InputError, match=r"a\.parquet is named twice"):
            find_files(["a.parquet", other])
    with pytest.raises(InputError, match="named twice"):
        find_files(".")


def test_home_and_variables_in_paths(tmp_path, monkeypatch):
    path = tiny_parquet(tmp_path / "rows/a.parquet", 1)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ROWS", str(tmp_path / "rows"))
    monkeypatch.delenv("UNSET", raising=False)
    for entry in ("~/rows/a.parquet", "~/rows", "$ROWS/*.parquet", ["${ROWS}/a.parquet"]):
        assert find_files(entry) == [str(path)]
    with pytest.raises(InputError, match=r"\$UNSET is not set"):
        find_files("$UNSET/a.parquet")
    data_command.main(["--out", "$ROWS/drawn", "--rows", "1", "--seed", "0"])
    assert len(find_files("~/rows/drawn")) == 1


# ---- files that are not parquet


def as_lines(table):
    return "".join(json.dumps(row) + "\n" for row in table.to_pylist()).encode()


def as_stream(table):
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def written_by(function):
    def content(table):
        sink = pa.BufferOutputStream()
        function(table, sink)
        return sink.getvalue().to_pybytes()

    return content


OTHER_FORMATS = {
    "rows.jsonl": as_lines,
    "lines.json": as_lines,  # as many are named
    "rows.json": lambda table: b"\xef\xbb\xbf" + json.dumps(table.to_pylist()).encode(),
    "rows.csv": written_by(pyarrow.csv.write_csv),
    "rows.arrow": as_stream,
    "rows.feather": written_by(pyarrow.feather.write_feather),
    "file.arrow": written_by(pyarrow.feather.write_feather),
}


@pytest.mark.parametrize("name", OTHER_FORMATS)
@pytest.mark.parametrize("whole", [True, False], ids=["directory", "file"])
def test_other_formats_are_named_with_a_command_that_converts_them(tmp_path, name, whole):
    table = pa.table({"prompt": ["a cat", "a dog"], "n": [1, 2]})
    (tmp_path / name).write_bytes(OTHER_FORMATS[name](table))
    with pytest.raises(InputError, match=r"it (holds these files: 1|looks like) \.") as error:
        ParquetSource(tmp_path if whole else tmp_path / name)
    run_suggested(str(error.value))
    assert ParquetSource(tmp_path)[1] == {"prompt": "a dog", "n": 2}


def test_what_a_folder_holds_is_counted(tmp_path):
    with pytest.raises(InputError, match="it holds no file at all"):
        find_files(tmp_path)
    touch(tmp_path, "a/0.tar", "a/1.tar", "README.md")
    with pytest.raises(InputError, match=r'2 \.tar, 1 \.md.*"webdataset"'):
        find_files(tmp_path)
    with pytest.raises(InputError, match=r"not found.*2 \.tar"):
        find_files(tmp_path / "*.parquet")
    touch(tmp_path, "c/metadata.csv", "c/0.jpg", "c/1.jpg", "d/0.tar.gz")
    with pytest.raises(InputError, match=r'2 \.jpg, 1 \.csv.*"imagefolder", data_dir=".*/c"'):
        find_files(tmp_path / "c")
    (tmp_path / "d/0.tar.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(InputError, match=r'"webdataset", data_files=".*/0\.tar\.gz"'):
        find_files(tmp_path / "d")
    touch(tmp_path, "b/0.pq")
    with pytest.raises(InputError, match=r"name them by a glob: .*/\*\*/\*\.pq"):
        find_files(tmp_path)
    assert len(find_files(f"{tmp_path}/**/*.pq")) == 1


def test_what_cannot_be_converted_is_named(tmp_path):
    for content, message in ((b"<!doctype html>", "a web page"), (b"PK\x03\x04", "unpack it")):
        (tmp_path / "a.parquet").write_bytes(content)
        with pytest.raises(InputError, match=f"it looks like .*{message}"):
            ParquetSource(tmp_path)


def test_git_lfs_pointers_are_called_so(tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n"
    (tmp_path / "a.parquet").write_bytes(pointer)
    with pytest.raises(InputError, match=r"a\.parquet: is a Git LFS pointer.*`git lfs pull`"):
        ParquetSource(tmp_path)
    with pytest.raises(InputError, match="a Git LFS pointer, not the image"):
        decode_image({"bytes": pointer, "path": "a.png"})


# ---- types


def arrays() -> dict[str, pa.Array]:
    rows = [tiny_row(i) for i in range(3)]
    names = ("prompt", "qa_problem", "qa_solution", "qa_type")
    return {name: pa.array([row[name] for row in rows]) for name in names}


def image_type(content, path):
    return pa.struct([("bytes", content), ("path", path)])


TEXTS = {
    "view": lambda array: array.cast(pa.string_view()),
    "large": lambda array: array.cast(pa.large_string()),
    "dictionary": lambda array: array.dictionary_encode(),
    "large dictionary": lambda array: array.cast(pa.large_string()).dictionary_encode(),
}
IMAGES = {
    "struct": image_type(pa.binary(), pa.string()),
    "views": image_type(pa.binary_view(), pa.string_view()),
    "large": image_type(pa.large_binary(), pa.large_string()),
    "no paths": image_type(pa.binary(), pa.null()),
    "binary view": pa.binary_view(),
    "large binary": pa.large_binary(),
    "list": pa.list_(image_type(pa.binary(), pa.string())),
    "large list": pa.large_list(pa.binary()),
    "list view": pa.list_view(pa.binary_view()),
    "fixed list": pa.list_(pa.binary(), 1),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_texts_of_every_arrow_type(tmp_path, kind):
    columns = {name: TEXTS[kind](array) for name, array in arrays().items()}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    source = ParquetSource(tmp_path, required=("prompt",))
    assert source[1] == {name: tiny_row(1)[name] for name in columns}
    assert source.column("qa_type") == ["MC", "OE", "MC"]


@pytest.mark.parametrize("kind", IMAGES)
def test_pictures_of_every_arrow_type(tmp_path, kind):
    content = [encode(tiny_image(i)) for i in range(3)]
    values = content
    if pa.types.is_struct(IMAGES[kind]) or kind == "list":
        values = [{"bytes": data, "path": None} for data in content]
    if "list" in kind:
        values = [[value] for value in values]
    table = pa.table(arrays() | {"real_image": pa.array(values, IMAGES[kind])})
    pq.write_table(table, tmp_path / "a.parquet")
    image = decode_image(ParquetSource(tmp_path, required=REQUIRED)[2]["real_image"])
    assert encode(image) == content[2]


def test_a_list_of_two_pictures_is_refused_and_an_empty_one_is_none(tmp_path):
    picture = encode(tiny_image(0))
    images = pa.array([[picture], [picture] * 2, []], pa.list_(pa.binary()))
    pq.write_table(pa.table(arrays() | {"images": images}), tmp_path / "a.parquet")
    source = ParquetSource(tmp_path, columns={"real_image": "images"}, required=REQUIRED)
    options = LoaderOptions(tasks=(), batch_size=3, seed=0, max_bad_fraction=0.5)
    loader = Loader(source, None, options)
    rows = loader._rows
    assert rows.read_example(0).columns["real_image"].size == (32, 32)
    with pytest.raises(InputError, match="found a list of 2 images; expected one"):
        rows.read_example(1)
    assert rows.read_example(2).columns["real_image"] is None


# ---- files that differ


def test_shards_may_differ_where_nothing_is_required(tmp_path, caplog):
    """A null type, another type of texts, other columns: all rows, with null where none is."""
    first = arrays() | {"score": pa.array([1, 2, 3]), "note": pa.array(["x"] * 3)}
    second = arrays() | {"qa_type": pa.nulls(3), "note": pa.array([[1], [2], [3]])}
    second["prompt"] = second["prompt"].cast(pa.string_view())
    third = {name: array for name, array in arrays().items() if name != "qa_type"}
    for number, columns in enumerate((first, second, third)):
        pq.write_table(pa.table(columns), tmp_path / f"{number}.parquet")
    pq.write_table(pa.table({}), tmp_path / "4.parquet")  # no rows, no columns
    source = ParquetSource(tmp_path, required=("prompt", "qa_problem"))
    assert len(source) == 9
    assert source.column("prompt") == 3 * [tiny_row(i)["prompt"] for i in range(3)]
    assert source.column("qa_type") == ["MC", "OE", "MC", *[None] * 6]
    assert [source[row]["score"] for row in (1, 4, 7)] == [2, None, None]
    assert [source[row]["note"] for row in (1, 4, 7)] == ["x", [2], None]
    assert "2.parquet: column qa_type (for qa_type) is absent" in caplog.text


def test_what_is_required_may_not_differ(tmp_path):
    tables = ({"spec": ["a"]}, {"spec": [1]}, {"spec": [None]}, {"other": [1]})
    for number, columns in enumerate(tables):
        pq.write_table(pa.table({"prompt": ["x"], **columns}), tmp_path / f"{number}.parquet")
    with pytest.raises(InputError) as error:
        ParquetSource(tmp_path, required=("prompt", "spec"))
    different, absent = error.value.problems
    assert "1.parquet: column spec (for spec) is int64" in different and "0.parquet" in different
    assert "3.parquet: column spec (for spec) is absent" in absent


def test_a_value_that_nobody_needs_costs_no_row(tmp_path, caplog):
    """Nanoseconds and bytes that are no UTF-8 have no Python value; null stands for them."""
    broken = pa.Array.from_buffers(
        pa.string(),
        2,
        [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xed\xa0")],
    )
    times = pa.array([1, 2], pa.timestamp("ns"))
    columns = {"prompt": ["\ufeffx", "y"], "broken": broken, "times": times}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    source = ParquetSource(tmp_path, required=("prompt",))
    assert source[0]["prompt"] == "x"  # without the mark of the file that it came from
    assert source[1]["prompt"] == "y" and source[1]["broken"] is None
    assert source.column("broken") == ["a", None]
    assert caplog.text.count("values of column broken") == 1
    with pytest.raises(InputError, match="column broken cannot be read"):
        ParquetSource(tmp_path, required=("broken",))[1]


# ---- memory, text


def test_a_large_row_group_is_named_with_a_command_that_divides_it(tmp_path, monkeypatch, caplog):
    path = tiny_parquet(tmp_path / "a.parquet", 250, row_group_size=10**9)
    ParquetSource(path)
    assert not caplog.records
    monkeypatch.setattr(parquet, "LARGE_GROUP_BYTES", 1000)
    ParquetSource(path)
    (record,) = caplog.records
    message = record.getMessage()
    assert record.levelno == logging.WARNING and f"{path}: has a row group of" in message
    run_suggested(message)
    written = pq.ParquetFile(tmp_path / "a.rewritten.parquet")
    assert [written.metadata.row_group(i).num_rows for i in range(3)] == [100, 100, 50]
    assert written.read() == pq.read_table(path)


def test_questions_with_a_mark_and_with_lone_surrogates(tmp_path):
    path = tmp_path / "a.jsonl"
    question = '{"image": "a.png", "question": %s}\n'
    path.write_bytes(b"\xef\xbb\xbf" + (question % '"\\ud83d\\ude00"' + "\n").encode())
    problems = Problems()
    (case,) = read_questions(path, "--input", (), problems)
    assert case.row["question"] == "\U0001f600" and not problems
    path.write_text(question % '"a\\ud83d"' + "{\n")
    read_questions(path, "--input", (), problems)
    first, second = problems
    assert "line 1: question holds a lone surrogate" in first and "line 2: not valid" in second
