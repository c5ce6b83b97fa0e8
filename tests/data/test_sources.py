"""Rows that the library `datasets` reads are those of the same parquet, with equal guarantees."""

from __future__ import annotations

import csv
import io
import json
import os
import pickle
import sys
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest

from corl_jax.data.dataset import Loader, LoaderOptions, split_held_out_rows
from corl_jax.data.images import decode_image
from corl_jax.data.parquet import ParquetSource
from corl_jax.data.sources import open_source
from corl_jax.errors import InputError
from tests.support.tiny_models import tiny_parquet, tiny_row

ROWS = 12
REQUIRED = ("prompt", "real_image")
TEXTS = ("prompt", "qa_problem", "qa_solution", "qa_type")


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    """The library's cache, in a folder of these tests."""
    folder = tmp_path_factory.mktemp("cache")
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = folder
    yield folder
    datasets.config.HF_DATASETS_CACHE = before


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts_of(number: int) -> dict:
    return {name: tiny_row(number)[name] for name in TEXTS}


def write_images(folder: Path, numbers: range) -> None:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number in numbers:
        content = tiny_row(number)["real_image"]["bytes"]
        (folder / f"images/{number}.png").write_bytes(content)


def write_json(folder: Path) -> Path:
    """Two files; the paths of images start from each file's folder."""
    for name, numbers in (("a", range(5)), ("b", range(5, ROWS))):
        rows = [texts_of(i) | {"real_image": f"images/{i}.png", "n": i} for i in numbers]
        write_lines(folder / name / "rows.jsonl", rows)
        write_images(folder / name, numbers)
    return folder


def write_csv(folder: Path) -> Path:
    write_images(folder, range(ROWS))
    with (folder / "rows.tsv").open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow([*TEXTS, "real_image"])
        for i in range(ROWS):
            writer.writerow([*texts_of(i).values(), str(folder / f"images/{i}.png")])
    return folder / "rows.tsv"


def write_image_folder(folder: Path) -> Path:
    write_images(folder, range(ROWS))
    rows = [texts_of(i) | {"file_name": f"images/{i}.png"} for i in range(ROWS)]
    write_lines(folder / "metadata.jsonl", rows)
    return folder


def write_samples(folder: Path) -> Path:
    with tarfile.open(folder / "rows.tar", "w") as archive:
        for i in range(ROWS):
            parts = {"png": tiny_row(i)["real_image"]["bytes"]}
            parts["json"] = json.dumps(texts_of(i)).encode()
            for suffix, content in parts.items():
                entry = tarfile.TarInfo(f"{i:03}.{suffix}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    return folder


def in_memory(numbers=range(ROWS)):
    rows = datasets.Dataset.from_list([tiny_row(i) for i in numbers])
    return rows.cast_column("real_image", datasets.Image())


def save(folder: Path) -> Path:
    in_memory().save_to_disk(folder / "saved")
    return folder / "saved"


def save_splits(folder: Path) -> Path:
    both = datasets.DatasetDict(train=in_memory(), test=in_memory(range(3)))
    both.save_to_disk(folder / "saved")
    return folder / "saved"


NESTED = {name: f"json.{name}" for name in TEXTS} | {"real_image": "png"}
FORMATS = {
    "json": (write_json, {}),
    "csv": (write_csv, {}),
    "imagefolder": (write_image_folder, {"columns": {"real_image": "image"}}),
    "webdataset": (write_samples, {"columns": NESTED}),
    "saved": (save, {}),
    "saved splits": (save_splits, {"split": "train"}),
}


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    return ParquetSource(
        tiny_parquet(tmp_path_factory.mktemp("rows") / "rows.parquet", ROWS), required=REQUIRED
    )


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Format -> its source of the same rows."""
    sources = {}
    for name, (write, options) in FORMATS.items():
        path = write(tmp_path_factory.mktemp(name.replace(" ", "_")))
        sources[name] = open_source(str(path), required=(*REQUIRED, "qa_problem"), **options)
    return sources


def loader_of(source, **options) -> Loader:
    defaults = {"tasks": (), "batch_size": 4, "seed": 3, "required": REQUIRED}
    return Loader(source, None, LoaderOptions(**(defaults | options)))


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_has_the_rows_of_parquet(opened, parquet, kind):
    source = opened[kind]
    assert len(source) == ROWS
    for number in range(ROWS):
        row, expected = source[number], parquet[number]
        assert {name: row[name] for name in TEXTS} == {name: expected[name] for name in TEXTS}
        ours, theirs = decode_image(row["real_image"]), decode_image(expected["real_image"])
        assert np.array_equal(ours, theirs)
    for name in TEXTS:
        assert source.column(name) == parquet.column(name)


@pytest.mark.parametrize("kind", ["json", "saved"])
def test_batches_are_those_of_parquet_in_every_process(opened, parquet, kind):
    """And after a resume, and from a copy of the source, as a second process opens it."""
    expected = [loader_of(parquet).batch(step) for step in range(5)]
    parts = [
        loader_of(source, process_count=2, process_index=index)
        for index, source in enumerate((opened[kind], pickle.loads(pickle.dumps(opened[kind]))))
    ]
    for step in (0, 1, 2, 3, 4):
        batches = [loader.batch(step) for loader in parts]
        assert [*batches[0].columns["prompt"], *batches[1].columns["prompt"]] == (
            expected[step].columns["prompt"]
        )
        images = [*batches[0].columns["real_image"], *batches[1].columns["real_image"]]
        for ours, theirs in zip(images, expected[step].columns["real_image"], strict=True):
            assert np.array_equal(ours, theirs)


def test_images_are_not_read_with_the_texts(opened, monkeypatch):
    """A column is read alone, and the fingerprint reads the sizes of images."""
    monkeypatch.setattr("corl_jax.data.datasets_source._read_table", None)
    assert len(opened["saved"].column("prompt")) == ROWS
    assert len(opened["saved"].fingerprint()) == 64


def test_a_row_is_named_by_its_file_and_number(opened):
    assert opened["json"].where(6).endswith("/b/rows.jsonl row 1")
    assert opened["csv"].where(6).endswith("/rows.tsv row 6")
    assert opened["imagefolder"].where(6).endswith("(train) row 6 (" + (
        opened["imagefolder"][6]["real_image"] + ")"
    ))  # fmt: skip
    assert opened["webdataset"].where(6).endswith("/rows.tar row 6 (006)")
    assert opened["saved splits"].where(6).endswith("/saved (train) row 6")


# ---- rows that cannot be used


def test_an_unusable_row_is_named_before_the_training(tmp_path):
    write_images(tmp_path, range(1))
    rows = [
        {"prompt": "no file", "real_image": "images/9.png"},
        {"prompt": "", "real_image": "images/0.png"},
        {"prompt": "a device", "real_image": "/dev/zero"},
        {"prompt": "an address", "real_image": "http://127.0.0.1:9/a.png"},
    ]
    write_lines(tmp_path / "rows.jsonl", rows)
    with pytest.raises(InputError) as error:
        loader_of(open_source(str(tmp_path), required=REQUIRED)).check()
    lines = error.value.problems
    assert len(lines) == 4
    for number, (line, reason) in enumerate(
        zip(
            lines,
            ("images/9.png: No such file", "prompt is empty", "zero: not a file", "No such file"),
            strict=True,
        )
    ):
        assert f"rows.jsonl row {number}: " in line and reason in line


def test_a_bad_row_gives_way_to_the_next(tmp_path):
    rows = [{"prompt": text, "n": i} for i, text in enumerate(["a", "", "c", "d"])]
    source = open_source(str(write_lines(tmp_path / "rows.jsonl", rows)), required=("prompt",))
    loader = loader_of(source, required=("prompt",), shuffle=False, max_bad_fraction=0.3)
    assert loader.batch(0).columns["n"] == [0, 2, 2, 3]
    assert loader.counts["bad"] == 1


def test_missing_columns_and_mixed_values_are_refused(tmp_path):
    rows = [{"prompt": 3, "q": "a"}, {"prompt": "two", "q": "b"}]
    path = str(write_lines(tmp_path / "rows.jsonl", rows))
    with pytest.raises(InputError, match=r"rows\.jsonl: column prompt .* several types"):
        open_source(path, required=("prompt",))
    with pytest.raises(InputError, match=r"rows\.jsonl: column qa_problem .* is missing"):
        open_source(path, required=("qa_problem",))
    numbers = str(write_lines(tmp_path / "numbers.jsonl", [{"prompt": 3}]))
    with pytest.raises(InputError, match=r"numbers\.jsonl: column prompt .* is int64"):
        open_source(numbers, required=("prompt",))


BROKEN = {
    "rows.jsonl": (b'{"prompt": "a"}\n{"prompt": \n', "row 1"),
    "empty.jsonl": (b"", "0 bytes"),
    "more.csv": (b"a,prompt\n1,2\n1,2,3\n", "line 3"),
    "shifted.csv": (b"a,prompt\n1,2,3\n", "more fields than the header"),
    "empty.csv": (b"\n", "No columns"),
    "rows.tar": (b"ab", "ReadError"),
    "rows.arrow": (b"ab", "too small"),
    "pointer.jsonl": (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n", "git lfs"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named_with_the_reason(tmp_path, name):
    content, reason = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name}.*{reason}"):
        open_source(str(tmp_path / name), required=("prompt",))


def test_cells_of_a_table_are_texts(tmp_path):
    (tmp_path / "rows.csv").write_text("prompt,qa_solution\nNA,3\nnone,04\n,x\n")
    source = open_source(str(tmp_path), required=("prompt",))
    assert source.column("prompt") == ["NA", "none", None]
    assert source.column("qa_solution") == ["3", "04", "x"]


# ---- resuming


def test_changed_rows_are_refused_on_resume(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"text {i}"} for i in range(8)]

    def open_loader(numbers=slice(None)):
        write_lines(path, rows[numbers])
        source = open_source(str(path), required=("prompt",))
        return loader_of(split_held_out_rows(source, 2)[0], required=("prompt",))

    state = json.loads(json.dumps(open_loader().get_state() | {"step": 3}))
    same = open_loader()
    same.set_state(state)
    assert same.get_state()["step"] == 3
    os.utime(path)  # another time is no change
    open_loader().set_state(state)
    rows[1] = {"prompt": "another"}
    with pytest.raises(InputError, match="fingerprint was"):
        open_loader().set_state(state)
    with pytest.raises(InputError, match="rows was 6 and is now 5"):
        open_loader(slice(7)).set_state(state)


# ---- formats, splits and places


def test_several_formats_are_refused_with_a_glob_that_is_accepted(tmp_path):
    write_lines(tmp_path / "rows.jsonl", [{"prompt": "a"}])
    (tmp_path / "rows.csv").write_text("prompt\nb\n")
    with pytest.raises(InputError, match="several formats") as error:
        open_source(str(tmp_path))
    glob = str(error.value).rpartition("such as ")[2]
    assert open_source(glob).column("prompt") == ["a"]
    with pytest.raises(InputError, match="several formats"):
        open_source([str(tmp_path / "rows.jsonl"), str(tmp_path / "rows.csv")])
    tiny_parquet(tmp_path / "rows.parquet", 2)
    assert isinstance(open_source(str(tmp_path)), ParquetSource)  # as before


def test_splits_are_chosen_in_every_format(tmp_path):
    for split, text in (("train", "a"), ("test", "b")):
        write_lines(tmp_path / f"json/{split}.jsonl", [{"prompt": text}])
        tiny_parquet(tmp_path / f"parquet/{split}.parquet", [{"prompt": text}])
        write_images(tmp_path / f"images/{split}", range(1))
        write_lines(
            tmp_path / f"images/{split}/metadata.jsonl",
            [{"file_name": "images/0.png", "prompt": text}],
        )
    for folder in ("json", "parquet", "images"):
        path = str(tmp_path / folder)
        with pytest.raises(InputError, match=r"set data\.split"):
            open_source(path)
        assert open_source(path, split="train").column("prompt") == ["a"]
        assert open_source(path, split="test").column("prompt") == ["b"]
        with pytest.raises(InputError, match="has no split other"):
            open_source(path, split="other")
    file = str(tmp_path / "json/test.jsonl")
    with pytest.raises(InputError, match="has no split train"):
        open_source(file, split="train")
    one = write_lines(tmp_path / "one/rows.jsonl", [{"prompt": "c"}])
    assert open_source(str(one), split="train").column("prompt") == ["c"]


def test_files_that_describe_a_data_set_are_no_rows(tmp_path):
    """Such as those of a repository that the hub's client has fetched."""
    write_lines(tmp_path / "rows.jsonl", [{"prompt": "a"}])
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / "README.md").touch()
    assert open_source(str(tmp_path)).column("prompt") == ["a"]


def test_odd_names_and_compressed_files(tmp_path):
    import gzip

    folder = tmp_path / "a [b] *c"
    folder.mkdir()
    (folder / "rows?.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "a"}\n'))
    assert open_source(str(folder)).column("prompt") == ["a"]
    write_image_folder(tmp_path / "[d]")
    assert len(open_source(str(tmp_path / "[d]"), columns={"real_image": "image"})) == ROWS


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    path = write_lines(tmp_path / "rows.jsonl", [{"prompt": "a"}])
    (tmp_path / "file").touch()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file/cache")
    with pytest.raises(InputError, match=r"cannot be written; set HF_DATASETS_CACHE"):
        open_source(str(path))
    in_memory(range(2)).save_to_disk(tmp_path / "saved")
    assert len(open_source(str(tmp_path / "saved"))) == 2  # needs no cache


def test_without_the_library_both_remedies_are_named(tmp_path, monkeypatch):
    path = write_lines(tmp_path / "rows.jsonl", [{"prompt": "a"}])
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    with pytest.raises(InputError, match=r'pip install "corl-jax\[datasets\]"; or use parquet: '):
        open_source(str(path))
    with pytest.raises(InputError, match=r'pip install "corl-jax\[datasets\]"'):
        open_source("owner/name", split="train")
    monkeypatch.setattr(datasets, "__version__", "3.6.0")
    monkeypatch.setitem(sys.modules, "datasets", datasets)
    with pytest.raises(InputError, match=r"found `datasets` 3\.6\.0"):
        open_source(str(path))


# ---- the hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A repository `owner/name` in a folder, with the real builder; returns (folder, calls)."""
    folder, calls = tmp_path / "hub", []
    write_lines(folder / "data/small.jsonl", [{"prompt": "s"}])
    write_lines(folder / "data/big.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    (folder / "README.md").write_text(
        "---\nconfigs:\n- {config_name: small, data_files: data/small.jsonl}\n"
        "- config_name: big\n  data_files:\n  - {split: train, path: data/big.jsonl}\n"
        "  - {split: test, path: data/small.jsonl}\n---\n"
    )
    real = datasets.load_dataset_builder
    # The key of a local folder in the cache lacks the folder's place, as that of the hub has it.
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def load_builder(path, *args, **options):
        calls.append((path, *args, options.pop("revision")))
        return real(str(folder), *args, **options)

    monkeypatch.setattr(datasets, "load_dataset_builder", load_builder)
    return folder, calls


def test_configurations_splits_and_revisions_of_the_hub(hub):
    _, calls = hub
    source = open_source("owner/name", name="big", split="train", revision="refs/pr/1")
    assert source.column("prompt") == ["a", "b"]
    assert source.where(1) == "owner/name@refs/pr/1 big (train) row 1"
    assert open_source("owner/name", name="big", split="test").column("prompt") == ["s"]
    assert open_source("hf://datasets/owner/name@v1", name="small").column("prompt") == ["s"]
    assert open_source("owner/name", name="big", split="train[1:]").column("prompt") == ["b"]
    assert [call[:3] for call in calls] == [
        ("owner/name", "big", "refs/pr/1"), ("owner/name", "big", None),
        ("owner/name", "small", "v1"), ("owner/name", "big", None),
    ]  # fmt: skip
    with pytest.raises(InputError, match="has several splits; expected one of train, test"):
        open_source("owner/name", name="big")
    with pytest.raises(InputError, match="has no split dev; expected one of train, test"):
        open_source("owner/name", name="big", split="dev")
    with pytest.raises(InputError, match="small"):
        open_source("owner/name", name="none", split="train")


def test_a_stranger_runs_no_code_and_reads_no_file_of_this_machine(hub, tmp_path):
    folder, _ = hub
    write_images(tmp_path, range(1))
    secret = str(tmp_path / "images/0.png")
    write_lines(folder / "data/small.jsonl", [{"prompt": "a", "real_image": secret}])
    loader = loader_of(open_source("owner/name", name="small", required=REQUIRED))
    with pytest.raises(InputError, match="expected the image itself"):
        loader.check()
    outside = write_lines(tmp_path / "secret.jsonl", [{"prompt": "mine"}])
    readme = (folder / "README.md").read_text()
    (folder / "README.md").write_text(
        readme.replace("data/small.jsonl}\n- conf", f"{outside}}}\n- conf")
    )
    with pytest.raises(InputError, match=r"names the file .*secret\.jsonl, which is not in it"):
        open_source("owner/name", name="small")
    marker = tmp_path / "marker"
    (folder / "hub.py").write_text(f"open({str(marker)!r}, 'w')\n")
    with pytest.raises(InputError, match="scripts are no longer supported"):
        open_source("owner/name", name="small")
    assert not marker.exists()


def test_unsafe_formats_of_the_hub_are_refused(monkeypatch):
    from datasets.packaged_modules.pandas.pandas import Pandas

    def load_builder(*args, cache_dir, **options):
        return Pandas(cache_dir=cache_dir)

    monkeypatch.setattr(datasets, "load_dataset_builder", load_builder)
    with pytest.raises(InputError, match=r"owner/name holds pandas; expected one of arrow"):
        open_source("owner/name", split="train")


def test_offline_the_remedy_is_named(monkeypatch):
    def load_builder(*args, **options):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset_builder", load_builder)
    with pytest.raises(InputError, match=r"ConnectionError.*hf download .*owner/name"):
        open_source("owner/name", split="train")


def test_offline_the_copy_in_the_cache_is_read_but_not_for_a_revision(hub, tmp_path, monkeypatch):
    open_source("owner/name", name="small")
    # As if the copy had been fetched from the hub.
    (folder,) = (tmp_path / "cache/hub").iterdir()
    (file,) = folder.rglob("*.arrow")
    file.rename(file.with_name("name-train.arrow"))
    folder.rename(folder.with_name("small"))
    (tmp_path / "cache/hub").rename(tmp_path / "cache/owner___name")
    monkeypatch.undo()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert open_source("owner/name", name="small", split="train").column("prompt") == ["s"]
    with pytest.raises(InputError, match="may be of another revision"):
        open_source("owner/name", name="small", split="train", revision="v1")
    with pytest.raises(InputError, match=r"hf download .*owner/other"):
        open_source("owner/other", split="train")


def test_options_that_only_the_hub_has(tmp_path):
    path = str(write_lines(tmp_path / "rows.jsonl", [{"prompt": "a"}]))
    with pytest.raises(InputError, match=r"data\.name: found 'big'"):
        open_source(path, name="big")
    with pytest.raises(InputError, match=r"data\.revision: found 'v1'"):
        open_source(path, revision="v1")
    with pytest.raises(InputError, match="names a revision too"):
        open_source("owner/name@v2", revision="v1")
    with pytest.raises(InputError, match="expected one hub dataset"):
        open_source("hf://datasets/owner/name/data/*.parquet", split="train")
