"""The table of tasks, and that the tables beside it have a row for what it names."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from corl_jax import tasks
from corl_jax.config.schema import Algorithm
from corl_jax.data.columns import COLUMNS
from corl_jax.policies import FAMILIES
from corl_jax.tasks import (
    TASKS,
    image_tasks,
    list_segments,
    plan_tasks,
    required_columns,
    text_tasks,
)


def test_a_task_is_turns_that_end_in_what_rewards_see():
    rows = {
        name: [(turn.prompt, turn.segments) for turn in task.turns] for name, task in TASKS.items()
    }
    assert rows == {
        "t2i": [("generate", ("codes",))], "mm2t": [("question", ("text",))],
        "think": [("think", ("text", "codes"))],
        "self_qa": [("generate", ("codes",)), ("question", ("text",))],
    }  # fmt: skip
    assert {name: task.results for name, task in TASKS.items()} == {
        "t2i": ("images",), "mm2t": ("texts",), "think": ("images",),
        "self_qa": ("images", "texts"),
    }  # fmt: skip
    assert tasks.name_turns("self_qa") == dict(
        zip(("self_qa", "self_qa/question"), TASKS["self_qa"].turns, strict=True)
    )
    several = [name for name, task in TASKS.items() if task.has_several_segments]
    assert several == ["think", "self_qa"]
    assert {name: task.description for name, task in TASKS.items()} == {
        "t2i": "image generation", "mm2t": "image understanding",
        "think": "image generation after a plan", "self_qa": "answers about own images",
    }  # fmt: skip
    assert image_tasks(tuple(TASKS)) == ("t2i", "think", "self_qa")
    assert text_tasks(tuple(TASKS)) == ("mm2t", "self_qa")
    assert plan_tasks(tuple(TASKS)) == ("think",)
    assert tasks.IMAGE_GENERATION is TASKS["t2i"] and tasks.IMAGE_UNDERSTANDING is TASKS["mm2t"]


def test_streams_are_distinct():
    """Else samples of two tasks on one row would have the same random numbers.

    Images that are asked about are those that image generation alone would draw.
    """
    streams = [task.stream for task in TASKS.values()] + list(tasks.QUESTION_STREAMS.values())
    assert streams == [0, 1, 6, 0, 2, 3, 4, 5], "another number changes the samples of every run"


def test_each_segment_has_a_name_of_its_own():
    assert tasks.name_segments("t2i", ("codes",)) == ("t2i",)
    assert list_segments() == (
        "t2i", "mm2t", "think/text", "think/codes", "self_qa/codes", "self_qa/text",
    )  # fmt: skip
    assert list_segments("text") == ("mm2t", "think/text", "self_qa/text")


def test_required_columns():
    assert required_columns(()) == ()
    assert required_columns(("t2i",)) == ("prompt",)
    assert required_columns(("mm2t",)) == ("real_image", "qa_problem")
    assert required_columns(("t2i", "mm2t", "t2i")) == ("prompt", "real_image", "qa_problem")
    assert set(required_columns(tuple(TASKS))) <= set(COLUMNS)


def test_the_config_names_every_task_and_no_other():
    assert tasks.choose_tasks("unified") == ("t2i", "mm2t")
    for name in TASKS:
        assert tasks.choose_tasks(Algorithm(tasks=name).tasks) == (name,)
    with pytest.raises(ValidationError, match="did you mean t2i"):
        Algorithm(tasks="t2")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_can_do_every_task(name):
    for task in TASKS.values():
        assert task.turn_kinds in FAMILIES[name].turns
