"""A new task: text questions without an image.

Trains it: python -m docs.examples.reading_task --config CONFIG.yaml algorithm.tasks=reading
docs/how_to/add_a_task.md explains each part.
"""

from __future__ import annotations

from corl_jax.tasks import TASKS, TEXT, Task, Turn

READING = Task(
    "reading",
    turns=(Turn("question", (TEXT,)),),
    columns=("qa_problem",),
    stream=7,
    shown="qa_problem",
)

if __name__ == "__main__":
    TASKS["reading"] = READING
    from corl_jax.train.__main__ import main

    main()
