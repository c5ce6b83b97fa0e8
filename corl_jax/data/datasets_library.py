"""Loads rows by the Hugging Face library `datasets`: its formats, configurations and splits.

The library converts files to Arrow files in its cache, which are mapped into memory. Rows are read
on demand, and images stay encoded: this package decodes all images itself. No code of a data set is
run: the library refuses scripts from version 4 on, and only formats that hold data are accepted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import itertools
import os
import re
import urllib.parse
from collections.abc import Iterator, Sequence
from typing import Any

from corl_jax.errors import InputError, take_first_line

INSTALL = 'pip install "corl-jax[datasets]"'
FIRST_SAFE_VERSION = 4  # the first one that runs no script of a data set
SAFE_FORMATS = ("arrow", "csv", "imagefolder", "json", "parquet", "text", "webdataset")
"""Formats of the library that are read. Others, such as pickled pandas, can run code."""
CACHED = "cache"  # the format of rows that the library finds in its cache, without a network
REMOTE = ("hf://", "https://", "http://")  # where files of a hub dataset may lie


@dataclasses.dataclass(frozen=True)
class Part:
    """Rows of one file, folder or hub dataset."""

    name: str  # for messages
    rows: Any  # a `datasets.Dataset` in the format arrow
    folder: str | None = None  # that relative paths of images start from
    trusted: bool = True  # False: images are only read from the library's own cache
    label_column: str | None = None  # whose value names a row in messages


def import_library() -> Any:
    """Returns the library `datasets`, without its progress bars.

    Raises:
        InputError: it is not installed, or so old that it may run scripts of data sets.
    """
    try:
        import datasets

        version = datasets.__version__
        datasets.disable_progress_bars()
    except (ImportError, AttributeError) as error:  # AttributeError: a folder of this name
        raise InputError(
            f"the library `datasets` reads this, and it is not installed ({error}); {INSTALL}"
        ) from error
    if int(version.partition(".")[0]) < FIRST_SAFE_VERSION:
        raise InputError(
            f"found `datasets` {version}; expected {FIRST_SAFE_VERSION} or newer, which run no "
            f"scripts of data sets; {INSTALL}"
        )
    return datasets


def load_file_part(kind: str, file: str) -> Part:
    """Reads a file of one of SAFE_FORMATS. Raises InputError if it cannot be read."""
    datasets = import_library()
    path = os.path.abspath(file)
    if not os.path.getsize(path):
        raise InputError(f"data: {file}: has 0 bytes; expected rows; write it again")
    with _explain_failure(file, f"it cannot be read as {kind}"):
        options = _read_csv_options(path) if kind == "csv" else {}
        cache = _prepare_cache(datasets)
        # Escaped, since the library takes the name for a glob.
        rows = datasets.load_dataset(
            kind, data_files=[glob.escape(path)], split="train", cache_dir=cache, **options
        )
        if kind == "webdataset":
            rows = rows.flatten()  # a sample's JSON becomes columns: json.question, json.answer
    label = "__key__" if kind == "webdataset" else None
    return Part(file, rows.with_format("arrow"), os.path.dirname(path), label_column=label)


def load_image_folder_part(folder: str, split: str | None) -> Part:
    """Reads a folder of images with a `metadata.jsonl`. Raises InputError if it cannot be read."""
    datasets = import_library()
    with _explain_failure(folder, "it cannot be read as a folder of images"):
        cache = _prepare_cache(datasets)
        path = glob.escape(os.path.abspath(folder))
        builder = datasets.load_dataset_builder("imagefolder", data_dir=path, cache_dir=cache)
        rows, chosen = _build_split(builder, split, folder)
    name = f"{folder} ({chosen})"
    return Part(name, rows, os.path.abspath(folder), label_column="image")


def load_saved_part(folder: str, split: str | None) -> Part:
    """Reads a folder that `save_to_disk` has written. Raises InputError if it cannot be read."""
    datasets = import_library()
    with _explain_failure(folder, "it cannot be read as a data set that save_to_disk has written"):
        saved = datasets.load_from_disk(folder)
        if isinstance(saved, datasets.DatasetDict):
            split = _choose_split(list(saved), split, folder)
            saved = saved[split]
        elif split not in (None, str(saved.split)):
            raise InputError(
                f"data: {folder} has no split {split}; it holds one data set without parts; leave "
                "the split out"
            )
    return Part(folder if split is None else f"{folder} ({split})", saved.with_format("arrow"),
                os.path.abspath(folder))  # fmt: skip


def load_hub_part(repo: str, revision: str | None, name: str | None, split: str | None) -> Part:
    """Reads a split of a hub dataset's configuration. Raises InputError if it cannot be read."""
    datasets = import_library()
    revision = revision and urllib.parse.unquote(revision)
    where = f"{repo}{'@' if revision else ''}{revision or ''}{f' {name}' if name else ''}"
    remedy = (
        f"; offline, fetch it elsewhere with `hf download --repo-type dataset {repo} --local-dir "
        "DIR` and give its files or folders in DIR"
    )
    with _explain_failure(where, "it cannot be read from the hub", remedy):
        cache = _prepare_cache(datasets)
        builder = datasets.load_dataset_builder(repo, name, revision=revision, cache_dir=cache)
        _require_safe_files(builder, where)
        if revision and _find_kind(builder) == CACHED:
            raise InputError(
                f"data: {where}: the hub cannot be reached, and the copy in the cache may be of "
                f"another revision; leave the revision out to use that copy{remedy}"
            )
        rows, chosen = _build_split(builder, split, where)
    return Part(f"{where} ({chosen})", rows, trusted=False)


def _prepare_cache(datasets: Any) -> str:
    """Returns the library's cache folder, made if it is missing. Raises InputError if it cannot."""
    folder = os.fspath(datasets.config.HF_DATASETS_CACHE)
    try:
        os.makedirs(folder, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise InputError(
            f"data: the library `datasets` converts files into its cache {folder}, which cannot be "
            "written; set HF_DATASETS_CACHE to a folder on a disk that can, with room for all rows"
        )
    return folder


@contextlib.contextmanager
def _explain_failure(what: str, problem: str, remedy: str = "") -> Iterator[None]:
    """Turns any error of the library into an InputError that names its cause."""
    try:
        yield
    except InputError:
        raise
    # Its readers raise those of pyarrow, pandas, tarfile, fsspec and the hub's client.
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # DatasetGenerationError itself says nothing
            cause = cause.__cause__
        reasons = dict.fromkeys(f"{type(e).__name__}: {take_first_line(e)}" for e in (error, cause))
        why = "; ".join(reasons)
        raise InputError(f"data: {what}: {problem} ({why}){remedy}") from error


def _read_csv_options(path: str) -> dict[str, Any]:
    """Returns options that read every column of a table as text, and only empty cells as null."""
    import datasets
    import pandas

    name = path.lower()
    separator = "\t" if ".tsv" in os.path.basename(name) else ","
    start = pandas.read_csv(path, sep=separator, nrows=1, dtype=str)
    # pandas takes a field more than the header has for an index, and shifts all others.
    if not isinstance(start.index, pandas.RangeIndex):
        raise InputError(
            f"{path}: its first row has more fields than the header; expected as many; is a text "
            "with a comma not in quotes?"
        )
    features = datasets.Features({name: datasets.Value("string") for name in start.columns})
    return {"sep": separator, "features": features, "keep_default_na": False, "na_values": [""]}


def _find_kind(builder: Any) -> str:
    # datasets.packaged_modules.json.json -> json
    return type(builder).__module__.rpartition(".")[2]


def _require_safe_files(builder: Any, where: str) -> None:
    kind = _find_kind(builder)
    if not type(builder).__module__.startswith("datasets.packaged_modules."):
        kind = "a script"
    if kind not in (*SAFE_FORMATS, CACHED):
        raise InputError(
            f"data: {where} holds {kind}; expected one of {', '.join(SAFE_FORMATS)}; convert it"
        )
    # A repository's README may name any files, also those of this machine.
    inside = (os.path.join(builder.base_path or REMOTE[0], ""), *REMOTE)
    data_files = itertools.chain(*(builder.config.data_files or {}).values())
    strange = [str(file) for file in data_files if not str(file).startswith(inside)]
    if strange:
        raise InputError(
            f"data: {where} names the file {strange[0]}, which is not in it; expected its own "
            "files; use another data set"
        )


def _build_split(builder: Any, split: str | None, where: str) -> tuple[Any, str]:
    """Returns (rows, split) of a builder. Raises InputError if the split is not one of its."""
    known = list(map(str, builder.info.splits or builder.config.data_files or ()))
    # train[:10%] and train+validation begin with a name as well.
    if split is None or re.fullmatch(r"[\w.]+", split):
        split = _choose_split(known, split, where)
    builder.download_and_prepare()
    return builder.as_dataset(split=split).with_format("arrow"), split


def _choose_split(known: Sequence[str], split: str | None, where: str) -> str:
    if split is not None and split in known:
        return split
    if split is None and len(known) == 1:
        return known[0]
    wrong = f"has no split {split}" if split else "has several splits"
    raise InputError(
        f"data: {where} {wrong}; expected one of {', '.join(known)}; set data.split, or eval.split "
        "for held-out rows"
    )
