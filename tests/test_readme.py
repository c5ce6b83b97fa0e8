"""README.md: its length, its links, and its commands one after the other."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text()
MOST_WORDS = 900

# Not run, because they install this clone, which the tests of the wheel do, or never end.
NOT_RUN = ("git clone", "pip install", "tensorboard")
# Smaller where it would take a GPU; no more than the config where it would take weights of the hub.
SMALL = "train.max_steps=1 train.prompts_per_step=4 train.micro_batch=4 eval.rows=8 log.every=1"
MORE = {
    "corl-jax train mini/unified": SMALL,
    "corl-jax train janus": "--print-config",
    "corl-jax data --out runs/mini/data": "--rows 64",
}
INSTEAD = {"make quickstart": "corl-jax quickstart train.max_steps=2 eval.rows=16 log.every=1"}


def find_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)


def list_commands() -> list[str]:
    """Returns the commands in order, without comments, as this test runs them."""
    lines = [line.partition(" #")[0].strip() for line in "".join(find_blocks("bash")).splitlines()]
    commands = []
    for line in lines:
        more = [text for start, text in MORE.items() if line.startswith(start)]
        commands.append(" ".join([INSTEAD.get(line, line), *more]))
    return [command for command in commands if not command.startswith(NOT_RUN)]


def test_is_read_in_minutes():
    assert len(TEXT.split()) <= MOST_WORDS


def test_every_exception_is_used():
    lines = "".join(find_blocks("bash")).splitlines()
    for start in (*NOT_RUN, *MORE, *INSTEAD):
        assert any(line.startswith(start) for line in lines), start


@pytest.mark.slow
def test_its_commands_work_one_after_the_other(tmp_path):
    """In a folder of their own, on this machine's CPU."""
    shutil.copytree(ROOT / "docs" / "examples", tmp_path / "docs" / "examples")
    program = tmp_path / "bin" / "corl-jax"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m corl_jax "$@"\n')
    program.chmod(0o755)
    path = os.pathsep.join([str(program.parent), os.environ["PATH"]])
    variables = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}

    def run(command: str | list[str]) -> None:
        done = subprocess.run(
            command, shell=isinstance(command, str), cwd=tmp_path, env=variables,
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"

    commands = list_commands()
    assert len(commands) > 15
    for command in commands:
        run(command)
    for block in find_blocks("python"):
        run([sys.executable, "-c", block])
