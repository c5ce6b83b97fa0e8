"""GenEval's folders of images that their own model is asked about."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from corl_jax.data.self_questions.reader import parse_asked_record
from corl_jax.errors import Problems
from corl_jax.evaluation.writers import geneval
from corl_jax.evaluation.writers.writer import (
    HarnessPrompt,
    Outcome,
    PromptList,
    Writer,
    check_single_path,
    find_source,
    read_prompt_lines,
)

EXPECTED = (
    "GenEval's evaluation_metadata.jsonl, or records: lines "
    '{"tag": TEXT, "include": [...], "prompt": TEXT, "question": TEXT, "answer": TEXT}'
)


def read_records(paths: Sequence[Path], problems: Problems) -> PromptList:
    """Reads the lines of a file of records or of GenEval's metadata."""
    path = check_single_path(paths, EXPECTED)
    file = find_source(path, ("prompts/evaluation_metadata.jsonl", "evaluation_metadata.jsonl"))
    prompts = []
    for number, line, _ in read_prompt_lines(file, EXPECTED, problems):
        with problems.collect(f"{file}: line {number}: "):
            record = parse_asked_record(line)
            prompts.append(HarnessPrompt(record.prompt, f"{len(prompts):05d}", record.tag, line))
    return PromptList(tuple(prompts), (file,))


def describe_next(outcome: Outcome) -> str:
    """Returns the command that judges the images, and the option that reads its verdicts."""
    out, scores = (shlex.quote(str(path)) for path in (outcome.out, f"{outcome.out}_scores"))
    return (
        "# GenEval's verdicts on the images; DETECTOR and CLIP: corl-jax evaluate --suite "
        "geneval-detect --help\n"
        f"corl-jax evaluate --suite geneval-detect --images {out} --detector DETECTOR --clip CLIP "
        f"--out {scores}\n"
        "# then the command of this folder again, for the imbalance table, with\n"
        f"# --verdicts {scores}\n"
    )


WRITER = Writer(
    title="own answers", expected=EXPECTED, read=read_records, images_per_prompt=4,
    list_files=geneval.list_files, list_side_files=geneval.list_metadata,
    describe_next=describe_next, is_specific=False,
)  # fmt: skip
