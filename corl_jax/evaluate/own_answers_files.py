"""The files of the suite `own_answers`: images with their records, verdicts, and the answers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from corl_jax.atomic_files import replace_file
from corl_jax.data.questions import to_json_line
from corl_jax.data.self_questions.reader import parse_asked_record
from corl_jax.data.self_questions.records import Record
from corl_jax.errors import InputError, Problems
from corl_jax.evaluate.draw_options import DrawPlan
from corl_jax.evaluation.geneval.detections import read_rows
from corl_jax.evaluation.geneval.folders import list_images
from corl_jax.evaluation.geneval.summary import parse_results
from corl_jax.evaluation.units import REPORT_FILE
from corl_jax.input_files import read_text

ANSWERS = "answers.jsonl"
RESULTS = "results.jsonl"


@dataclasses.dataclass(frozen=True)
class AskedImage:
    """An image with the record of its prompt."""

    path: Path
    prompt: int  # number of its folder
    record: Record
    where: str  # the record, for messages
    is_right: bool | None = None  # it shows what the prompt demands; None if nobody judged it

    @property
    def name(self) -> str:
        """The end of its path, as 00012/samples/0000.png."""
        return "/".join(self.path.parts[-3:])

    @property
    def place(self) -> tuple[int, int]:
        """The number of its prompt, and its own number in it."""
        return self.prompt, int(self.path.stem)


def list_planned(drawing: DrawPlan) -> list[AskedImage]:
    """Returns the images that a plan draws."""
    prompts = drawing.prompts.prompts
    records = [parse_asked_record(prompt.source) for prompt in prompts]
    return [
        AskedImage(
            drawing.args.out / file.path, file.prompt, records[file.prompt],
            f"--prompts: prompt {prompts[file.prompt].name}",
        )
        for file in drawing.files
    ]  # fmt: skip


def list_asked(option: str, folder: Path) -> list[AskedImage]:
    """Returns the images of GenEval's folders. Raises: InputError listing all problems."""
    return [
        AskedImage(path, int(path.parts[-3]), record, str(path.parents[1] / "metadata.jsonl"))
        for path, record in list_images(folder, _read_record, option)
    ]


def _read_record(path: Path) -> Record:
    text = read_text(path, "one JSON object")
    try:
        return parse_asked_record(text)
    except InputError as error:
        raise InputError(f"{path}: {problem}" for problem in error.problems) from error


def pair_images(
    own_images: Sequence[AskedImage], images: Sequence[AskedImage], where: str
) -> list[AskedImage]:
    """Returns the images that have an own image of the same prompt and number.

    Raises: InputError for folders of other prompts, and if there is no pair.
    """
    problems = Problems()
    texts = {image.prompt: image.record.prompt for image in own_images}
    problems.add(
        f"{where}: {image.where}: prompt is {image.record.prompt!r}; the own images of number "
        f"{image.prompt} show {texts[image.prompt]!r}; take folders of the same prompts in the "
        "same order"
        for image in images
        if texts.get(image.prompt, image.record.prompt) != image.record.prompt
    )
    places = {image.place for image in own_images}
    pairs = [image for image in images if image.place in places]
    if not pairs:
        problems.add(f"{where}: no image has the prompt and number of an own image; expected some")
    problems.raise_any()
    return pairs


# ---- verdicts


def find_results(path: Path) -> Path:
    """Returns the file of verdicts of a file or of the folder that has it."""
    return path / RESULTS if path.is_dir() else path


def read_verdicts(option: str, path: Path, images: Sequence[AskedImage]) -> list[AskedImage]:
    """Returns the images with the verdicts of a file in GenEval's official form.

    Raises: InputError if an image has none or two, a verdict no image, or a prompt another text.
    """
    path = find_results(path)
    try:
        results = parse_results(read_rows(path), path)
    except InputError as error:
        raise InputError(f"{option}: {problem}" for problem in error.problems) from error
    problems, where = Problems(), f"{option}: {path}"
    by_place = {image.place: image for image in images}
    verdicts: dict[tuple[int, int], bool] = {}
    strangers = []
    for result in results:
        place = _read_place(PurePath(result.filename))
        image = by_place.get(place) if place else None
        if place is None or image is None:
            strangers.append(result.filename)
            continue
        if place in verdicts:
            problems.add(f"{where}: {image.name} has two verdicts; expected one")
        record = image.record
        if (result.tag, result.prompt) != (record.tag, record.prompt):
            problems.add(
                f"{where}: {image.name}: found the prompt {result.prompt!r} of tag {result.tag}; "
                f"the image has {record.prompt!r} of tag {record.tag}"
            )
        verdicts[place] = result.correct
    missing = [image.name for image in images if image.place not in verdicts]
    for names, what in ((missing, "images have no verdict"), (strangers, "verdicts no image")):
        if names:
            problems.add(
                f"{where}: {len(names)} {what}, such as {names[0]}; take the {RESULTS} of these "
                "images"
            )
    problems.raise_any()
    return [dataclasses.replace(image, is_right=verdicts[image.place]) for image in images]


def _read_place(path: PurePath) -> tuple[int, int] | None:
    """Returns (12, 3) of FOLDER/00012/samples/0003.png; None for a path of another form."""
    parts = path.parts[-3:]
    if len(parts) < 3 or parts[1] != "samples" or not (parts[0].isdigit() and path.stem.isdigit()):
        return None
    return int(parts[0]), int(path.stem)


def read_source(path: Path) -> Mapping[str, Any]:
    """Returns the settings in the report beside a file of verdicts; none without a report."""
    report = find_results(path).parent / REPORT_FILE
    try:
        settings = json.loads(report.read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # the official script writes none
    return settings if isinstance(settings, dict) else {}


# ---- answers


@dataclasses.dataclass(frozen=True)
class Query:
    """A question about an image, which may be asked for several prompts."""

    source: str  # OWN, BLANK or FOREIGN of evaluation.own_answers
    image: str  # name of the image; empty for a blank one
    sha256: str  # of its file; empty for a blank one
    question: str


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer, greedily."""

    text: str
    tokens: int  # with the end token
    is_cut: bool  # it ended at the largest number of tokens


@dataclasses.dataclass(frozen=True)
class Comparison:
    """An answer beside the true one, for a judge."""

    judge: str
    question: str
    truth: str
    answer: str


def read_answers(out: Path) -> tuple[dict[Query, Answer], dict[Comparison, bool]]:
    """Returns the answers and the verdicts of a folder; removes a line that a kill cut off.

    Raises: InputError for a line that is none of them.
    """
    path = out / ANSWERS
    answers: dict[Query, Answer] = {}
    verdicts: dict[Comparison, bool] = {}
    if not path.is_file():
        return answers, verdicts
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    for number, line in enumerate(whole.decode(errors="replace").split("\n")[:-1], 1):
        try:
            row = json.loads(line)
            if "source" in row:
                query = Query(*(str(row[key]) for key in _QUERY_KEYS))
                answers[query] = Answer(str(row["answer"]), int(row["tokens"]), bool(row["cut"]))
            if "judge" in row:
                verdicts[Comparison(*(str(row[key]) for key in _COMPARISON_KEYS))] = bool(
                    row["correct"]
                )
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path}: line {number}: is no answer ({error!r}); remove the line to ask again"
            ) from error
    if len(whole) < len(content):
        with replace_file(path) as file:
            file.write(whole)
    return answers, verdicts


_QUERY_KEYS = tuple(field.name for field in dataclasses.fields(Query))
_COMPARISON_KEYS = tuple(field.name for field in dataclasses.fields(Comparison))


def format_answer(query: Query, answer: Answer) -> bytes:
    """Returns the line of an answer as it came."""
    return _to_bytes(dataclasses.asdict(query) | _describe_answer(answer))


def format_verdict(comparison: Comparison, is_correct: bool) -> bytes:
    """Returns the line of a verdict as it came."""
    return _to_bytes(dataclasses.asdict(comparison) | {"correct": is_correct})


def format_rows(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """Returns the content of a finished file."""
    return b"".join(map(_to_bytes, rows))


def describe_row(
    query: Query, answer: Answer, image: AskedImage, judge: str, is_correct: bool
) -> dict[str, Any]:
    """Returns the row of an answer about an image, or about a blank one in its place."""
    record = image.record
    return {
        **dataclasses.asdict(query), "tag": record.tag, "prompt": record.prompt,
        "geneval_correct": image.is_right if query.image else None, "truth": record.answer,
        **_describe_answer(answer), "judge": judge, "correct": is_correct,
    }  # fmt: skip


def _describe_answer(answer: Answer) -> dict[str, Any]:
    return {"answer": answer.text, "tokens": answer.tokens, "cut": answer.is_cut}


def _to_bytes(row: Mapping[str, Any]) -> bytes:
    return to_json_line(row).encode(errors="backslashreplace")


def split_batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Yields the items in their order, at most `size` at once."""
    for first in range(0, len(items), size):
        yield items[first : first + size]
