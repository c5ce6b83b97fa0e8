"""The tasks: the text or image that a policy makes for a row of the data.

A task is one or more turns. A turn is a prompt and the segments that the policy adds to it in one
context. docs/how_to/add_a_task.md shows the rows that later tasks will be.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from corl_jax.nearest import suggest_name

TEXT, CODES, LATENTS = "text", "codes", "latents"
"""Kinds of segments: text tokens, codes of an image tokenizer, and denoising steps of an image.

Turns name the choices of an image CODES. A family whose images are made by denoising returns a
segment of LATENTS for it.
"""

TurnKinds = tuple[tuple[str, ...], ...]
"""The kinds of the segments of each turn, by which a family finds the program of a task."""

IMAGES, TEXTS = "images", "texts"
"""What rewards see of a task: the last segment of each turn, decoded."""


@dataclasses.dataclass(frozen=True)
class Turn:
    """A prompt, by the name under which a processor encodes it, and the kinds of its segments."""

    prompt: str
    segments: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Task:
    """One row of `TASKS`."""

    description: str  # in messages and tables
    turns: tuple[Turn, ...]
    columns: tuple[str, ...]  # columns of the data that make the prompts
    stream: int  # random stream: the samples of two tasks on one row are independent
    shown: str  # column that reports show beside the results
    question: str | None = None  # column of a question that a later turn asks, which they show too

    @property
    def turn(self) -> Turn:
        """The only turn of the task."""
        # Fails for several turns, which have no prompt and no sampler in common.
        (turn,) = self.turns
        return turn

    @property
    def segments(self) -> tuple[str, ...]:
        """The kinds of the segments of all turns."""
        return tuple(kind for turn in self.turns for kind in turn.segments)

    @property
    def turn_kinds(self) -> TurnKinds:
        """The kinds of the segments of each turn: (("codes",), ("text",)) of two turns."""
        return tuple(turn.segments for turn in self.turns)

    @property
    def results(self) -> tuple[str, ...]:
        """What rewards see: IMAGES, TEXTS or both, one for each turn."""
        return tuple(TEXTS if turn.segments[-1] == TEXT else IMAGES for turn in self.turns)

    @property
    def makes_text(self) -> bool:
        """True if rewards see texts."""
        return TEXTS in self.results

    @property
    def makes_image(self) -> bool:
        """True if rewards see images."""
        return IMAGES in self.results

    @property
    def has_plan(self) -> bool:
        """True if the policy writes a text, the plan, before a result and in its context."""
        return any(TEXT in turn.segments[:-1] for turn in self.turns)

    @property
    def has_several_segments(self) -> bool:
        """True if the policy makes something before its last segment: a plan or an image."""
        return len(self.segments) > 1


TASKS: dict[str, Task] = {
    "t2i": Task(
        "image generation", (Turn("generate", (CODES,)),), ("prompt",), stream=0, shown="prompt"
    ),
    "mm2t": Task(
        "image understanding", (Turn("question", (TEXT,)),), ("real_image", "qa_problem"),
        stream=1, shown="qa_problem",
    ),
    "think": Task(
        "image generation after a plan", (Turn("think", (TEXT, CODES)),), ("prompt",),
        stream=6, shown="prompt",
    ),
    # The stream of t2i: with the same weights it draws the same images.
    "self_qa": Task(
        "answers about own images", (Turn("generate", (CODES,)), Turn("question", (TEXT,))),
        ("prompt", "qa_problem"), stream=0, shown="prompt", question="qa_problem",
    ),
}  # fmt: skip

IMAGE_GENERATION, IMAGE_UNDERSTANDING = TASKS["t2i"], TASKS["mm2t"]
PLANNED_GENERATION = TASKS["think"]
UNIFIED = ("t2i", "mm2t")
"""CoRL's tasks on the same rows, paired by the number of the sample."""
GENERATION, UNDERSTANDING = ("t2i",), ("mm2t",)
"""Each of these tasks alone."""
SELF_QUESTIONING = ("self_qa",)

PLAN_COLUMN = "plan"
"""Column that the program adds to the samples of a task with plans: the plan of each image."""

# No number of TASKS: an equal one would repeat the random numbers of a task.
QUESTION_STREAMS = {"caption": 2, "qa": 3, "oc": 4, "od": 5}
"""Random streams of the questions that rewards ask a model about its images."""


def choose_tasks(choice: str) -> tuple[str, ...]:
    """Returns the tasks that a value of the options `algorithm.tasks` and `sft.tasks` trains.

    Raises:
        ValueError: it is neither `unified` nor a task.
    """
    if choice == "unified":
        return UNIFIED
    if choice not in TASKS:
        raise ValueError(suggest_name(choice, ("unified", *TASKS)))
    return (choice,)


def choose_tasks_of_step(tasks: Sequence[str], every: int, step: int) -> tuple[str, ...]:
    """Returns the tasks that a step trains, counted from 0: all, or one that changes.

    `every` is the number of steps after which the task changes; 0: all tasks in each step.
    """
    # Of the step alone, so that a resumed run continues the schedule without a state of its own.
    # Two tasks, every 2: steps 0, 1, 2, 3, 4 -> tasks 0, 0, 1, 1, 0.
    return (tasks[step // every % len(tasks)],) if every else tuple(tasks)


def name_kind(kind: str) -> str:
    """Returns the kind of a segment by which turns name it: CODES for LATENTS."""
    return CODES if kind == LATENTS else kind


def name_segments(task: str, kinds: Sequence[str]) -> tuple[str, ...]:
    """Returns the metric prefix of each segment: the task, with the kind if there are several."""
    # "t2i" has one segment: ("t2i",); "think" has two: ("think/text", "think/codes")
    return (task,) if len(kinds) == 1 else tuple(f"{task}/{name_kind(kind)}" for kind in kinds)


def list_segments(kind: str | None = None) -> tuple[str, ...]:
    """Returns the metric prefixes of the segments of all tasks, of one kind or of every kind."""
    return tuple(
        name
        for task, row in TASKS.items()
        for name, of in zip(name_segments(task, row.segments), row.segments, strict=True)
        if kind in (None, of)
    )


def name_turns(task: str) -> dict[str, Turn]:
    """Returns the turns of a task by the names of their prompts: the task, then TASK/PROMPT."""
    # "self_qa" has two turns: "self_qa" and "self_qa/question".
    first, *later = TASKS[task].turns
    return {task: first} | {f"{task}/{turn.prompt}": turn for turn in later}


def required_columns(tasks: Sequence[str]) -> tuple[str, ...]:
    """Returns the standard columns that make the tasks' prompts, each once."""
    # A dict, not a set: the order of columns must be the same in every process.
    return tuple(dict.fromkeys(name for task in tasks for name in TASKS[task].columns))


def image_tasks(tasks: Sequence[str]) -> tuple[str, ...]:
    """Returns the tasks that make an image."""
    return tuple(task for task in tasks if TASKS[task].makes_image)


def text_tasks(tasks: Sequence[str]) -> tuple[str, ...]:
    """Returns the tasks that make a text."""
    return tuple(task for task in tasks if TASKS[task].makes_text)


def plan_tasks(tasks: Sequence[str]) -> tuple[str, ...]:
    """Returns the tasks that make a plan before their result."""
    return tuple(task for task in tasks if TASKS[task].has_plan)
