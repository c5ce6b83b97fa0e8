"""Parquet reading, order, sharding, bad rows, prefetch and resume of the loader."""

from __future__ import annotations

import pickle
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from corl_jax.data.columns import COLUMNS
from corl_jax.data.dataset import Loader, LoaderOptions, required_columns, split_held_out_rows
from corl_jax.data.parquet import ParquetSource
from corl_jax.data.row_files import find_files
from corl_jax.errors import InputError
from corl_jax.policies.janus.prompts import Processor
from tests.support.tiny_models import (
    encode,
    encode_prompts,
    encode_questions,
    tiny_image,
    tiny_parquet,
    tiny_row,
    tiny_tokenizer_dir,
)

BOTH = ("t2i", "mm2t")


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return Processor.from_dir(tiny_tokenizer_dir(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return ParquetSource(tiny_parquet(tmp_path_factory.mktemp("data") / "rows.parquet", 30))


def loader(source, processor, **options):
    settings = {"tasks": BOTH, "batch_size": 4, "seed": 7, **options}
    return Loader(source, processor, LoaderOptions(**settings))


def numbers(prompts):
    """The row numbers of a batch, as tiny_row writes them."""
    return [int(question.rsplit(" ", 1)[1]) for question in prompts.columns["qa_problem"]]


def same(a, b):
    assert numbers(a) == numbers(b)
    np.testing.assert_array_equal(a.index, b.index)
    for task in BOTH:
        one, two = a.encoded[task], b.encoded[task]
        np.testing.assert_array_equal(one.input_ids, two.input_ids)
        np.testing.assert_array_equal(one.attention_mask, two.attention_mask)
    np.testing.assert_array_equal(a.encoded["mm2t"].pixel_values, b.encoded["mm2t"].pixel_values)


# ---- source


def test_rows_over_files_and_row_groups(tmp_path):
    for part in range(3):
        rows = [tiny_row(10 * part + i) for i in range(10)]
        tiny_parquet(tmp_path / f"train-{part}.parquet", rows, row_group_size=4)
    source = ParquetSource(tmp_path, cache_bytes=1)
    assert len(source) == 30 and tuple(source.names) == COLUMNS
    for row in random.Random(0).sample(range(30), 30):
        assert source[row] == tiny_row(row)
    assert source.column("prompt") == [tiny_row(row)["prompt"] for row in range(30)]
    assert source.where(13).endswith("train-1.parquet row 3")
    with pytest.raises(IndexError):
        source[30]


def test_cache_is_bounded_and_pickle_holds_paths_only(tmp_path):
    path = tiny_parquet(tmp_path / "a.parquet", 40, row_group_size=4)
    source = ParquetSource(path)
    source[0]
    group = source._cached_bytes
    source = ParquetSource(path, cache_bytes=3 * group)
    for row in range(40):
        source[row]
    assert 1 <= len(source._cache) <= 4 and source._cached_bytes <= 3 * group
    data = pickle.dumps(source)
    assert len(data) < 500
    assert pickle.loads(data)[5] == tiny_row(5)


def test_column_mapping_and_extra_columns(tmp_path):
    rows = [{**tiny_row(i), "scene": i} for i in range(3)]
    path = tiny_parquet(tmp_path / "a.parquet", rows, columns={"prompt": "caption"})
    source = ParquetSource(path, columns={"prompt": "caption"}, required=("prompt",))
    assert source[2] == {**tiny_row(2), "scene": 2}


def test_every_schema_problem_at_once(tmp_path):
    rows = [{"promt": "a", "qa_problem": 3, "real_image": None} for _ in range(2)]
    path = tiny_parquet(tmp_path / "a.parquet", rows)
    with pytest.raises(InputError) as error:
        ParquetSource(path, columns={"qa_type": "kind", "qa": "x"}, required=("prompt",))
    text = str(error.value)
    assert len(error.value.problems) == 4
    for part in ("did you mean promt", "column kind", "columns.qa:", "int64", "expected string"):
        assert part in text


def test_broken_and_differing_files_are_listed_together(tmp_path):
    good = tiny_parquet(tmp_path / "a.parquet", 4)
    (tmp_path / "b.parquet").write_bytes(good.read_bytes()[:-20])
    (tmp_path / "c.parquet").write_bytes(b"")
    tiny_parquet(tmp_path / "d.parquet", [{"prompt": "x"}])
    with pytest.raises(InputError) as error:
        ParquetSource(tmp_path, required=("real_image",))
    assert len(error.value.problems) == 3
    assert "b.parquet: not a readable" in error.value.problems[0]
    assert "0 bytes" in error.value.problems[1]
    assert "d.parquet: column real_image (for real_image) is absent" in error.value.problems[2]
    empty = tmp_path / "empty" / "e.parquet"
    empty.parent.mkdir()
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), empty)
    with pytest.raises(InputError, match="0 rows"):
        ParquetSource(empty)


def test_finding_files(tmp_path):
    first, second = (
        tiny_parquet(tmp_path / "a/x.parquet", 1),
        tiny_parquet(tmp_path / "y.parquet", 1),
    )
    assert find_files(tmp_path) == [str(first), str(second)]
    assert find_files([second, first]) == [str(second), str(first)]
    assert find_files(str(tmp_path / "*.parquet")) == [str(second)]
    for entry, message in (
        (tmp_path / "no.parquet", "not found"),
        ([], "empty list"),
        ([first, first], "named twice"),
    ):
        with pytest.raises(InputError, match=message):
            find_files(entry)
    tiny_parquet(tmp_path / "test-0.parquet", 1)
    tiny_parquet(tmp_path / "train-0.parquet", 1)
    with pytest.raises(InputError, match=r"splits test, train.*train\*\.parquet"):
        find_files(tmp_path)


def test_hub_datasets(tmp_path, monkeypatch):
    import huggingface_hub

    calls = []

    def download(repo, **options):
        calls.append((repo, options["repo_type"], options["allow_patterns"]))
        if repo == "owner/gone":
            raise OSError("no connection\nmore")
        return str(tmp_path)

    path = tiny_parquet(tmp_path / "data/train-0.parquet", 1)
    tiny_parquet(tmp_path / "data/test-0.parquet", 1)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert find_files("hf://datasets/owner/name/data/train-*.parquet") == [str(path)]
    assert calls == [("owner/name", "dataset", ["data/train-*.parquet"])]
    with pytest.raises(InputError, match="splits"):
        find_files("owner/name")
    with pytest.raises(InputError, match=r"no connection\). Offline"):
        find_files("owner/gone")


def test_held_out_takes_the_last_rows(source):
    train, evaluation = split_held_out_rows(source, 5)
    assert (len(train), len(evaluation)) == (25, 5)
    assert evaluation[0] == tiny_row(25) and evaluation.where(0).endswith("row 25")
    assert evaluation.column("qa_type") == source.column("qa_type")[25:]
    with pytest.raises(IndexError):
        train[25]
    with pytest.raises(InputError):
        split_held_out_rows(source, 30)


# ---- order


def test_batches_are_complete_and_encoded(source, processor):
    prompts = loader(source, processor).batch(2)
    assert prompts.index.tolist() == [8, 9, 10, 11] and len(prompts) == 4
    assert set(prompts.columns) == set(COLUMNS)
    row = numbers(prompts)[1]
    image = prompts.columns["real_image"][1]
    np.testing.assert_array_equal(np.asarray(image), np.asarray(tiny_image(row)))
    expected = encode_questions(processor, [tiny_row(row)["qa_problem"]], [image], length=64)
    np.testing.assert_array_equal(prompts.encoded["mm2t"].input_ids[1], expected.input_ids[0])
    np.testing.assert_array_equal(prompts.encoded["mm2t"].pixel_values[1], expected.pixel_values[0])
    drawing = encode_prompts(processor, [tiny_row(row)["prompt"]], length=32)
    np.testing.assert_array_equal(prompts.encoded["t2i"].input_ids[1], drawing.input_ids[0])


def test_order_is_a_pure_function_of_seed_and_step(source, processor):
    one, two = loader(source, processor), loader(source, processor)
    forward = [one.batch(step) for step in range(12)]
    for step in (9, 0, 11, 4):
        same(forward[step], two.batch(step))
    seen = [row for prompts in forward for row in numbers(prompts)]
    assert sorted(seen[:30]) == list(range(30))  # a pass is a permutation
    assert seen[30:48] != seen[:18]  # and each pass its own
    assert seen[:30] != list(range(30))
    other = loader(source, processor, seed=8)
    assert numbers(other.batch(0)) != seen[:4]
    plain = loader(source, processor, shuffle=False)
    assert [numbers(plain.batch(step)) for step in (0, 7)] == [[0, 1, 2, 3], [28, 29, 0, 1]]
    assert plain.steps_per_epoch == 8


@pytest.mark.parametrize("count", [2, 4])
def test_order_does_not_depend_on_the_processes(source, processor, count):
    whole = loader(source, processor, lengths="dataset")
    shares = [loader(source, processor, process_index=i, process_count=count) for i in range(count)]
    for step in (0, 5, 9):
        parts = [share.batch(step) for share in shares]
        expected = whole.batch(step)
        assert [row for part in parts for row in numbers(part)] == numbers(expected)
        assert np.concatenate([part.index for part in parts]).tolist() == expected.index.tolist()
        ids = np.concatenate([part.encoded["mm2t"].input_ids for part in parts])
        np.testing.assert_array_equal(ids, expected.encoded["mm2t"].input_ids)


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_prefetch_keeps_the_order(source, processor, threads):
    ahead = loader(source, processor, threads=threads, prefetch=3)
    direct = loader(source, processor)
    for step, prompts in enumerate(ahead.iterate(3, 12), start=3):
        same(prompts, direct.batch(step))


def test_resume_continues_with_the_same_batches(source, processor):
    straight = loader(source, processor)
    stream = iter(straight)
    expected = [next(stream) for _ in range(9)]
    stopped = loader(source, processor)
    stream = iter(stopped)
    for _ in range(5):
        next(stream)
    state = stopped.get_state()
    assert state["step"] == 5
    resumed = loader(source, processor, threads=1)
    resumed.set_state(state)
    for prompts, want in zip(resumed, expected[5:], strict=False):
        same(prompts, want)
    assert straight.get_state() == {**state, "step": 9}
    with pytest.raises(InputError) as error:
        loader(source, processor, seed=1, batch_size=2).set_state(state)
    assert len(error.value.problems) == 2


def test_single_tasks_and_plain_columns(source, processor, tmp_path):
    drawing = loader(source, processor, tasks=("t2i",)).batch(0)
    assert list(drawing.encoded) == ["t2i"] and drawing.encoded["t2i"].pixel_values is None
    assert list(loader(source, processor, tasks=("mm2t",)).batch(0).encoded) == ["mm2t"]
    bare = loader(source, None, tasks=()).batch(0)
    assert not bare.encoded and bare.columns["real_image"][0].size == (32, 32)
    texts = ParquetSource(tiny_parquet(tmp_path / "t.parquet", [{"prompt": "a"}, {"prompt": "b"}]))
    assert loader(texts, processor, tasks=("t2i",)).batch(0).columns.keys() == {"prompt"}


def test_wrong_arguments_are_listed_together(source, processor, tmp_path):
    with pytest.raises(InputError) as error:
        loader(source, None, tasks=("t2i", "x"), batch_size=3, seed=-1, process_count=2)
    assert len(error.value.problems) == 4
    texts = ParquetSource(tiny_parquet(tmp_path / "t.parquet", [{"prompt": "a"}]))
    with pytest.raises(InputError) as error:
        loader(texts, processor, required=("qa_type",))
    assert len(error.value.problems) == 3
    assert required_columns(BOTH) == ("prompt", "real_image", "qa_problem")


# ---- rows that cannot be used

BROKEN = {
    4: {"real_image": {"bytes": None, "path": "x.png"}},
    5: {"real_image": {"bytes": b"no picture", "path": None}},
    11: {"prompt": None},
    20: {"qa_problem": "  "},
    29: {"real_image": None},
}


def broken_source(tmp_path, changes=BROKEN):
    rows = [tiny_row(i, **changes.get(i, {})) for i in range(30)]
    return ParquetSource(tiny_parquet(tmp_path / "broken.parquet", rows))


def test_bad_rows_give_way_to_the_next_usable_row(tmp_path, processor, source):
    options = {"max_bad_fraction": 0.2, "batch_size": 10}
    mended = loader(broken_source(tmp_path), processor, **options)
    replacement = {4: 6, 5: 6, 11: 12, 20: 21, 29: 0}
    clean = loader(source, processor, **options)
    for step in range(3):
        expected = [replacement.get(row, row) for row in numbers(clean.batch(step))]
        assert numbers(mended.batch(step)) == expected
    assert mended.counts == {"bad": 5, "long": 0}
    resumed = loader(
        broken_source(tmp_path), processor, process_index=1, process_count=2, **options
    )
    assert numbers(resumed.batch(2)) == numbers(mended.batch(2))[5:]


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_too_many_bad_rows_stop_the_run(tmp_path, processor, threads):
    strict = loader(broken_source(tmp_path), processor, max_bad_fraction=0.1, threads=threads)
    with pytest.raises(InputError) as error:
        for _ in strict.iterate(0, 30):
            pass
    problems = error.value.problems
    listed = problems[1:]
    found = len(listed)
    assert found == 4 if threads < 2 else found in (4, 5)
    assert f"{found} of 30 rows cannot be decoded" in problems[0] and "0.1" in problems[0]
    assert all("broken.parquet row" in row for row in listed)


def test_a_column_that_no_task_needs_may_be_null(tmp_path, processor):
    source = broken_source(tmp_path, {3: {"real_image": None, "qa_problem": None}})
    drawing = loader(source, processor, tasks=("t2i",), shuffle=False, max_bad_fraction=0)
    assert drawing.batch(0).columns["real_image"][3] is None
    needed = loader(source, processor, tasks=("t2i",), shuffle=False, required=("real_image",))
    with pytest.raises(InputError, match="real_image is null"):
        needed.batch(0)


def test_long_prompts_are_left_out_and_counted(tmp_path, processor):
    source = broken_source(tmp_path, {1: {"prompt": "a " * 90}, 2: {"qa_problem": "b " * 90}})
    short = loader(source, processor, max_prompt_length=64, shuffle=False, lengths="dataset")
    assert numbers(short.batch(0)) == [0, 3, 3, 3]
    assert short.counts == {"bad": 0, "long": 2}
    assert short.lengths["mm2t"] <= 64
    assert short.batch(0).encoded["mm2t"].input_ids.shape[1] <= 64
    none = loader(source, processor, max_prompt_length=5)
    with pytest.raises(InputError, match="are over max_prompt_length"):
        none.batch(0)
    with pytest.raises(InputError, match="no row"):
        loader(source, processor, max_prompt_length=5, lengths="dataset")


def test_an_unreadable_row_group_counts_as_bad_rows(tmp_path, processor):
    path = tiny_parquet(tmp_path / "a.parquet", 30, row_group_size=10)
    column = pq.ParquetFile(path).metadata.row_group(1).column(1)
    data = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    data[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(data)
    source = ParquetSource(path)
    tolerant = loader(source, processor, max_bad_fraction=0.5, batch_size=30, shuffle=False)
    assert numbers(tolerant.batch(0)) == [*range(10), *[20] * 10, *range(20, 30)]
    assert tolerant.counts["bad"] == 10
    with pytest.raises(InputError, match="unreadable"):
        loader(source, processor, batch_size=30).batch(0)


def test_check_stops_unusable_data_before_the_run(tmp_path, processor, source):
    loader(source, processor).check()
    changes = {
        i: {"real_image": {"bytes": encode(tiny_image(i))[:60], "path": None}} for i in range(8)
    }
    with pytest.raises(InputError) as error:
        loader(broken_source(tmp_path, changes), processor).check()
    assert len(error.value.problems) == 8


def test_processes_tell_each_other_of_unusable_rows(tmp_path, processor):
    """Five of thirty rows are bad, which no process sees all of."""
    shares = [
        loader(
            broken_source(tmp_path), processor, process_index=index, process_count=2,
            max_bad_fraction=limit, batch_size=10,
        )
        for index, limit in enumerate((0.2, 0.15))
    ]  # fmt: skip
    for share in shares:
        for step in range(3):
            share.batch(step)
    first, second = (share.counts["bad"] for share in shares)
    assert 0 < first < 5 and 0 < second < 5
    shares[0].share_unusable(lambda rows: rows | {4, 5, 11, 20, 29} if rows else rows)
    assert shares[0].counts == {"bad": 5, "long": 0}
    with pytest.raises(InputError, match="5 of 30 rows cannot be decoded"):
        shares[1].share_unusable(lambda rows: rows | {4, 5, 11, 20, 29} if rows else rows)
