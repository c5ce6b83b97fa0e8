"""Finds the format of files of rows, and describes how to convert it to parquet."""

from __future__ import annotations

import collections
import json
import os
import shlex
from pathlib import Path

from corl_jax.input_files import BYTE_ORDER_MARK, LFS_PREFIX, describe_lfs_pointer, is_lfs_pointer

MAX_FILES_LISTED = 10_000  # a wrong path may be a whole disk
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
PARQUET_NAMES = (".parquet", ".pq", ".parq")
# The module to import and the call that reads a format; FILE stands for the path. Of several
# formats in a folder the first in this table is named.
READERS = {
    ".arrow": ("pyarrow.ipc", "pyarrow.ipc.open_stream(pyarrow.memory_map(FILE)).read_all()"),
    ".feather": ("pyarrow.feather", "pyarrow.feather.read_table(FILE)"),
    ".jsonl": ("pyarrow.json", "pyarrow.json.read_json(FILE)"),
    ".ndjson": ("pyarrow.json", "pyarrow.json.read_json(FILE)"),
    ".csv": ("pyarrow.csv", "pyarrow.csv.read_csv(FILE)"),
    ".tsv": (
        "pyarrow.csv as c",
        'c.read_csv(FILE, parse_options=c.ParseOptions(delimiter="\\t"))',
    ),
    ".json": (
        "json, pyarrow",
        'pyarrow.Table.from_pylist(json.load(open(FILE, encoding="utf-8-sig")))',
    ),
}
LOADERS = {".tar": "webdataset", **dict.fromkeys(IMAGE_SUFFIXES, "imagefolder")}
COMPRESSED = (".gz", ".bz2", ".zst", ".lz4")
FORMATS = {
    "parquet": (".parquet",),
    "json": (".jsonl", ".ndjson", ".json"),
    "csv": (".csv", ".tsv"),
    "arrow": (".arrow", ".feather"),
    "webdataset": (".tar",),
    "imagefolder": IMAGE_SUFFIXES,
}
"""Name of a format, as the library `datasets` has it -> the suffixes of its files."""
SAVED_FILES = ("dataset_dict.json", "state.json")  # in a folder that save_to_disk has written
SIDE_FILES = (*SAVED_FILES, "dataset_info.json", "dataset_infos.json")
"""Files that describe rows and hold none."""
# First bytes of a file -> its format. 0xffffffff begins each message of an Arrow stream.
_MAGIC = {
    b"ARROW1": ".feather", b"\xff\xff\xff\xff": ".arrow", b"{": ".jsonl", b"[": ".json",
    b"\x1f\x8b": ".gz", b"PK\x03\x04": ".zip", b"<": ".html",
    b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg",
}  # fmt: skip
_UNREADABLE = {
    ".html": "a web page, perhaps one that asks for a login; download the file again",
    ".zip": "a zip archive; unpack it",
    ".gz": "a gzip archive; unpack it",
}


def describe_folder(folder: str) -> str:
    """Describes the files of a folder without `.parquet` files, and how to convert them."""
    files: dict[str, list[str]] = collections.defaultdict(list)
    for path in list_files(folder):
        files[find_suffix(path)].append(path)
    if not files:
        return "it holds no file at all"
    counts = sorted(((len(paths), suffix) for suffix, paths in files.items()), reverse=True)
    summary = ", ".join(f"{count:,} {suffix or 'without a suffix'}" for count, suffix in counts[:5])
    text = f"it holds these files: {summary}"
    for suffix in PARQUET_NAMES:
        if suffix in files:
            ending = os.path.splitext(files[suffix][0])[1]
            return f"{text}; name them by a glob: {os.path.join(folder, '**', '*' + ending)}"
    named = {os.path.basename(path).partition(".")[0] for paths in files.values() for path in paths}
    # A folder of images has a metadata.jsonl or .csv, which is not the data itself.
    order = (*LOADERS, *READERS) if "metadata" in named else (*READERS, *LOADERS)
    suffix = next((suffix for suffix in order if suffix in files), None)
    if suffix is None:
        return text
    paths = sorted(files[suffix])
    if is_lfs_pointer(Path(paths[0])):
        return f"{text}; {describe_lfs_pointer(Path(paths[0]))}"
    kind = detect_format(paths[0])
    return f"{text}; {_describe_conversion(paths, kind if kind in order else suffix)}"


def describe_file(path: str) -> str:
    """Describes the format of a file that is not parquet and its conversion; '' if unknown."""
    kind = detect_format(path)
    if kind in READERS or kind in LOADERS:
        return f"it looks like {kind} data; {_describe_conversion([path], kind)}"
    return f"it looks like {_UNREADABLE[kind]}" if kind in _UNREADABLE else ""


def rewrite_command(path: str, rows: int) -> str:
    """Returns a shell command that writes a parquet file again in row groups of `rows` rows."""
    # By batches: besides the row group that it reads, the command has one batch in memory.
    target = f"{os.path.splitext(path)[0]}.rewritten.parquet"
    return _quote_python(
        f"import pyarrow.parquet as p; f = p.ParquetFile({_write_literal(path)}); "
        f"w = p.ParquetWriter({_write_literal(target)}, f.schema_arrow); "
        f"[w.write_batch(b) for b in f.iter_batches({rows})]; w.close()"
    )


def _describe_conversion(paths: list[str], suffix: str) -> str:
    path = paths[0]
    target = f"{os.path.splitext(path.removesuffix(_find_compression(path)))[0]}.parquet"
    if suffix in LOADERS:
        source = f"data_files={_write_literal(path)}"
        if suffix in IMAGE_SUFFIXES:
            source = f"data_dir={_write_literal(os.path.dirname(path) or '.')}"
        code = (
            f'import datasets; datasets.load_dataset("{LOADERS[suffix]}", {source}, '
            f'split="train").to_parquet({_write_literal(target)})'
        )
    else:
        modules, call = READERS[suffix]
        code = (
            f"import {modules}, pyarrow.parquet as p; "
            f"p.write_table({call.replace('FILE', _write_literal(path))}, "
            f"{_write_literal(target)}, row_group_size=100)"
        )
    others = f" (and so each of the {len(paths)})" if len(paths) > 1 else ""
    return (
        f"convert it{others}, for example: {_quote_python(code)} ; "
        "docs/how_to/data.md says which columns are read and how images are embedded"
    )


def detect_format(path: str) -> str:
    """Returns the suffix of a file's format by its first bytes, else by its name, else ''."""
    try:
        with open(path, "rb") as file:
            start = file.read(512).removeprefix(BYTE_ORDER_MARK)
    except OSError:
        start = b""  # reading it as parquet says why
    suffix = find_suffix(path)
    if start.startswith((LFS_PREFIX, b"PAR1")):
        return ""
    # A table may begin with any character, also with those of another format.
    if suffix in (".csv", ".tsv"):
        return suffix
    if start[257:262] == b"ustar":
        return ".tar"
    sniffed = next((kind for magic, kind in _MAGIC.items() if start.startswith(magic)), "")
    # rows.jsonl.gz is a table, not an archive.
    if sniffed == ".gz" and suffix in READERS:
        return suffix
    return sniffed or (suffix if suffix in READERS or suffix in LOADERS else "")


def _quote_python(code: str) -> str:
    return f"python -c {shlex.quote(code)}"


def _write_literal(text: str) -> str:
    # A JSON string is a Python literal in double quotes. shlex then adds single quotes around all.
    return json.dumps(text, ensure_ascii=False)


def _find_compression(path: str) -> str:
    return next((end for end in COMPRESSED if path.lower().endswith(end)), "")


def find_suffix(path: str) -> str:
    """Returns the suffix of a file in lower case, without that of a compression."""
    return os.path.splitext(path.lower().removesuffix(_find_compression(path)))[1]


def list_files(folder: str) -> list[str]:
    """Returns files in a folder and the folders in it, at most about MAX_FILES_LISTED."""
    paths: list[str] = []
    for parent, folders, names in os.walk(folder):
        # In place: os.walk then enters only these, in this order.
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths += [os.path.join(parent, name) for name in names if not name.startswith(".")]
        if len(paths) >= MAX_FILES_LISTED:
            break
    return paths
