"""Computes SPICE, the paper's text term of the cycle reward, with the Java program of its authors.

The package pycocoevalcap contains the program.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from corl_jax.errors import InputError

# The package's Python caller is not used: it has no time limit, writes into the package's folder
# and downloads half a gigabyte without a question.
JARS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
HEAP = "8G"
# SPICE writes its results with the JavaScript engine, which Java 15 removed.
JAVA = range(8, 15)


def score_spice(
    predictions: Sequence[str | None], targets: Sequence[str | None], *, timeout_s: float = 600.0
) -> np.ndarray:
    """Computes SPICE F1 of each pair, [N] float32 in [0, 1]: the agreement of scene graphs.

    All kinds of tuples count. NaN: the target is blank, so the reward does not apply to the row. 0:
    only the prediction is blank, or SPICE finds no object, attribute or relation. One Java process
    scores all distinct pairs, with up to 8 GB of memory.

    Raises:
        InputError: SPICE cannot run here, fails, or takes longer than `timeout_s` seconds.
    Source: Anderson et al. 2016 (arXiv 1607.08822).
    """
    if problem := find_spice_problem():
        raise InputError(problem)
    cleaned = ([(text or "").strip() for text in texts] for texts in (predictions, targets))
    pairs = list(zip(*cleaned, strict=True))
    different = list(dict.fromkeys(pair for pair in pairs if all(pair)))
    scores = dict(zip(different, _run_java(different, timeout_s), strict=True))
    # pairs ("a cat", "cat"), ("", "cat"), ("a cat", "") -> score, 0, NaN
    values = (scores.get(pair, 0.0) if pair[1] else float("nan") for pair in pairs)
    return np.fromiter(values, np.float32, len(pairs))


def find_spice_problem() -> str | None:
    """Returns why `score_spice` cannot run here, with the remedy; None if it can."""
    folder, java = _find_program(), _find_java()
    if folder is None:
        return "spice: found no package pycocoevalcap; run pip install 'corl-jax[spice]'"
    expected = f"Java {JAVA[0]} to {JAVA[-1]}"
    if java is None:
        return f"spice: found no java; install {expected} and put it on PATH or set JAVA_HOME"
    version = _read_java_version(java)
    if version not in JAVA:
        return (
            f"spice: {java} is Java {version or 'of an unknown version'}, expected {expected}, "
            "because SPICE writes with the JavaScript engine that Java 15 took out; install one "
            "and set JAVA_HOME to it"
        )
    missing = [name for name in JARS if not (folder / "lib" / name).is_file()]
    if missing:
        return (
            f"spice: {folder / 'lib'} lacks {', '.join(missing)}; with access to "
            "nlp.stanford.edu run python -m pycocoevalcap.spice.get_stanford_models"
        )
    return None


def _run_java(pairs: list[tuple[str, str]], timeout_s: float) -> list[float]:
    """Returns the scores of (prediction, target) pairs."""
    if not pairs:
        return []
    items = [
        {"image_id": i, "test": prediction, "refs": [target]}
        for i, (prediction, target) in enumerate(pairs)
    ]
    program = _find_program()
    assert program is not None  # `find_spice_problem` has looked
    jar = str(program / "spice-1.0.jar")
    with tempfile.TemporaryDirectory(prefix="spice-") as folder:
        source, out = Path(folder, "in.json"), Path(folder, "out.json")
        source.write_text(json.dumps(items))  # ASCII: Java reads it in the platform's encoding
        command = [
            _find_java(),
            f"-Xmx{HEAP}",
            "-jar",
            jar,
            str(source),
            "-out",
            str(out),
            "-silent",
        ]
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise InputError(
                f"spice: {len(pairs)} captions were not scored after {timeout_s:g} s; allow more "
                "time or score fewer at once"
            ) from error
        except OSError as error:
            raise InputError(f"spice: {command[0]} cannot be run ({error.strerror})") from error
        if done.returncode:
            raise InputError(
                f"spice: java ended with code {done.returncode}: {_read_last_lines(done.stderr)}"
            )
        return _read_scores(out, len(pairs))


def _read_scores(out: Path, count: int) -> list[float]:
    """Reads the scores by `image_id`, so that their order in the file does not matter."""
    try:
        items = json.loads(out.read_text())
        scores = {item["image_id"]: float(item["scores"]["All"]["f"]) for item in items}
        return [scores[i] for i in range(count)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"spice: its results cannot be read ({type(error).__name__}: {error}), expected a "
            f"score for each of {count} captions; install pycocoevalcap 1.2 again"
        ) from error


def _read_last_lines(stderr: str) -> str:
    """Returns the last lines of the output, without a stack trace."""
    lines = [line.strip() for line in stderr.splitlines() if line and not line.startswith("\t")]
    return " | ".join(lines[-3:]) or "it said nothing"


def _find_program() -> Path | None:
    """Returns the folder of the program in its package, None without the package."""
    try:
        spec = importlib.util.find_spec("pycocoevalcap.spice")
    except ModuleNotFoundError:
        return None
    places = spec and spec.submodule_search_locations
    return Path(next(iter(places))) if places else None


def _find_java() -> str | None:
    """Returns JAVA_HOME's java, or else the one on PATH."""
    home = os.environ.get("JAVA_HOME")
    return (home and shutil.which("java", path=str(Path(home, "bin")))) or shutil.which("java")


def _read_java_version(java: str) -> int | None:
    """Returns 8 for the old form `1.8.0_312`, 17 for `17.0.15`; None if unknown."""
    try:
        done = subprocess.run(
            [java, "-version"],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=60,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    # `java -version` writes to standard error.
    match = re.search(r'version "(?:1\.)?(\d+)', done.stderr)
    return int(match[1]) if match else None
