"""DPG-Bench: one picture for each prompt, four samples in a grid.

Source: TencentQQGYLab/ELLA, dpg_bench/compute_dpg_bench.py.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from corl_jax.errors import InputError, Problems
from corl_jax.evaluation.writers.t2i_compbench import ENDING as COMPBENCH_ENDING
from corl_jax.evaluation.writers.writer import (
    IMAGES,
    HarnessPrompt,
    ImageFile,
    Outcome,
    PromptList,
    Writer,
    check_single_path,
    check_text,
    find_doubles,
    find_source,
    join_in_grid,
    note_count,
)
from corl_jax.input_files import read_text

EXPECTED = "dpg_bench/prompts of ELLA: a folder with a .txt file for each prompt"
NUM_PROMPTS = 1065
MAX_IMAGES = 4  # the harness cuts at most four samples out of a picture


def read_folder(paths: Sequence[Path], problems: Problems) -> PromptList:
    """Reads a prompt from each .txt file of a folder, in the order of their names."""
    folder = find_source(check_single_path(paths, EXPECTED), ("dpg_bench/prompts",))
    if not folder.is_dir():
        raise InputError(f"{folder}: is no folder; expected {EXPECTED}")
    files = sorted(f for f in folder.glob("*.txt") if f.is_file() and f.name[0] != ".")
    if not files:
        raise InputError(f"{folder}: holds no .txt file; expected {EXPECTED}")
    if any(file.name.endswith(COMPBENCH_ENDING) for file in files):
        raise InputError(f"{folder}: holds lists of prompts (*{COMPBENCH_ENDING}); {EXPECTED}")
    prompts = []
    for file in files:
        with problems.collect():
            text = check_text(read_text(file, "a prompt in UTF-8"), str(file), problems)
            # The harness takes the name of an image up to its first dot.
            prompts.append(HarnessPrompt(text, file.name.split(".")[0], "", file.name))
    for name in find_doubles([prompt.name for prompt in prompts]):
        problems.add(
            f"{folder}: several files are named {name} up to the first dot, where the harness cuts "
            "names; expected different names"
        )
    notes = note_count(len(prompts), NUM_PROMPTS, "DPG-Bench")
    return PromptList(tuple(prompts), tuple(files), notes)


def list_files(prompts: Sequence[HarnessPrompt], samples: int) -> list[ImageFile]:
    """Lists NAME.png, with all samples of the prompt in one picture."""
    numbers = tuple(range(samples))
    return [
        ImageFile(f"{IMAGES}/{p.name}.png", number, numbers) for number, p in enumerate(prompts)
    ]


def describe_next(outcome: Outcome) -> str:
    """Returns the command of the scorer; PROCESSES is its number of GPUs."""
    images = shlex.quote(str(outcome.images))
    return (
        "# in the clone of ELLA, with dpg_bench/dpg_bench.csv; PROCESSES: number of GPUs\n"
        f"PIC_NUM={outcome.samples} PROCESSES=8 bash dpg_bench/dist_eval.sh {images} "
        f"{outcome.side}\n"
        "# The official script drops the first question of its file, and several processes mix up\n"
        "# the categories: the total is usable, the numbers of categories are not.\n"
    )


WRITER = Writer(
    title="DPG-Bench", expected=EXPECTED, read=read_folder, images_per_prompt=4,
    max_images=MAX_IMAGES, list_files=list_files, compose=join_in_grid,
    describe_next=describe_next,
)  # fmt: skip
