"""Hashes the weights of a model, to tell two models of the same sizes from each other."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from corl_jax.weights.checkpoint import open_checkpoint
from corl_jax.weights.kinds import NetworkKind
from corl_jax.weights.storage import open_any_store

THREADS = 8


def hash_file(path: Path) -> str:
    """Returns the SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hash_weights(folder: Path, kind: NetworkKind | None = None) -> str:
    """Returns one SHA-256 of all bytes of the files that hold a model's weights.

    Of a kind with files in several folders these are the files of all of its parts.

    Headers and sizes alone would be the same before and after a training. All bytes are read once,
    about 1 GB/s for each thread and file; loading the model then finds them in the page cache.
    The same weights in another layout, or in other shards, have another hash.

    Raises: InputError for a folder without weights, or with damaged ones.
    """
    store = open_checkpoint(folder, kind).store if kind and kind.parts else open_any_store(folder)
    files = sorted({info.file for info in store.infos.values()})
    store.close()
    with ThreadPoolExecutor(THREADS) as pool:
        sums = list(pool.map(hash_file, files))
    # As the lines of `sha256sum`: names and hashes, so that shards cannot change places.
    lines = (f"{value}  {file.name}\n" for value, file in zip(sums, files, strict=True))
    return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()
