"""How problems are printed."""

from __future__ import annotations

import pytest

from corl_jax.errors import MAX_PRINTED_PROBLEMS, InputError, exit_on_input_error, shorten


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
