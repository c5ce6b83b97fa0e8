"""Reads records from JSON lines: the published form, and GenEval's metadata to leave out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from corl_jax.data.questions import find_text_problems, holds_surrogate, read_lines
from corl_jax.data.self_questions.objects import COUNTS
from corl_jax.data.self_questions.records import (
    PROMPT_START,
    QUESTIONS,
    Record,
    find_include_problem,
    make_record,
)
from corl_jax.errors import InputError, Problems
from corl_jax.input_files import LONE_SURROGATE

TEXTS = ("prompt", "question", "answer")
DEMAND = ("tag", "include", "prompt")
REQUIRED = ("tag", "include", *TEXTS)
KEYS = (*REQUIRED, "exclude")
EXPECTED = f"expected a JSON object with {', '.join(REQUIRED)}"


@dataclasses.dataclass(frozen=True)
class Excluded:
    """Records that no generated record may equal, by their prompts and by what they demand."""

    prompts: frozenset[str]
    demands: frozenset[str]

    def __contains__(self, record: Record) -> bool:
        # By the demand too, because GenEval writes some plurals in another way: "three persons".
        return record.prompt in self.prompts or describe_demand(record) in self.demands

    def __len__(self) -> int:
        return len(self.prompts)


def describe_demand(record: Record) -> str:
    """Returns a text that is equal for records that ask for the same image in the same order."""
    entries = [
        [entry["class"], entry["count"], entry.get("color"), entry.get("position")]
        for entry in record.include
    ]
    return json.dumps([record.tag, entries])


def read_records(path: Path) -> list[Record]:
    """Reads the records of a JSON lines file in the published form.

    Raises:
        InputError: naming file and line of each record that is no record, lacks its answer, or
            has an object that is neither known nor has a plural.
    """
    return _read_lines(path, "--records", REQUIRED)


def read_excluded(path: Path) -> Excluded:
    """Reads the prompts to leave out: GenEval's `evaluation_metadata.jsonl`, or whole records.

    Raises:
        InputError: naming file and line of what is neither.
    """
    records = _read_lines(path, "--exclude", DEMAND)
    return Excluded(
        frozenset(record.prompt for record in records), frozenset(map(describe_demand, records))
    )


def parse_asked_record(line: str) -> Record:
    """Returns the record of a line of GenEval's metadata, or of a file of records.

    A line with neither question nor answer gets those of its tag's templates.

    Raises: InputError for what is no record, and for a question without an answer.
    """
    record = _parse_record(line, DEMAND)
    if record.question and record.answer:
        return record
    if record.question or record.answer:
        missing, present = ("answer", "question") if record.question else ("question", "answer")
        raise InputError(
            f"{missing} is missing; write it, or leave out {present}, too: both are then those of "
            f"the tag {record.tag}"
        )
    (first, *_), is_counting = record.include, record.tag == "counting"
    if is_counting and record.prompt.startswith(PROMPT_START):
        # With the plural of the prompt, as published: "two benchs".
        answer = record.prompt.removeprefix(PROMPT_START)
        return dataclasses.replace(record, question=QUESTIONS[record.tag], answer=answer)
    if is_counting and first["count"] not in COUNTS:
        raise InputError(
            f"question and answer are missing, and the templates count to {max(COUNTS)} only; "
            f"found {first['count']}; write both"
        )
    return dataclasses.replace(make_record(record.tag, record.include), prompt=record.prompt)


def _read_lines(path: Path, option: str, required: tuple[str, ...]) -> list[Record]:
    problems, records = Problems(), []
    for number, line in read_lines(path, option, problems):
        with problems.collect(f"{path}:{number}: "):
            records.append(_parse_record(line, required))
    problems.raise_any()
    return records


def _parse_record(line: str, required: tuple[str, ...]) -> Record:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not valid JSON ({error}); {EXPECTED}") from None
    if not isinstance(row, dict):
        raise InputError(f"found a {type(row).__name__}; {EXPECTED}")
    problems = Problems()
    if holds_surrogate(row):
        problems.add(LONE_SURROGATE)
    for key in required:
        if key not in row:
            problems.add(f"{key} is missing; {_describe_remedy(key)}")
    for key in row.keys() - set(KEYS):
        problems.add(f"{key[:60]!r} is an unknown key; expected {', '.join(KEYS)}")
    for key in TEXTS:
        if key in row:
            remedy = f"; {_describe_remedy(key)}"
            problems.add(problem + remedy for problem in find_text_problems(key, row[key]))
    if "tag" in row and "include" in row:
        problem = find_include_problem(row["include"], str(row["tag"]))
        problems.add([problem] if problem else [])
        if problem is None and "exclude" in row:
            problems.add(_find_exclude_problems(row))
    problems.raise_any()
    question, answer = row.get("question", ""), row.get("answer", "")
    return Record(row["tag"], row["include"], row["prompt"], question, answer)


def _find_exclude_problems(row: Mapping[str, Any]) -> list[str]:
    (expected,) = [Record(row["tag"], row["include"], "", "", "").exclude]
    if row["exclude"] == expected:
        return []
    return [f"exclude: found {str(row['exclude'])[:80]}; expected {json.dumps(expected)} or no key"]


def _describe_remedy(key: str) -> str:
    if key == "answer":
        return (
            "write the true answer to its question; without one no image can be rewarded. "
            "`corl-jax data --kind self_questions` makes records with answers"
        )
    return EXPECTED
