"""How problems are printed."""

from __future__ import annotations

import pytest

from corl_jax.errors import (
    MAX_PRINTED_PROBLEMS,
    InputError,
    Problems,
    exit_on_input_error,
    shorten,
)


def test_a_long_list_of_problems_is_cut_and_its_rest_counted(capsys):
    problems = [f"row {number}" for number in range(1234)]

    @exit_on_input_error
    def command():
        raise InputError(problems)

    with pytest.raises(SystemExit, match="2"):
        command()
    lines = capsys.readouterr().err.splitlines()
    assert lines[:-1] == [f"error: row {number}" for number in range(MAX_PRINTED_PROBLEMS)]
    assert "1,214 more" in lines[-1]


def test_a_short_list_stays_as_it_is():
    problems = [str(number) for number in range(MAX_PRINTED_PROBLEMS)]
    assert shorten(problems) == problems


def test_problems_are_collected_once_each_and_raised_together():
    def read(text):
        if not text:
            raise InputError(["a: found nothing", "b: found nothing"])
        return int(text)

    problems = Problems()
    problems.raise_any()
    assert problems.attempt(read, "7") == 7 and not problems
    assert problems.attempt(read, "") is None
    problems.add("b: found nothing")
    with problems.collect("c: "):
        raise InputError("found 3")
    with pytest.raises(InputError) as error:
        problems.raise_any()
    assert error.value.problems == ["a: found nothing", "b: found nothing", "c: found 3"]
