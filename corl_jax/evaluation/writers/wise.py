"""WISE: an image ID.png for each prompt, in the verified and in the legacy edition.

Source: PKU-YuanGroup/WISE, eval_qwen.sh and WISE_legacy/README.md.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from corl_jax.errors import InputError, Problems
from corl_jax.evaluation.writers.writer import (
    IMAGES,
    HarnessPrompt,
    ImageFile,
    Outcome,
    PromptList,
    Writer,
    check_text,
    find_doubles,
    find_source,
    note_count,
)
from corl_jax.input_files import read_text

STEMS = ("cultural_common_sense", "spatio-temporal_reasoning", "natural_science")
VERIFIED, REWRITE = "_verified", "_rewrite"
EXPECTED = (
    f"data_verified of WISE, or WISE_legacy/data: a folder with {', '.join(STEMS)} as JSON lists "
    'of {"Prompt": TEXT, "prompt_id": NUMBER, ...}, or such files'
)
NUM_PROMPTS = 1000
PLACES = ("data_verified", "WISE_legacy/data", "data")


def read_editions(paths: Sequence[Path], problems: Problems) -> PromptList:
    """Reads the files of one edition, and orders the prompts by their ids."""
    files, notes = [], []
    for path in paths:
        if path.is_dir():
            chosen, more = _choose_files(find_source(path, PLACES))
            files += chosen
            notes += more
        else:
            files.append(path)
    rows = []
    for file in files:
        with problems.collect():
            rows += _read_file(file, problems)
    for name in find_doubles([prompt.name for prompt in rows]):
        problems.add(
            f"{', '.join(map(str, files))}: prompt_id {name} occurs more than once; expected the "
            "files of one edition, each once"
        )
    prompts = tuple(sorted(rows, key=lambda prompt: int(prompt.name)))
    return PromptList(
        prompts, tuple(files), (*notes, *note_count(len(prompts), NUM_PROMPTS, "WISE"))
    )


def _choose_files(folder: Path) -> tuple[list[Path], list[str]]:
    """Returns the files of one edition in a folder, and notes on the others."""
    editions = {end: [folder / f"{stem}{end}.json" for stem in STEMS] for end in (VERIFIED, "")}
    editions[REWRITE] = [folder / f"{stem}{REWRITE}.json" for stem in STEMS]
    present = {end: [f for f in files if f.is_file()] for end, files in editions.items()}
    # The first edition that is there. Ids are the same in all, so a run draws only one of them.
    end = next((end for end, files in present.items() if files), None)
    if end is None:
        raise InputError(f"{folder}: holds no file of WISE; expected {EXPECTED}")
    notes = []
    if others := [f for other, files in present.items() if other != end for f in files]:
        names = " ".join(file.name for file in others)
        notes.append(f"{folder}: not read: {names}; to draw them, name these files in --prompts")
    if missing := [f.name for f in editions[end] if not f.is_file()]:
        notes.append(f"{folder}: has no {', '.join(missing)}")
    return present[end], notes


def _read_file(file: Path, problems: Problems) -> list[HarnessPrompt]:
    try:
        rows = json.loads(read_text(file, EXPECTED))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file}: is not JSON ({error}); expected {EXPECTED}") from None
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{file}: found {type(rows).__name__}; expected {EXPECTED}")
    prompts = []
    for number, row in enumerate(rows, 1):
        where = f"{file}: entry {number}"
        if not isinstance(row, dict) or "Prompt" not in row:
            problems.add(f"{where}: has no Prompt; expected {EXPECTED}")
            continue
        name = _read_id(row.get("prompt_id"), where, problems)
        text = check_text(row["Prompt"], f"{where}: Prompt", problems)
        if name is not None:
            prompts.append(HarnessPrompt(text, name, f"{row.get('Subcategory', '')}", file.name))
    return prompts


def _read_id(value: Any, where: str, problems: Problems) -> str | None:
    """Returns the name of the image of a prompt_id, a whole number or its digits."""
    is_whole = type(value) is int or (isinstance(value, str) and value.isascii())
    if is_whole and str(value).isdigit():
        return str(int(value))
    problems.add(f"{where}: prompt_id is {value!r}; expected a whole number")
    return None


def list_files(prompts: Sequence[HarnessPrompt], samples: int) -> list[ImageFile]:
    """Lists ID.png."""
    assert samples == 1
    return [ImageFile(f"{IMAGES}/{p.name}.png", number, (0,)) for number, p in enumerate(prompts)]


def describe_next(outcome: Outcome) -> str:
    """Returns the command of the judge of the edition; IMAGE_DIR is absolute, as it must be."""
    names = [file.stem for file in outcome.prompts.files]
    if all(name.endswith(VERIFIED) for name in names):
        return (
            "# in the clone of WISE, with the judge Qwen3.5-35B-A3B served by vLLM; IMAGE_DIR\n"
            "# must be absolute\n"
            f"IMAGE_DIR={shlex.quote(str(outcome.images))} "
            "VLLM_API_BASE=http://127.0.0.1:8000/v1 bash eval_qwen.sh\n"
        )
    # Beside the images: only the harness's own script insists on their folder.
    results = outcome.out / "Results"
    lines = [
        "# in WISE_legacy of the clone of WISE; KEY is a key of the judge's API. The numbers are",
        "# of the legacy edition, and are not comparable with the verified one.",
    ]
    scores = []
    for file in outcome.prompts.files:
        name = file.stem
        scores.append(str(results / f"{name}_scores_results.jsonl"))
        words = {
            "json_path": str(file.absolute()), "output_dir": str(results / name),
            "image_dir": str(outcome.images), "api_key": "KEY", "model": "gpt-4o-2024-05-13",
            "result_full": str(results / f"{name}_full_results.json"),
            "result_scores": scores[-1], "max_workers": "96",
        }  # fmt: skip
        options = " ".join(f"--{key} {shlex.quote(value)}" for key, value in words.items())
        lines.append(f"python gpt_eval.py {options}")
    lines.append(f"python Calculate.py {shlex.join(scores)} --category all")
    return "\n".join(lines) + "\n"


WRITER = Writer(
    title="WISE", expected=EXPECTED, read=read_editions, images_per_prompt=1, max_images=1,
    list_files=list_files, describe_next=describe_next,
)  # fmt: skip
