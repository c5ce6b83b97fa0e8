"""Rewards from a user's file: loading says all that is wrong, calling survives what goes wrong."""

from __future__ import annotations

import gc
import http.server
import json
import logging
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corl_jax.errors import InputError, RewardError
from corl_jax.rewards import own
from corl_jax.rewards.own import load_user_reward
from corl_jax.rewards.samples import Context, Samples
from corl_jax.rewards.worker import convert_scores

NOWHERE = Context(None, None, None, None, None, seed=0, step=0)
EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "my_rewards.py"


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a Python file and returns its name, relative to the working directory."""
    monkeypatch.chdir(tmp_path)

    def writer(code: str, name: str = "mine.py") -> str:
        (tmp_path / name).write_text(textwrap.dedent(code), encoding="utf-8")
        return name

    return writer


@pytest.fixture
def made(write):
    """A reward `f` of the code, given at once."""

    def make(code: str, options=None, **settings):
        return load_user_reward(f"{write(code)}:f", options or {}, **{"timeout_s": 5.0} | settings)

    return make


def texts(*answers: str, **columns: list) -> Samples:
    return Samples(columns, texts=list(answers))


def images(count: int = 2, **columns: list) -> Samples:
    levels = np.arange(count, dtype=np.uint8)[:, None, None, None] * 51
    return Samples(columns, images=np.broadcast_to(levels, (count, 4, 4, 3)))


def problems(use: str, options=None) -> list[str]:
    with pytest.raises(InputError) as caught:
        load_user_reward(use, options or {})
    assert all(problem.startswith(f"rewards: {use}: ") for problem in caught.value.problems)
    return [problem.removeprefix(f"rewards: {use}: ") for problem in caught.value.problems]


# ---- what a function gets


def test_images_make_a_reward_of_drawings(made):
    reward = made("def f(images): return [image.getpixel((0, 0))[0] for image in images]")
    assert (reward.name, reward.scores, reward.columns, reward.optional) == ("f", "images", (), ())
    scores = reward(images(3), NOWHERE)
    np.testing.assert_array_equal(scores, [0, 51, 102])
    assert scores.dtype == np.float32 and reward.failures == 0


def test_texts_make_a_reward_of_answers(made):
    reward = made("def f(texts): return [len(text) for text in texts]")
    assert reward.scores == "texts"
    np.testing.assert_array_equal(reward(texts("a", "", "ccc"), NOWHERE), [1, 0, 3])


def test_columns_come_by_name_and_defaults_stand_in_for_missing_ones(made):
    reward = made("""
        def f(texts, prompt, qa_type=None, style=("x", "x")):
            assert qa_type is None and style == ["p", "q"]
            return [float(text == wanted) for text, wanted in zip(texts, prompt)]
    """)
    assert (reward.columns, reward.optional) == (("prompt",), ("qa_type", "style"))
    batch = texts("a", "b", prompt=["a", "c"], style=["p", "q"], other=[1, 2])
    np.testing.assert_array_equal(reward(batch, NOWHERE), [1, 0])
    assert reward.failures == 0


def test_every_column_goes_to_the_star_parameter_except_what_is_named_otherwise(made):
    reward = made(
        """
        def f(texts, prompt, *, scale=1, **columns):
            assert sorted(columns) == ["a", "images"], columns
            return [scale * value for value in columns["a"]]
        """,
        {"scale": 2},
    )
    assert reward.parameters.every_column
    clashing = {"scale": [0, 0], "texts": [0, 0], "images": [0, 0]}
    scores = reward(texts("x", "y", prompt=["", ""], a=[1, 2], **clashing), NOWHERE)
    np.testing.assert_array_equal(scores, [2, 4])


def test_the_samples_cannot_be_changed_by_accident(made):
    reward = made("""
        def f(texts, prompt, **columns):
            scores = [1.0 for _ in texts]
            texts.clear(), prompt.clear(), columns["a"].clear()
            return scores
    """)
    batch = texts("x", "y", prompt=["p", "q"], a=[1, 2])
    np.testing.assert_array_equal(reward(batch, NOWHERE), [1, 1])
    assert (batch.texts, batch.columns) == (["x", "y"], {"prompt": ["p", "q"], "a": [1, 2]})


def test_options_are_bound_and_may_be_required(made):
    code = """
        def f(texts, *, factor: float, word: str = "a"):
            return [factor * text.count(word) for text in texts]
    """
    np.testing.assert_array_equal(made(code, {"factor": 3})(texts("aab"), NOWHERE), [6])
    both = made(code, {"factor": 0.5, "word": "b"})
    np.testing.assert_array_equal(both(texts("aab"), NOWHERE), [0.5])


def test_no_samples_make_no_call(made):
    reward = made("def f(texts): raise RuntimeError")
    assert reward(texts(), NOWHERE).shape == (0,) and reward.failures == 0


# ---- what it may return


@pytest.mark.parametrize(
    "values",
    [
        "[1, None, 0.5]",
        "(1.0, float('nan'), 0.5)",
        "np.array([1, np.nan, 0.5])",
        "np.array([1, None, 0.5], object)",
        "jnp.array([1, jnp.nan, 0.5], jnp.bfloat16)",
        "[np.float16(1), None, jnp.float32(0.5)]",
        "[True, None, np.float64(0.5)]",
    ],
)
def test_lists_and_arrays_of_numbers_are_scores(values):
    scores = convert_scores(eval(values), 3)
    assert all(type(score) is float for score in scores)
    np.testing.assert_array_equal(scores, [1, np.nan, 0.5])


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ("None", "TypeError: returned NoneType; expected a list or array of 2 numbers or None"),
        ("[1]", "ValueError: returned 1 values; expected"),
        ("[1, 2, 3]", "ValueError: returned 3 values; expected"),
        ("np.ones((2, 1))", "ValueError: returned an array of shape (2, 1); expected"),
        ("np.float32(1)", "ValueError: returned an array of shape (); expected"),
        ("[1, '2']", "TypeError: returned '2' for sample 1; expected"),
        ("np.array(['1', '2'])", "TypeError: returned '1' for sample 0; expected"),
        ("[1, [2]]", "TypeError: returned [2] for sample 1; expected"),
        ("[1, np.ones(1)]", "TypeError: returned array([1.]) for sample 1; expected"),
        ("[1, 1j]", "TypeError: returned 1j for sample 1; expected"),
        ("[{}, 1]", "TypeError: returned {} for sample 0; expected"),
        ("'12'", "TypeError: returned str; expected"),
        ("{1, 2}", "TypeError: returned set; expected"),
        ("{0: 1, 1: 2}", "TypeError: returned dict; expected"),
        ("(x for x in (1, 2))", "TypeError: returned generator; expected"),
        ("[1, 10**400]", "OverflowError: int too large to convert to float"),
    ],
)
def test_anything_else_fails(values, line):
    with pytest.raises((TypeError, ValueError, OverflowError)) as caught:
        convert_scores(eval(values), 2)
    assert f"{type(caught.value).__name__}: {caught.value}".startswith(line)


def test_a_wrong_result_costs_all_samples(made, caplog):
    reward = made("def f(texts): return 1.0")
    assert np.isnan(reward(texts("a", "b"), NOWHERE)).all()
    assert (reward.failures, reward.failed_samples) == (1, 2)
    (record,) = caplog.records
    assert "TypeError: returned float; expected a list or array of 2" in record.getMessage()


@settings(deadline=None)
@given(st.lists(st.none() | st.floats(width=32) | st.integers(-(2**20), 2**20) | st.booleans()))
def test_scores_are_the_values_whatever_holds_them(values):
    wanted = [math.nan if value is None else float(value) for value in values]
    for holder in (values, tuple(values), np.array(values, object), np.array(wanted)):
        np.testing.assert_array_equal(convert_scores(holder, len(values)), wanted)
    np.testing.assert_array_equal(
        convert_scores(jnp.array(wanted, jnp.float32), len(values)), wanted
    )


@settings(deadline=None)
@given(st.recursive(st.none() | st.floats() | st.text() | st.binary(), st.lists), st.integers(0, 4))
def test_whatever_comes_back_is_scores_or_an_error_that_is_caught(values, count):
    try:
        scores = convert_scores(values, count)
    except (TypeError, ValueError, OverflowError):
        numbers = isinstance(values, list) and all(
            value is None or isinstance(value, float) for value in values
        )
        assert not numbers or len(values) != count
    else:
        assert len(scores) == count == len(values)


def test_what_float32_cannot_hold_becomes_infinite_without_a_warning(made, recwarn):
    reward = made("def f(texts): return [1e300, -1e300]")
    assert reward(texts("a", "b"), NOWHERE).tolist() == [math.inf, -math.inf]
    assert not recwarn.list


# ---- failures


def test_an_exception_costs_the_samples_and_then_the_run(made, caplog):
    reward = made("def f(texts):\n    return helper(texts)\ndef helper(x): raise KeyError('gone')",
                  max_failures=3)  # fmt: skip
    for done in (1, 2):
        assert np.isnan(reward(texts("a", "b"), NOWHERE)).all()
        assert (reward.failures, reward.failed_samples) == (done, 2)
    with pytest.raises(RewardError) as caught:
        reward(texts("a", "b"), NOWHERE)
    assert reward.failures == 3 and not isinstance(caught.value, InputError)
    message = str(caught.value)
    assert message.startswith("reward f (mine.py:f): failed calls in a row: 3 (max_failures: 3)")
    assert "return helper(texts)" in message and "def helper(x): raise" in message
    assert message.rstrip().endswith("KeyError: 'gone'")
    assert "worker.py" not in message and "asyncio" not in message
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert caplog.records[0].getMessage() == (
        "reward f: its call failed (1 in a row; 3 end the run), 2 samples go without: "
        "KeyError: 'gone'"
    )


def test_a_success_starts_the_row_anew_but_not_the_count(made):
    reward = made(
        "def f(texts):\n    if texts[0] == 'bad': raise ValueError\n    return [1.0]",
        max_failures=2,
    )
    for _ in range(3):
        assert np.isnan(reward(texts("bad"), NOWHERE)).all() and reward.failed_samples == 1
        assert reward(texts("good"), NOWHERE) == 1 and reward.failed_samples == 0
    assert reward.failures == 3
    reward(texts("bad"), NOWHERE)
    with pytest.raises(RewardError, match=r"in a row: 2 .* 5 have failed in all"):
        reward(texts("bad"), NOWHERE)


def test_ending_the_program_is_a_failure_like_others(made, caplog):
    for define in ("def", "async def"):
        reward = made(f"import sys\n{define} f(texts): sys.exit(3)")
        assert np.isnan(reward(texts("a"), NOWHERE)).all()
        assert caplog.records[-1].getMessage().endswith("SystemExit: 3")


CALLS = """
    import os, sys, time
    calls = []
    def f(texts):
        calls.append(texts[0])
        %s
        return [float(len(calls))]
"""


def test_a_plain_function_that_hangs_is_interrupted_and_keeps_its_state(made, caplog):
    code = CALLS % "if texts[0] == 'slow': time.sleep(3600)  # for ever"
    reward = made(code, timeout_s=0.2, max_failures=2)
    began = time.perf_counter()
    assert np.isnan(reward(texts("slow"), NOWHERE)).all()
    assert time.perf_counter() - began >= 0.2
    assert caplog.records[-1].getMessage().endswith("TimeoutError: no result after 0.2 s")
    assert reward(texts("quick"), NOWHERE) == 2, "the process has gone on"
    reward(texts("slow"), NOWHERE)
    with pytest.raises(RewardError, match="failed calls in a row: 2") as caught:
        reward(texts("slow"), NOWHERE)
    assert "time.sleep(3600)  # for ever" in str(caught.value), "shows where it hangs"
    assert "worker.py" not in str(caught.value)


STUBBORN = """
    while texts[0] == 'slow':
            try:
                time.sleep(3600)  # for ever
            except Exception:
                pass
"""


def test_a_function_that_does_not_stop_is_ended_with_its_process(made, monkeypatch, caplog):
    monkeypatch.setattr(own, "REWARD_GRACE_S", 0.2)
    reward = made(CALLS % STUBBORN.strip(), timeout_s=0.2)
    assert reward(texts("quick"), NOWHERE) == 1
    first = reward.process.pid
    assert np.isnan(reward(texts("slow"), NOWHERE)).all()
    assert "its process did not stop and was ended" in caplog.records[-1].getMessage()
    assert reward.last_failure is not None
    assert "time.sleep(3600)  # for ever" in reward.last_failure.trace
    assert reward(texts("quick"), NOWHERE) == 1, "the file was imported anew"
    assert reward.process.pid != first and not is_alive(first)


def test_a_process_that_ends_costs_its_call_and_is_started_anew(made, caplog):
    code = CALLS % "exec(texts[0])"
    reward = made(code)
    for end, what in (
        ("os._exit(3)", "exited with code 3"),
        ("os.kill(os.getpid(), 9)", "was ended by SIGKILL; has memory run out?"),
        ("os.abort()", "was ended by SIGABRT"),
    ):
        assert reward(texts("pass"), NOWHERE) == 1
        assert np.isnan(reward(texts(end), NOWHERE)).all()
        assert (
            caplog.records[-1]
            .getMessage()
            .endswith(f"ChildProcessError: the process of mine.py {what}")
        )
    assert reward.failures == 3


def test_a_file_edited_during_a_run_counts_from_the_next_run_on(made, write):
    """Also where its process had to be started anew."""
    reward = made(CALLS % "exec(texts[0])")
    write("def f(texts): return [-1.0]")
    reward(texts("os._exit(3)"), NOWHERE)
    assert reward(texts("pass"), NOWHERE) == 1
    assert load_user_reward("mine.py:f", {})(texts("pass"), NOWHERE) == -1


def is_alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def until_gone(pid: int) -> None:
    limit = time.perf_counter() + 20
    while is_alive(pid):
        assert time.perf_counter() < limit, f"process {pid} is still there"
        time.sleep(0.02)


def test_no_process_stays_when_nobody_has_the_reward(made):
    reward = made("import os\ndef f(texts): return [os.getpid()]")
    pid = reward.process.pid
    assert reward(texts("a"), NOWHERE) == pid and pid != os.getpid()
    del reward
    gc.collect()
    assert not is_alive(pid)


LEFT_ALONE = """
import os, subprocess, sys, time
def f(texts):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    with open("pids", "w") as file:
        file.write(f"{os.getpid()} {child.pid}")
    time.sleep(600)
"""


def test_no_process_stays_when_the_run_is_killed(write, tmp_path):
    """In the middle of a call, together with what the reward has started itself."""
    write(LEFT_ALONE)
    script = (
        "from corl_jax.rewards import own\n"
        "from corl_jax.rewards.samples import Context, Samples\n"
        "own.load_user_reward('mine.py:f', {})(Samples({}, texts=['a']), None)\n"
    )
    env = os.environ | {"PYTHONPATH": str(EXAMPLE.parents[2])}
    run = subprocess.Popen([sys.executable, "-c", script], env=env)
    pids = tmp_path / "pids"
    while len(pids.read_text().split() if pids.exists() else ()) < 2:
        assert run.poll() is None
        time.sleep(0.05)
    run.kill()
    run.wait()
    for pid in pids.read_text().split():
        until_gone(int(pid))


def test_an_async_function_is_awaited(made):
    reward = made("""
        import asyncio
        async def one(text):
            await asyncio.sleep(0.2)
            return len(text)
        async def f(texts):
            return await asyncio.gather(*map(one, texts))
    """)
    began = time.perf_counter()
    np.testing.assert_array_equal(reward(texts(*"a" * 20), NOWHERE), [1] * 20)
    assert time.perf_counter() - began < 2, "one after the other would take 4 s"


def test_an_async_function_that_runs_out_of_time_is_cancelled(made):
    reward = made(
        """
        import asyncio
        cleaned = []
        async def f(texts):
            if texts[0] == "cleaned":
                return [len(cleaned)]
            try:
                await asyncio.sleep(60)
            finally:
                cleaned.append(len(texts))
        """,
        timeout_s=0.1, max_failures=2,
    )  # fmt: skip
    assert np.isnan(reward(texts("a"), NOWHERE)).all()
    assert reward(texts("cleaned"), NOWHERE) == 1
    reward(texts("a"), NOWHERE)
    with pytest.raises(RewardError, match=r"TimeoutError: no result after 0\.1 s") as caught:
        reward(texts("a"), NOWHERE)
    assert "await asyncio.sleep(60)" in str(caught.value)


def test_an_async_function_that_does_not_yield_is_ended(made, monkeypatch):
    monkeypatch.setattr(own, "REWARD_GRACE_S", 0.05)
    code = "import time\nasync def f(texts):\n    time.sleep(60)\n    return [1.0]"
    reward = made(code, timeout_s=0.05, max_failures=1)
    with pytest.raises(RewardError, match=r"time\.sleep\(60\)"):
        reward(texts("a"), NOWHERE)


def test_a_timeout_of_the_functions_own_says_so(made, caplog):
    reward = made("async def f(texts): raise TimeoutError('the service')")
    assert np.isnan(reward(texts("a"), NOWHERE)).all()
    assert caplog.records[-1].getMessage().endswith("TimeoutError: the service")


@pytest.mark.parametrize("define", ["def", "async def"])
def test_an_interrupt_ends_the_run(made, define):
    reward = made(f"{define} f(texts): raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        reward(texts("a"), NOWHERE)


def test_an_interrupt_from_the_keyboard_does_not_wait(made):
    code = """
        import os, signal, time
        def f(texts):
            os.kill(os.getppid(), signal.SIGINT)
            time.sleep(60)
    """
    reward = made(code, timeout_s=30)
    # A shell starts what it runs in the background with this signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    began = time.perf_counter()
    try:
        with pytest.raises(KeyboardInterrupt):
            reward(texts("a"), NOWHERE)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.perf_counter() - began < 10


# ---- loading


def test_two_rewards_of_a_file_share_one_import(write):
    name = write("""
        from __future__ import annotations
        import dataclasses
        print("imported")
        @dataclasses.dataclass
        class Shared:
            calls: int = 0
        shared = Shared()
        def f(texts): shared.calls += 1; return [shared.calls]
        def g(texts): shared.calls += 1; return [shared.calls]
    """)
    first, second = load_user_reward(f"{name}:f", {}), load_user_reward(f"./{name}:g", {})
    assert first(texts("a"), NOWHERE) == 1 and second(texts("a"), NOWHERE) == 2


def test_a_file_is_imported_when_it_is_loaded_and_only_once(write, capfd):
    name = write("print('imported')\ndef f(texts): return [0]\ndef g(texts): return [0]")
    rewards = [load_user_reward(f"{name}:f", {}), load_user_reward(f"{name}:g", {})]
    assert rewards[0].process is rewards[1].process
    assert capfd.readouterr() == ("", "imported\n")


@pytest.mark.parametrize("name", ["json.py", "yaml.py", "v1.2 of-mine.py"])
def test_a_file_may_have_any_name(write, name):
    """Even that of a module of Python, or of an installed one that it imports itself."""
    code = """
        import json, yaml
        def f(texts): return [len(json.dumps(yaml.safe_load("[1]")))]
    """
    assert load_user_reward(f"{write(code, name)}:f", {})(texts("a"), NOWHERE) == 3


def test_a_function_of_an_installed_module(write, monkeypatch, tmp_path):
    (tmp_path / "pack").mkdir()
    write("def f(texts): return [7 for _ in texts]", "pack/my_module.py")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_user_reward("pack.my_module:f", {})(texts("a"), NOWHERE) == 7
    assert problems("pack.my_module:g") == ["pack.my_module has no function g; found: f"]


def test_callables_other_than_functions(write):
    name = write("""
        from __future__ import annotations
        import functools
        from typing import Literal
        class Counter:
            calls = 0
            def __call__(self, texts, *, by: Literal[1, 2] = 1):
                self.calls += by
                return [self.calls] * len(texts)
        counter = Counter()
        def plain(texts, *, value: float): return [value] * len(texts)
        half = functools.partial(plain, value=0.5)
    """)
    counter = load_user_reward(f"{name}:counter", {"by": 2})
    assert [counter(texts("a"), NOWHERE)[0] for _ in range(2)] == [2, 4]
    assert load_user_reward(f"{name}:half", {})(texts("a"), NOWHERE) == 0.5
    assert load_user_reward(f"{name}:half", {"value": 2.0})(texts("a"), NOWHERE) == 2
    (problem,) = problems(f"{name}:counter", {"by": 3})
    assert problem == "option by: found 3; Input should be 1 or 2 (default 1)"


def test_annotations_may_name_what_only_type_checkers_import(made):
    reward = made("""
        from __future__ import annotations
        from typing import TYPE_CHECKING
        if TYPE_CHECKING:
            from PIL import Image
        def f(images: list[Image.Image], *, level: int | None = None) -> Sequence[float]:
            return [0.0 for _ in images]
    """)
    assert reward(images(2), NOWHERE).tolist() == [0, 0]


def test_files_and_modules_that_are_not_there(write, tmp_path):
    write("", "notes.txt")
    write("def f(texts): pass", "other.py")
    (tmp_path / "folder.py").mkdir()
    assert problems("gone.py:f") == [
        "cannot read gone.py (No such file or directory); paths start at the working directory, "
        f"{tmp_path}"
    ]
    assert "Is a directory" in problems("folder.py:f")[0]
    assert problems("notes.txt:f") == ["found notes.txt; expected a Python file, NAME.py"]
    assert problems("some/where:f") == ["found where; expected a Python file, NAME.py"]
    assert problems("no_such_module:f") == [
        "no module no_such_module is installed; install it, or name a file, PATH.py:FUNCTION"
    ]
    for use in ("other.py", "other", ":f", "other.py:", "other.py:f()", "not a module:f"):
        assert problems(use) == ["expected FILE.py:FUNCTION or package.module:FUNCTION"]


def test_a_file_that_git_left_as_a_pointer_is_named(write):
    path = write(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'ab' * 32}\nsize 900\n")
    with pytest.raises(InputError, match=r"is a Git LFS pointer.*`git lfs pull`"):
        load_user_reward(f"{path}:f", {})


def test_functions_that_are_not_there_and_things_that_are_none(write):
    name = write("""
        from math import sqrt
        def brightness(images): ...
        def brevity(texts): ...
        class Bright: ...
        level = 5
    """)
    assert problems(f"{name}:brightnes") == [
        "mine.py has no function brightnes; did you mean brightness? (found: brightness, brevity)"
    ]
    assert problems(f"{name}:short_answer") == [
        "mine.py has no function short_answer; found: brightness, brevity"
    ]
    assert problems(f"{name}:level") == [
        "level is of type int; expected a function: def level(images, ..)"
    ]
    assert problems(f"{name}:Bright") == [
        "Bright is a class; expected a function: def Bright(images, ..)"
    ]
    assert problems(f"{write('', 'empty.py')}:f") == ["empty.py has no function f, nor any other"]


@pytest.mark.parametrize(
    ("code", "line", "error", "remedy"),
    [
        ("x = 1\ndef f(texts:\n  pass\n", "line 2: def f(texts:",
         "SyntaxError: '(' was never closed", "correct the line"),
        ("def f(texts):\npass\n", "line 2: pass",
         "IndentationError: expected an indented block after function definition on line 1",
         "correct the line"),
        ("import no_such_thing.at_all\n", "line 1: import no_such_thing.at_all",
         "ModuleNotFoundError: No module named 'no_such_thing'",
         "install it, or put it beside the file"),
        ("from math import sine\n", "line 1: from math import sine",
         "ImportError: cannot import name 'sine' from 'math'",
         "importing the file must not fail"),
        ("def g():\n    return 1 / 0\n\ng()\n", "line 4: g()",
         "ZeroDivisionError: division by zero", "importing the file must not fail"),
        ("import sys\nsys.exit(2)\n", "line 2: sys.exit(2)", "SystemExit: 2",
         'move what ends the program under if __name__ == "__main__"'),
    ],
)  # fmt: skip
def test_a_file_that_does_not_import_is_shown_with_its_line(write, code, line, error, remedy):
    (problem,) = problems(f"{write(code)}:f")
    assert problem.startswith(f"mine.py {line}: {error}")
    assert problem.endswith(f"; {remedy}")


def test_a_module_whose_own_import_fails_is_not_called_missing(write, monkeypatch, tmp_path):
    write("\nimport absent_dependency\n", "present_module.py")
    monkeypatch.syspath_prepend(tmp_path)
    (problem,) = problems("present_module:f")
    assert problem.startswith("present_module.py line 2: import absent_dependency: ModuleNotFound")


@pytest.mark.parametrize(
    ("signature", "expected"),
    [
        ("()", ["found the parameters none; expected images (a reward of images) or texts"]),
        ("(image, prompt)", ["found the parameters image, prompt; expected images"]),
        ("(images, texts)", ["found the parameters images, texts; expected images"]),
        ("(**columns)", ["found the parameters columns; expected images"]),
        ("(texts, /)", ["parameter texts: positional-only; move it behind the /"]),
        ("(texts, *more)", ["parameter *more: nothing fills it; write * or drop it"]),
        ("(*, images)", ["parameter images: an option by its place; move it before the *"]),
        ("(prompt, /, *args)", ["parameter prompt: positional-only", "parameter *args: nothing"]),
        ("(texts, *, n: 'Unknown' = 1)", ["option n: its annotation 'Unknown' cannot be read"]),
    ],
)
def test_parameters_that_nothing_fills(write, signature, expected):
    found = problems(f"{write(f'def f{signature}: return []')}:f")
    assert len(found) == len(expected)
    for problem, start in zip(found, expected, strict=True):
        assert problem.startswith(start)


def test_options_are_checked_against_their_annotations(write):
    name = write("""
        import threading
        from typing import Annotated, Literal
        from pydantic import Field
        def f(texts, *, strength: float, mode: Literal["a", "b"] = "a", anything=None,
              share: Annotated[float, Field(ge=0, le=1)] = 0.5, lock: threading.Event = None):
            return [0.0 for _ in texts]
        def g(texts): return [0.0]
    """)
    load_user_reward(f"{name}:f", {"strength": 1, "mode": "b", "anything": [{}], "share": 1.0})
    found = problems(
        f"{name}:f", {"strenght": 1.0, "mode": "c", "share": 2.0, "anything": 1, "lock": 3}
    )
    assert found[0].startswith("option strenght: unknown; did you mean strength? (known: strength,")
    assert found[1] == "option mode: found 'c'; Input should be 'a' or 'b' (default 'a')"
    assert found[2].startswith("option share: found 2.0; Input should be less than or equal to 1")
    assert "is no type that a config can give" in found[3] and "lock" in found[3]
    assert found[4].startswith("option strength: missing, and the function has no default for it")
    assert len(found) == 5
    assert problems(f"{name}:f", {"strength": "1"}) == [
        "option strength: found '1'; Input should be a valid number (no default)"
    ]
    assert problems(f"{name}:g", {"x": 1}) == ["option x: unknown; this reward has no options"]


# ---- the example


class Judge(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        score = None if asked["question"] is None else float(asked["answer"] in asked["question"])
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"score": score}).encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def service():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_the_example_scores_pictures_and_answers():
    brightness = load_user_reward(f"{EXAMPLE}:brightness", {"target": 0.2})
    np.testing.assert_allclose(brightness(images(3), NOWHERE), [0.8, 1.0, 0.8], atol=1e-6)
    brevity = load_user_reward(f"{EXAMPLE}:brevity", {"most_words": 2})
    batch = ("one two", "a b c d", "a b c d")
    np.testing.assert_array_equal(brevity(texts(*batch), NOWHERE), [1, 0.5, 0.5])
    typed = texts(*batch, qa_type=["OE", "OE", "MC"])
    np.testing.assert_array_equal(brevity(typed, NOWHERE), [1, 0.5, np.nan])


def test_the_example_asks_a_service(service, caplog):
    judge = load_user_reward(f"{EXAMPLE}:judge", {"url": service})
    assert (judge.scores, judge.columns) == ("texts", ("qa_problem",))
    batch = texts("a", "z", "b", qa_problem=["abc", "abc", None])
    np.testing.assert_array_equal(judge(batch, NOWHERE), [1, 0, np.nan])
    assert judge.failures == 0
    away = load_user_reward(f"{EXAMPLE}:judge", {"url": service + "0"}, max_failures=2)
    assert np.isnan(away(batch, NOWHERE)).all() and away.failures == 1
    assert problems(f"{EXAMPLE}:judge") == [
        "option url: missing, and the function has no default for it; set options: {url: ..}"
    ]
