"""The images of an evaluation on disk: written whole, recorded, and kept by a later run.

    OUT/images/      what the harness reads
    OUT/.drawing/    files that are not finished, and records/PROCESS.jsonl
    OUT/manifest.json

A record of a file is its prompt, its samples and its SHA-256. A file without a matching record, as
one that was copied or damaged, is drawn again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from corl_jax.errors import InputError
from corl_jax.evaluation.drawing import DrawnImage
from corl_jax.evaluation.writers.writer import ImageFile, Writer
from corl_jax.weights.hashing import hash_file

DRAWING = ".drawing"
RECORDS = "records"
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
THREADS = min(16, os.cpu_count() or 1)
MAX_WAITING = 512  # images that wait for their file; more would fill the memory
Record = dict[str, Any]
"""prompt, samples, sha256."""


@dataclasses.dataclass(frozen=True)
class ImageStore:
    """Writes the image files of one process."""

    out: Path
    process: int = 0

    def open_records(self) -> Any:
        """Opens the file to which this process adds its records."""
        folder = self.out / DRAWING / RECORDS
        folder.mkdir(parents=True, exist_ok=True)
        return (folder / f"{self.process:05d}.jsonl").open("a", encoding="utf-8")

    def write_image(self, file: ImageFile, pixels: np.ndarray) -> Record:
        """Writes a PNG whole, and returns its record."""
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        content = buffer.getvalue()
        write_whole(self.out, file.path, content, str(self.process))
        digest = hashlib.sha256(content).hexdigest()
        return {"prompt": file.prompt, "samples": list(file.samples), "sha256": digest}


def write_whole(out: Path, path: str, content: bytes, process: str = "0") -> None:
    """Writes OUT/path, so that its folder never holds a part of the file."""
    # Another folder, because harnesses read each file whose name begins like an image's. Without
    # fsync: after a power cut the record shows a damaged file, which is drawn again.
    temporary = out / DRAWING / f"{process}-{hashlib.sha256(path.encode()).hexdigest()[:32]}"
    place = out / path
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        temporary.replace(place)
    except OSError as error:
        raise InputError(
            f"{place}: cannot be written ({error.strerror or error}); make room, and give the same "
            "command again: finished images are kept"
        ) from error


def save_drawings(
    store: ImageStore,
    writer: Writer,
    files: Sequence[ImageFile],
    images: Iterable[DrawnImage],
    advance: Callable[[], bool],
) -> None:
    """Writes each file as soon as its samples are drawn.

    `advance` is called after each image. If it returns False, drawing ends; the files that have all
    their samples are written.
    """
    owners = {(f.prompt, sample): f for f in files for sample in f.samples}
    parts: dict[str, dict[int, np.ndarray]] = {}
    waiting: list[tuple[ImageFile, Future[Record]]] = []
    # Compressing a PNG takes about as long as drawing one, so threads do it beside the device.
    with store.open_records() as records, ThreadPoolExecutor(THREADS) as pool:

        def add_records(most: int) -> None:
            # In order, and each with its own line: a line that a kill cut off is not read.
            while waiting and (len(waiting) > most or waiting[0][1].done()):
                file, future = waiting.pop(0)
                records.write(json.dumps({"file": file.path, **future.result()}) + "\n")
            records.flush()

        for image in images:
            file = owners[image.prompt, image.sample]
            samples = parts.setdefault(file.path, {})
            samples[image.sample] = image.pixels
            goes_on = advance()
            if len(samples) == len(file.samples):
                del parts[file.path]
                pixels = writer.compose([samples[sample] for sample in file.samples])
                waiting.append((file, pool.submit(store.write_image, file, pixels)))
                add_records(MAX_WAITING)
            if not goes_on:
                break
        add_records(0)


def read_records(out: Path, manifest: Mapping[str, Any]) -> dict[str, Record]:
    """Returns the records of the manifest and of processes that did not come to their end."""
    records = dict(manifest.get("images", {}))
    for file in sorted((out / DRAWING / RECORDS).glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
            # A kill may have cut the last line off.
            with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
                record = json.loads(line)
                records[record.pop("file")] = record
    return records


def find_finished(
    out: Path, files: Sequence[ImageFile], records: Mapping[str, Record]
) -> dict[str, Record]:
    """Returns the records of the files that are on disk as they were written."""

    def match(file: ImageFile) -> bool:
        record = records.get(file.path)
        if not isinstance(record, dict):
            return False
        if (record.get("prompt"), record.get("samples")) != (file.prompt, list(file.samples)):
            return False
        path = out / file.path
        return path.is_file() and hash_file(path) == record.get("sha256")

    with ThreadPoolExecutor(THREADS) as pool:
        matches = list(pool.map(match, files))
    return {
        file.path: records[file.path]
        for file, is_match in zip(files, matches, strict=True)
        if is_match
    }


def find_foreign_images(out: Path, files: Sequence[ImageFile]) -> list[str]:
    """Lists pictures beside `files` that are none of them: a harness would read them too."""
    known = {file.path for file in files}
    # A harness may write results with pictures into other folders.
    folders = sorted({(out / path).parent for path in known})
    pictures = (
        path.relative_to(out).as_posix()
        for folder in folders
        if folder.is_dir()
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in PICTURES
    )
    return [path for path in pictures if path not in known]


def remove_temporary(out: Path) -> None:
    """Removes the folder of unfinished files."""
    shutil.rmtree(out / DRAWING, ignore_errors=True)
