"""The files of completions: what pandas and datasets read from them."""

from __future__ import annotations

import resource

import datasets
import numpy as np
import pandas
import pytest
from PIL import Image

from corl_jax.runs.sample_files import write_samples

ANSWER_IMAGE = Image.new("RGB", (6, 4), (10, 20, 30))


def record(task: str, completion: int, **changes):
    return {
        "step": 4, "task": task, "row": 0, "completion": completion, "prompt": "a fox",
        "image": ANSWER_IMAGE, "text": None, "solution": None, "length": 3, "reward": 0.5,
        "advantage": 1.25,
    } | changes  # fmt: skip


@pytest.fixture
def path(tmp_path):
    pixels = np.zeros((5, 5, 3), np.uint8)
    pixels[1, 2] = (200, 0, 0)
    records = [
        record("t2i", 0, image=pixels, reward_checker=float("nan"), reward=float("nan")),
        record("t2i", 1, image=pixels + 1, reward_checker=0.25),
        record("mm2t", 0, text="<answer>two</answer>", solution="2", reward_format=1.0),
        record("mm2t", 1, text="", solution="2", reward_format=0.0),
    ]
    path = tmp_path / "samples" / "step_000004.parquet"
    write_samples(path, records)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    return path


def test_pandas_reads_the_rows(path):
    table = pandas.read_parquet(path)
    assert list(table) == [
        "step", "task", "row", "completion", "prompt", "question", "image", "text", "plan",
        "solution", "length", "reward", "reward_checker", "reward_format", "advantage",
    ]  # fmt: skip
    assert list(table.dtypes[["step", "row", "completion", "length"]].map(str)) == ["int64"] * 4
    assert list(table.reward.isna()) == [True, False, False, False]
    assert list(table.reward_checker.isna()) == [True, False, True, True]
    assert list(table.reward_format.dropna()) == [1.0, 0.0]
    assert list(table.text.isna()) == [True, True, False, False] and table.text[3] == ""


def test_datasets_decodes_the_images(path, tmp_path):
    rows = datasets.load_dataset(
        "parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert isinstance(rows.features["image"], datasets.Image)
    image = np.asarray(rows[1]["image"])
    assert image.shape == (5, 5, 3) and tuple(image[1, 2]) == (201, 1, 1)
    assert rows[2]["image"].size == (6, 4) and rows[2]["solution"] == "2"
    assert rows[0]["reward_checker"] is None


def test_a_full_disk_leaves_no_part_of_a_file(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(OSError):
            write_samples(tmp_path / "samples" / "step_000001.parquet", [record("t2i", 0)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not [*(tmp_path / "samples").iterdir()]


@pytest.mark.parametrize(
    ("column", "value"),
    [("prompt", 3), ("solution", {"a": 1}), ("length", 2**70), ("image", np.zeros((2, 2, 7)))],
)
def test_a_value_of_another_type_is_named_by_its_column(column, value, tmp_path):
    path = tmp_path / "step_000001.parquet"
    with pytest.raises(ValueError, match=f"column {column}: "):
        write_samples(path, [record("t2i", 0), record("t2i", 1, **{column: value})])
    assert not [*tmp_path.iterdir()]


def test_a_group_without_any_reward_has_all_columns(tmp_path):
    path = tmp_path / "step_000001.parquet"
    write_samples(path, [record("t2i", 0, reward_checker=float("nan"))])
    assert str(pandas.read_parquet(path).reward_checker.dtype) == "float64"
