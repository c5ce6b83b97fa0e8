"""Hostile bytes by the thousand, read in a process of their own whose memory is measured.

    python -m tests.faults.hostile headers|pickles|images|parquet COUNT SEED FOLDER
    python -m tests.faults.hostile each 0 0 FOLDER    (every file of the folder, as what it is)

prints {"tries", "accepted", "refused", "escaped": [types of other exceptions], "mib": growth}.
"""

from __future__ import annotations

import collections
import functools
import json
import os
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from corl_jax.errors import InputError

PIECES = (
    *(b'"', b"{", b"}", b"[", b"]", b",", b":", b"0", b"-1", b"1e9", b"null", b"NaN", b"\\u0000"),
    *(b"../", b"9" * 20, b"4611686018427387904", b"18446744073709551616", b'"shape"', b"\xff"),
    *(b'"data_offsets"', b'"F64"', b'"a":', b"[[[[", b"\x00", b"/etc/x", b"true", b'"dtype"'),
)
"""What a mutation puts in: parts of headers, and numbers at the edges."""


def mutated(rng: np.random.Generator, data: bytes, pieces: tuple[bytes, ...] = PIECES) -> bytes:
    """One to four flips, insertions, deletions, repetitions and truncations."""
    out = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        if not out:
            break
        at, length = int(rng.integers(len(out))), int(rng.integers(1, 12))
        kind = rng.integers(7)
        if kind == 0:
            out[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            out[at] = int(rng.integers(256))
        elif kind == 2:
            out[at:at] = pieces[int(rng.integers(len(pieces)))]
        elif kind == 3:
            out[at : at + length] = pieces[int(rng.integers(len(pieces)))]
        elif kind == 4:
            del out[at : at + length]
        elif kind == 5:
            out[at:at] = out[at : at + length]
        elif rng.integers(4) == 0:
            del out[at:]
    return bytes(out)


def header(entries: Any, data: bytes = b"") -> bytes:
    """A safetensors file."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape: Any = (2,), offsets: Any = (0, 8), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


SOUND = header(
    {"a": entry(), "b/kernel": entry((2, 3), (8, 20), "BF16"), "__metadata__": {"format": "pt"}},
    b"\1" * 20,
)


def read_header_file(folder: Path, rng: np.random.Generator) -> None:
    """A mutated header; what is accepted is also read."""
    from corl_jax.weights.storage import open_safetensors

    file = folder / "model.safetensors"
    length = len(SOUND) - 20
    text = mutated(rng, SOUND[8:length])
    # Half keep a true length, so that the JSON is reached; half may lie about it too.
    data = header(text, SOUND[length:]) if rng.integers(2) else mutated(rng, SOUND)
    file.write_bytes(data)
    store = open_safetensors([file])
    try:
        for key, info in store.infos.items():
            assert store.read(key).nbytes == info.nbytes <= len(data)
    finally:
        store.close()


def read_pickle_file(folder: Path, rng: np.random.Generator) -> None:
    """A mutated .bin file in either of PyTorch's formats; what is accepted is also read."""
    from corl_jax.weights.torch_bin import BinStore

    file = folder / "pytorch_model.bin"
    data = _pickles()[int(rng.integers(2))]
    codes = tuple(bytes([code]) for code in b"cRb.(}]tioNh\x80\x94\x8c\x93\x81qQ")
    file.write_bytes(mutated(rng, data, codes))
    store = BinStore([file])
    for key, info in store.infos.items():
        assert store.read(key).nbytes == info.nbytes <= len(data) * 4
    store.close()


_made: list[bytes] = []


def _pickles() -> list[bytes]:
    import io

    import torch

    if not _made:
        for new in (True, False):
            stream = io.BytesIO()
            state = {"a": torch.ones(7), "b.weight": torch.zeros(2, 3).bfloat16()}
            torch.save(state, stream, _use_new_zipfile_serialization=new)
            _made.append(stream.getvalue())
    return _made


def read_image(folder: Path, rng: np.random.Generator) -> None:
    """A mutated picture of any of the formats."""
    from corl_jax.data.images import FORMATS, MAX_PIXELS, decode_image
    from tests.support.tiny_models import encode, tiny_image

    if not _made:
        _made.extend(encode(tiny_image(0, (40, 30)), kind) for kind in FORMATS)
        _made.append(encode(tiny_image(1, (40, 30)), "TIFF", compression="tiff_lzw"))
    sound = _made[int(rng.integers(len(_made)))]
    numbers = (b"\xff\xff\xff\xff", b"\x00\x00\x00\x00", b"\x7f\xff\xff\xff", b"\x80", b"\xff")
    image = decode_image(mutated(rng, sound, numbers))
    assert image.mode == "RGB" and image.width * image.height <= MAX_PIXELS


def read_parquet(folder: Path, rng: np.random.Generator) -> None:
    """A mutated data file of two row groups; what opens is read to its last row."""
    from corl_jax.data.dataset import BadRow, LoaderOptions, UsableRows
    from corl_jax.data.parquet import ParquetSource
    from tests.support.tiny_models import tiny_parquet

    if not _made:
        _made.append(tiny_parquet(folder / "rows.parquet", 4, row_group_size=2).read_bytes())
    file = folder / "rows.parquet"
    file.write_bytes(mutated(rng, _made[0], (b"\xff\xff\xff\x7f", b"\x00\x00", b"\x15", b"\x80")))
    source = ParquetSource(file, required=("prompt", "real_image"))
    if len(source) > 1000:
        raise InputError("more rows than were written; each would be counted as bad")
    options = LoaderOptions(
        tasks=(), batch_size=1, seed=0, required=("prompt",), max_bad_fraction=1,
        max_long_fraction=1, max_pixels=2**20,
    )  # fmt: skip
    rows = UsableRows(source, None, options)
    for row in range(len(source)):
        try:
            rows.read_example(row)
        except (BadRow, InputError):
            continue


def read_one(file: Path) -> None:
    """A file as what its name says that it is."""
    from corl_jax.data.images import decode_image
    from corl_jax.weights.storage import open_any_store

    if file.suffix not in (".bin", ".pt", ".pth", ".pkl", ".safetensors"):
        decode_image(file)
        return
    store = open_any_store(file)
    for key in store.infos:
        store.read(key)
    store.close()


TARGETS: dict[str, Callable[[Path, np.random.Generator], None]] = {
    "headers": read_header_file,
    "pickles": read_pickle_file,
    "images": read_image,
    "parquet": read_parquet,
}


def peak_mib() -> float:
    """The most that this process held at once; getrusage's counts what its parent held too."""
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def _attempts(
    what: str, count: int, seed: int, folder: Path
) -> Iterator[tuple[str, Callable[[], None]]]:
    if what == "each":
        for file in sorted(folder.iterdir()):
            yield file.name, functools.partial(read_one, file)
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        yield str(number), functools.partial(TARGETS[what], folder, rng)


def main(what: str, count: str, seed: str, folder: str) -> None:
    import logging
    import warnings

    logging.disable()
    warnings.simplefilter("ignore")
    results: collections.Counter[str] = collections.Counter()
    escaped: collections.Counter[str] = collections.Counter()
    accepted, before = [], 0.0
    for name, attempt in _attempts(what, int(count), int(seed), Path(folder)):
        try:
            attempt()
            accepted.append(name)
        except InputError:
            results["refused"] += 1
        except Exception as error:
            escaped[f"{type(error).__name__} ({name}): {str(error)[:80]}"] += 1
        results["tries"] += 1
        before = before or peak_mib()  # with what the first one imported
    report = {**results, "accepted": len(accepted), "escaped": dict(escaped)}
    report |= {"names": accepted} if what == "each" else {}
    print(json.dumps(report | {"mib": round(peak_mib() - before, 1)}))


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    main(*sys.argv[1:])
