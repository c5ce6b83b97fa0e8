"""The suite `tsv` of a training: its rows, its answers in several processes, its numbers."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

import corl_jax
from corl_jax.data.dataset import Loader, LoaderOptions
from corl_jax.errors import InputError
from corl_jax.evaluate import tsv_answers
from corl_jax.evaluation import EvaluationInputs
from corl_jax.evaluation.tsv import in_training
from corl_jax.evaluation.tsv.prompts import VLMEVALKIT, write_question
from corl_jax.policies import load_policy
from corl_jax.policies.family import SamplingOptions
from corl_jax.rewards.samples import Policy
from tests.support import metrics_page
from tests.support.tsv_files import encode_image, write_drawn_world, write_tsv

NANO = Path(corl_jax.__file__).parent / "assets" / "nano_janus"
ROWS = 5
OPTIONS = {"A": "a cat", "B": "a dog", "answer": "A"}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_drawn_world(tmp_path_factory.mktemp("tsv") / "drawn.tsv", ROWS, "choice")


@pytest.fixture(scope="module")
def model():
    return load_policy(NANO, np.dtype(np.float32))


def make_loader(path, model, shard=(0, 1)):
    options = LoaderOptions(
        tasks=in_training.TASKS, batch_size=4, seed=0, shuffle=False, lengths="dataset",
        process_index=shard[0], process_count=shard[1],
    )  # fmt: skip
    return Loader(in_training.open_rows(str(path), in_training.COLUMNS), model.processor, options)


def evaluate(path, model, shard=(0, 1), gather=lambda rows: rows, rows=None):
    special = model.processor.special
    return in_training.evaluate_tsv(
        EvaluationInputs(
            policy=Policy(model.family, model.sizes, model.params, model.processor, np.float32),
            batches=make_loader(path, model, shard),
            sampling=SamplingOptions(special, max_new_tokens=8, dtype=np.float32),
            seed=0, rows=rows, gather=gather,
        )
    )  # fmt: skip


def test_a_row_is_asked_as_the_command_asks_it(path, model):
    """The prompt ends up the same, whoever writes the line break behind the image."""
    rows = in_training.open_rows(str(path), in_training.COLUMNS)
    ids = [model.processor.prompt_ids("question", rows[number]) for number in range(ROWS)]
    for row, actual in zip(rows.column(in_training.ROW), ids, strict=True):
        question = write_question(row, "choice", "drawn", VLMEVALKIT)
        assert actual == tsv_answers.encode_question(model, question, ["image"])
        assert "image" not in row
    assert rows[0]["real_image"].mode == "RGB"


def test_each_answer_counts_once_and_the_processes_agree(path, model, monkeypatch):
    """Two processes with rows 0, 1, 4 and 2, 3, and a last batch with rows of a second pass."""
    rated = []
    rate = in_training.rate_answers
    monkeypatch.setattr(
        in_training, "rate_answers", lambda *args: (rated.append(args), rate(*args))[1]
    )
    alone = evaluate(path, model)
    barrier, parts, reports = threading.Barrier(2), [None, None], [None, None]

    def run(number):
        def gather(rows):
            parts[number] = rows
            barrier.wait(60)
            together = np.concatenate(parts)
            barrier.wait(60)
            return together

        reports[number] = evaluate(path, model, (number, 2), gather)

    threads = [threading.Thread(target=run, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert reports == [alone, alone]
    assert rated[1] == rated[2] == rated[0]
    assert len(rated[0][2]) == ROWS and len(set(rated[0][2])) > 1
    assert evaluate(path, model, rows=3) and rated[3][2] == rated[0][2][:3]


def rate(kind, rows, answers):
    rows = [{"index": number, **row} for number, row in enumerate(rows)]
    report = in_training.rate_answers(kind, rows, answers)
    assert not metrics_page.missing(report.metrics())
    return report.metrics()


def test_the_last_answer_tag_is_rated_and_what_no_rule_reads_is_counted():
    answers = ["<think>Is it B?</think><answer>A</answer>", "B", "hmm", "A"]
    metrics = rate("choice", [OPTIONS] * 4, answers)
    assert metrics["eval/answer/accuracy"] == 0.5 and metrics["eval/answer/unread"] == 0.25
    assert metrics["eval/answer/accuracy_low"] == pytest.approx(0.1500, abs=1e-4)  # Wilson, 2 of 4


def test_a_question_with_rotations_counts_once():
    rows = [OPTIONS, OPTIONS, OPTIONS | {"answer": "B"}]
    rows = [row | {"index": index} for row, index in zip(rows, (1, 2, 1_000_001), strict=True)]
    # Question 1 has a wrong rotation, question 2 is right.
    assert rate("mmbench", rows, ["A", "A", "A"])["eval/answer/accuracy"] == 0.5


def test_pope_has_its_f1_and_mme_its_pairs():
    rows = [{"answer": "Yes"}, {"answer": "Yes"}, {"answer": "No"}]
    metrics = rate("pope", rows, ["yes", "no", "no"])
    assert metrics["eval/answer/f1"] == pytest.approx(2 / 3)  # precision 1, recall 1/2
    assert metrics["eval/answer/accuracy"] == pytest.approx(2 / 3)
    rows = [
        {"answer": "Yes", "category": "color", "image_path": image}
        for image in ("a.png", "a.png", "b.png", "b.png")
    ]
    metrics = rate("mme", rows, ["yes", "yes", "no", "yes"])
    assert metrics["eval/answer/accuracy"] == 0.75
    assert metrics["eval/answer/accuracy_plus"] == 0.5


def test_rows_with_several_images_are_refused_with_their_number(tmp_path):
    image = encode_image()
    rows = [{"index": 1, **OPTIONS}] + [
        {"index": number, "image": str([image, image]), **OPTIONS} for number in (2, 3)
    ]
    source = in_training.open_rows(str(write_tsv(tmp_path / "two.tsv", rows)), [])
    columns = {name: source.column(name) for name in in_training.COLUMNS}
    (problem,) = in_training.find_row_problems(columns, ["row 1", "row 2", "row 3"])
    assert problem.startswith("2 of 3 rows have several images, such as row 2, row 3; ")


@pytest.mark.parametrize(
    ("name", "row", "problem"),
    [
        ("MMVet.tsv", {"answer": "red"}, "kind mmvet, whose answers need a judge (gpt-4-turbo)"),
        ("mine.tsv", {"answer": "red"}, "kind open, whose answers need a judge; "),
        ("mine.tsv", {"A": "a cat", "B": "a dog", "answer": ""}, "states no answers"),
    ],
)
def test_data_that_rules_cannot_rate_is_refused(tmp_path, name, row, problem):
    path = write_tsv(tmp_path / name, [{"index": 1, **row}])
    with pytest.raises(InputError, match=problem.replace("(", r"\(").replace(")", r"\)")):
        in_training.open_rows(str(path), in_training.COLUMNS)
