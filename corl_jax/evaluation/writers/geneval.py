"""GenEval: a folder for each prompt, with its metadata and its samples.

Source: djghosh13/geneval, evaluation/evaluate_images.py.
"""

from __future__ import annotations

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
    check_text,
    find_source,
    note_count,
    read_prompt_lines,
)

EXPECTED = (
    'evaluation_metadata.jsonl of GenEval: lines {"tag": TEXT, "include": [...], "prompt": TEXT}'
)
NUM_PROMPTS = 553


def read_metadata(paths: Sequence[Path], problems: Problems) -> PromptList:
    """Reads the lines of evaluation_metadata.jsonl."""
    path = check_single_path(paths, EXPECTED)
    file = find_source(path, ("prompts/evaluation_metadata.jsonl", "evaluation_metadata.jsonl"))
    prompts = []
    for number, line, row in read_prompt_lines(file, EXPECTED, problems):
        where = f"{file}: line {number}"
        tag, include = row.get("tag"), row.get("include")
        if not isinstance(tag, str) or not isinstance(include, list) or not include:
            problems.add(f"{where}: has no tag and no list include; expected {EXPECTED}")
            continue
        text = check_text(row.get("prompt"), f"{where}: prompt", problems)
        prompts.append(HarnessPrompt(text, f"{len(prompts):05d}", tag, line))
    return PromptList(tuple(prompts), (file,), note_count(len(prompts), NUM_PROMPTS, "GenEval"))


def list_files(prompts: Sequence[HarnessPrompt], samples: int) -> list[ImageFile]:
    """Lists NNNNN/samples/NNNN.png: the harness reads each file of digits there."""
    return [
        ImageFile(f"{IMAGES}/{prompt.name}/samples/{sample:04d}.png", number, (sample,))
        for number, prompt in enumerate(prompts)
        for sample in range(samples)
    ]


def list_metadata(outcome: Outcome) -> Mapping[str, str]:
    """Returns each prompt's own line, which the harness reads as a whole file of JSON."""
    return {
        f"{IMAGES}/{prompt.name}/metadata.jsonl": f"{prompt.source}\n"
        for prompt in outcome.prompts.prompts
    }


def describe_next(outcome: Outcome) -> str:
    """Returns the commands that detect objects and sum up."""
    images, results = shlex.quote(str(outcome.images)), outcome.out / "results.jsonl"
    results_text = shlex.quote(str(results))
    return (
        "# in the clone of geneval; DETECTOR is the folder of evaluation/download_models.sh\n"
        f"python evaluation/evaluate_images.py {images} --outfile {results_text} "
        "--model-path DETECTOR\n"
        # It reads object_names.txt of the folder in which it runs.
        f"(cd evaluation && python summary_scores.py {results_text})\n"
    )


WRITER = Writer(
    title="GenEval", expected=EXPECTED, read=read_metadata, images_per_prompt=4,
    list_files=list_files, list_side_files=list_metadata, describe_next=describe_next,
)  # fmt: skip
