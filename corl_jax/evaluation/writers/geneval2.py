"""GenEval 2: one image for each prompt, and a JSON object from prompt to image.

Source: facebookresearch/GenEval2, evaluation.py.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from corl_jax.errors import Problems
from corl_jax.evaluation.writers.writer import (
    IMAGES,
    HarnessPrompt,
    ImageFile,
    Outcome,
    PromptList,
    Writer,
    check_single_path,
    find_source,
    note_count,
    read_prompt_lines,
)

EXPECTED = 'geneval2_data.jsonl of GenEval 2: lines {"prompt": TEXT, "vqa_list": [...], ...}'
NUM_PROMPTS = 800
PATHS_FILE = "image_filepath_data.json"


def read_data(paths: Sequence[Path], problems: Problems) -> PromptList:
    """Reads the lines of geneval2_data.jsonl; a prompt that occurs again is drawn once."""
    file = find_source(check_single_path(paths, EXPECTED), ("geneval2_data.jsonl",))
    prompts: dict[str, HarnessPrompt] = {}
    count = 0
    for number, line, row in read_prompt_lines(file, EXPECTED, problems):
        if not isinstance(row.get("vqa_list"), list):
            problems.add(f"{file}: line {number}: has no list vqa_list; expected {EXPECTED}")
            continue
        text, count = row.get("prompt"), count + 1
        if not isinstance(text, str) or not text.strip():
            problems.add(f"{file}: line {number}: prompt is {text!r}; expected a text")
        else:
            # The harness looks an image up by the text of its prompt, as it stands in the file.
            atoms = f"{row.get('atom_count', '')}"
            prompts.setdefault(text, HarnessPrompt(text, f"{len(prompts):05d}", atoms, line))
    notes = note_count(count, NUM_PROMPTS, "GenEval 2")
    if len(prompts) < count and not problems:
        notes += (f"{count - len(prompts)} prompts occur again; the harness has one image of each",)
    return PromptList(tuple(prompts.values()), (file,), notes)


def list_files(prompts: Sequence[HarnessPrompt], samples: int) -> list[ImageFile]:
    """Lists NNNNN.png."""
    assert samples == 1
    return [ImageFile(f"{IMAGES}/{p.name}.png", number, (0,)) for number, p in enumerate(prompts)]


def list_paths(outcome: Outcome) -> Mapping[str, str]:
    """Returns the object from each prompt to the absolute path of its image."""
    paths = {p.text: str(outcome.images / f"{p.name}.png") for p in outcome.prompts.prompts}
    return {PATHS_FILE: json.dumps(paths, indent=1, ensure_ascii=False) + "\n"}


def describe_next(outcome: Outcome) -> str:
    """Returns the commands of Soft-TIFA and of its analysis."""
    data = shlex.quote(str(outcome.prompts.files[0].absolute()))
    paths, scores = (
        shlex.quote(str(outcome.out / name)) for name in (PATHS_FILE, "score_lists.json")
    )
    return (
        "# in the clone of GenEval2\n"
        f"python evaluation.py --benchmark_data {data} --image_filepath_data {paths} "
        f"--method soft_tifa_gm --output_file {scores}\n"
        f"python soft_tifa_analysis.py --benchmark_data {data} --score_data {scores}\n"
    )


WRITER = Writer(
    title="GenEval 2", expected=EXPECTED, read=read_data, images_per_prompt=1, max_images=1,
    list_files=list_files, list_side_files=list_paths, describe_next=describe_next,
)  # fmt: skip
