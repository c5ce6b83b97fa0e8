"""Copies repositories of the hub with the headers of their large files, without the rest.

A check of a run needs names, shapes and sizes. So a large file of a copy has its real size but is
sparse: only its header has content. Every reader works on it as on the whole file, as long as it
reads no values.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import re
import struct
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from corl_jax.errors import InputError

LARGE_SUFFIXES = (".safetensors", ".bin", ".parquet")
SMALL_BYTES = 2**20  # a file up to this size is read whole
FIRST_READ = 2**17  # bytes; most headers are shorter
MAX_HEADER_BYTES = 2**24
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")  # of an entry of a zip archive
_VALUES = re.compile(r"[^/]+/data/[^/]+")  # entries of a PyTorch archive with tensors' values
_FOLDERS = {"model": "", "dataset": "hf://datasets/"}  # repository type -> start of a place's name


@dataclasses.dataclass
class Download:
    """The files of a repository that a run would download."""

    files: int = 0
    nbytes: int = 0


class HubHeaders:
    """The copies below one folder; counts what a run would download, and what was read."""

    def __init__(self, root: Path):
        self.root = root
        self.downloads: dict[str, Download] = {}  # by place
        self.read_bytes = 0
        self._urls: dict[str, str] = {}  # of sparse files, by path
        self._read: dict[str, set[tuple[int, int]]] = {}

    @property
    def has_partial_data(self) -> bool:
        """True if a copied file of a data set has no rows but those that were asked for."""
        return any(path.endswith(".parquet") for path in self._urls)

    def is_partial(self, path: str) -> bool:
        """Returns whether a file is a copy of which only parts have content."""
        return path in self._urls

    def copy_snapshot(
        self,
        repo: str,
        *,
        allow_patterns: Sequence[str],
        repo_type: str = "model",
        revision: str | None = None,
    ) -> str:
        """Returns a folder with the repository's files, as `huggingface_hub.snapshot_download`.

        Raises:
            OSError: the hub cannot be reached and nothing is cached.
            InputError: the hub names a file outside of the repository.
        """
        import huggingface_hub
        from huggingface_hub.utils import filter_repo_objects

        info = self._list_files(repo, repo_type, revision)
        if info is None:
            return huggingface_hub.snapshot_download(
                repo, repo_type=repo_type, revision=revision, local_files_only=True,
                allow_patterns=list(allow_patterns),
            )  # fmt: skip
        name = repo if revision is None else f"{repo}@{revision}"
        folder = self.root / repo_type / name
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
        where = {"repo_type": repo_type, "revision": info.sha}
        for file in filter_repo_objects(sizes, allow_patterns=list(allow_patterns)):
            copy = folder / file
            if ".." in Path(file).parts or not copy.is_relative_to(folder):
                raise InputError(f"{name}: found a file {file!r}, which lies outside of it")
            if copy.exists():
                continue
            copy.parent.mkdir(parents=True, exist_ok=True)
            cached = huggingface_hub.try_to_load_from_cache(repo, file, **where)
            if isinstance(cached, str):
                copy.symlink_to(Path(cached).resolve())
                continue
            self._copy_file(huggingface_hub.hf_hub_url(repo, file, **where), copy, sizes[file])
            download = self.downloads.setdefault(_FOLDERS[repo_type] + name, Download())
            download.files += 1
            download.nbytes += sizes[file]
        return str(folder)

    def read_range(self, path: Path | str, start: int, stop: int) -> bytes:
        """Writes bytes [start, stop) of the hub's file into its sparse copy, and returns them."""
        content = self._request(self._urls[str(path)], start, stop)
        with Path(path).open("r+b") as stream:
            stream.seek(start)
            stream.write(content)
        return content

    def fill_ranges(self, path: str, ranges: Sequence[tuple[int, int]]) -> None:
        """Writes [start, stop) ranges into a sparse copy, each once; leaves other files alone."""
        if path in self._urls:
            done = self._read.setdefault(path, set())
            for start, stop in sorted({*ranges} - done):
                self.read_range(path, start, stop)
                done.add((start, stop))

    def name_places(self, text: str) -> str:
        """Returns a text with the names of repositories in place of the folders of copies."""
        for kind, start in _FOLDERS.items():
            text = text.replace(f"{self.root / kind}/", start)
        return text

    def describe(self) -> str:
        """Returns what a run would download; empty if everything is here."""
        if not self.downloads:
            return ""
        total = sum(download.nbytes for download in self.downloads.values())
        lines = [
            f"downloads of a run: {_format_bytes(total)}; this check read "
            f"{_format_bytes(self.read_bytes)} of it: headers, small files and the first rows"
        ]
        lines += [
            f"  {place:48}{_format_bytes(download.nbytes):>10} in {download.files:,} file(s)"
            for place, download in self.downloads.items()
        ]
        return "\n".join(lines)

    def _list_files(self, repo: str, repo_type: str, revision: str | None) -> Any:
        """Returns the hub's answer with commit, file names and sizes.

        None if the hub cannot be reached, and the cache has a snapshot.
        """
        import huggingface_hub

        where: dict[str, Any] = {"repo_type": repo_type, "revision": revision}
        try:
            return huggingface_hub.HfApi().repo_info(repo, files_metadata=True, **where)
        except Exception as error:  # of the client, or of its HTTP library
            with contextlib.suppress(OSError, ValueError):
                huggingface_hub.snapshot_download(repo, local_files_only=True, **where)
                return None
            if isinstance(error, OSError):
                raise
            raise OSError(f"{type(error).__name__}: {error}") from error

    def _copy_file(self, url: str, copy: Path, size: int) -> None:
        if copy.suffix not in LARGE_SUFFIXES or size <= SMALL_BYTES:
            copy.write_bytes(self._request(url, 0, size) if size else b"")
            return
        with copy.open("wb") as stream:
            stream.truncate(size)
        self._urls[str(copy)] = url
        read = {
            ".safetensors": self._read_safetensors,
            ".bin": self._read_archive,
            ".parquet": self._read_footer,
        }
        read[copy.suffix](copy, size)

    def _read_safetensors(self, copy: Path, size: int) -> None:
        start = self.read_range(copy, 0, min(FIRST_READ, size))
        end = 8 + int.from_bytes(start[:8], "little")
        # A length that cannot be true is reported by the reader of the copy.
        if len(start) < end <= min(size, MAX_HEADER_BYTES):
            self.read_range(copy, len(start), end)

    def _read_footer(self, copy: Path, size: int) -> None:
        tail = self.read_range(copy, max(0, size - FIRST_READ), size)
        length = 8 + int.from_bytes(tail[-8:-4], "little")
        if len(tail) < length <= min(size, MAX_HEADER_BYTES):
            self.read_range(copy, size - length, size - len(tail))

    def _read_archive(self, copy: Path, size: int) -> None:
        """Reads the names and shapes of a PyTorch archive: its entries without tensors' values."""
        if self.read_range(copy, 0, 4) != b"PK\3\4":
            # PyTorch before 1.6 wrote names between values.
            print(f"{self.name_places(str(copy))}: has no header, so it is read whole")
            self.read_range(copy, 0, size)
            return
        entries = sorted(self._list_entries(copy, size), key=lambda entry: entry.header_offset)
        ends = [*(entry.header_offset for entry in entries[1:]), size]
        for entry, end in zip(entries, ends, strict=True):
            if not _VALUES.fullmatch(entry.filename):
                self.read_range(copy, entry.header_offset, min(end, size))
                continue
            # The header before the values repeats what the list of entries says, so it needs no
            # request. Its padding fills the room up to the next entry.
            name = entry.filename.encode()
            room = end - entry.header_offset - _LOCAL_HEADER.size - len(name) - entry.file_size
            header = _LOCAL_HEADER.pack(
                b"PK\3\4", entry.extract_version, entry.flag_bits, entry.compress_type, 0, 0,
                entry.CRC, min(entry.compress_size, 2**32 - 1), min(entry.file_size, 2**32 - 1),
                len(name), max(0, min(room, 2**16 - 1)),
            )  # fmt: skip
            with copy.open("r+b") as stream:
                stream.seek(entry.header_offset)
                stream.write(header + name)

    def _list_entries(self, copy: Path, size: int) -> list[zipfile.ZipInfo]:
        """Returns the entries that the end of an archive lists; empty if there is no such list."""
        length, done = FIRST_READ, 0
        while done < min(size, MAX_HEADER_BYTES):
            self.read_range(copy, max(0, size - length), size - done)
            done = min(length, size)
            with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(copy) as archive:
                if archive.start_dir >= size - done:
                    return archive.infolist()
            length *= 4
        return []  # the reader of the copy says that it is damaged

    def _request(self, url: str, start: int, stop: int) -> bytes:
        """Returns bytes [start, stop) of a URL. Raises: OSError."""
        from huggingface_hub.constants import HF_HUB_DOWNLOAD_TIMEOUT
        from huggingface_hub.utils import (
            build_hf_headers,
            hf_raise_for_status,
            http_stream_backoff,
        )

        headers = {"range": f"bytes={start}-{stop - 1}", "accept-encoding": "identity"}
        headers |= build_hf_headers()
        try:
            with http_stream_backoff(
                "GET", url, headers=headers, timeout=HF_HUB_DOWNLOAD_TIMEOUT
            ) as response:
                hf_raise_for_status(response)
                # Before the content is read: a server without ranges would send gigabytes.
                length = int(response.headers.get("content-length", -1))
                if length != stop - start:
                    raise OSError(f"{url}: asked for {stop - start} bytes, it sends {length}")
                content = response.read()
        except OSError:
            raise
        except Exception as error:  # the HTTP library differs between releases of the hub's client
            raise OSError(f"{type(error).__name__}: {error}") from error
        self.read_bytes += len(content)
        return content


_ACTIVE: contextvars.ContextVar[HubHeaders | None] = contextvars.ContextVar("headers", default=None)


@contextlib.contextmanager
def read_headers_only() -> Iterator[HubHeaders]:
    """Lets `fetch_snapshot` copy headers; removes the copies at the end of the block.

    Problems that the block raises name repositories in place of the copies.
    """
    with tempfile.TemporaryDirectory(prefix="corl_jax_headers_") as folder:
        headers = HubHeaders(Path(folder).resolve())
        token = _ACTIVE.set(headers)
        try:
            yield headers
        except InputError as error:
            raise InputError(map(headers.name_places, error.problems)) from error
        finally:
            _ACTIVE.reset(token)


def fetch_snapshot(repo: str, **options: Any) -> str:
    """Returns a folder with files of a repository: downloaded, or in a check their headers."""
    import huggingface_hub

    if headers := _ACTIVE.get():
        return headers.copy_snapshot(repo, **options)
    return huggingface_hub.snapshot_download(repo, **options)


def fetch_ranges(path: str, ranges: Sequence[tuple[int, int]]) -> None:
    """Makes [start, stop) ranges of a file readable, if the file is the sparse copy of a check."""
    if headers := _ACTIVE.get():
        headers.fill_ranges(path, ranges)


def is_partial(path: str) -> bool:
    """Returns whether a file is the sparse copy of a check."""
    headers = _ACTIVE.get()
    return headers is not None and headers.is_partial(path)


def has_partial_data() -> bool:
    """Returns whether rows of a data set cost a download each, because a check copies headers."""
    headers = _ACTIVE.get()
    return headers is not None and headers.has_partial_data


def _format_bytes(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.2f} MB"
