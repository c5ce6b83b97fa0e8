"""User's rewards have a process, main thread and loop of their own: what people bring along works.

The first file is loaded once for all of its functions, in each of which some other kind of code
meets the conditions under which it runs.
"""

from __future__ import annotations

import gc
import subprocess
import textwrap

import numpy as np
import pytest

from corl_jax.errors import InputError, RewardError
from corl_jax.rewards import own
from corl_jax.rewards.own import load_user_reward
from corl_jax.rewards.samples import Context, Samples
from corl_jax.rewards.user_process import INDEX_VARIABLE

NOWHERE = Context(None, None, None, None, None, seed=0, step=0)
ANSWERS = Samples({}, texts=["one", "three", ""])
LENGTHS = [3, 5, 0]

KINDS = '''
import asyncio, concurrent.futures, contextlib, functools, multiprocessing, os, signal, sqlite3
import subprocess, sys, threading

main_thread = threading.current_thread()
loop_of_import = asyncio.get_event_loop()


def length(text):
    return float(len(text))


# ---- timers


@contextlib.contextmanager
def limit(seconds, timer):
    def late(*_):
        raise TimeoutError("too long")

    old = signal.signal(signal.SIGALRM, late)
    timer(seconds)
    try:
        yield
    finally:
        timer(0)
        signal.signal(signal.SIGALRM, old)


def itimer(texts):
    scores = []
    for text in texts:
        with limit(2, functools.partial(signal.setitimer, signal.ITIMER_REAL)):
            scores.append(length(text))
    return scores


def alarm_in_silence(texts):
    """As libraries that take every exception for a wrong answer."""
    scores = []
    for text in texts:
        try:
            with limit(2, signal.alarm):
                scores.append(length(text))
        except Exception:
            scores.append(-1.0)
    return scores


def alarm_that_rings(texts):
    scores = []
    for text in texts:
        try:
            with limit(0.05, functools.partial(signal.setitimer, signal.ITIMER_REAL)):
                if not text:
                    threading.Event().wait()
                scores.append(length(text))
        except TimeoutError:
            scores.append(0.0)
    return scores


async def alarm_in_a_coroutine(texts):
    await asyncio.sleep(0)
    return itimer(texts)


# ---- state that belongs to a thread


seen = sqlite3.connect(":memory:")
seen.execute("create table seen(text text)")
local = threading.local()
local.calls = 0


def database(texts):
    seen.executemany("insert into seen values (?)", [(text,) for text in texts])
    return [length(text) for text in texts]


def thread_local(texts):
    local.calls += 1
    assert threading.current_thread() is main_thread is threading.main_thread()
    return [length(text) for text in texts]


# ---- state that belongs to a loop


class Client:
    """Keeps a lock, a connection and a task that answers, as clients of services do."""

    def __init__(self):
        self.lock, self.asked = asyncio.Lock(), asyncio.Queue()
        self.worker = self.pair = None

    async def serve(self, reader, writer):
        while line := await reader.readline():
            writer.write(b"%d\\n" % (len(line) - 1))

    async def ask(self, text):
        async with self.lock:
            if self.pair is None:
                server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
                self.pair = await asyncio.open_connection(*server.sockets[0].getsockname())
            reader, writer = self.pair
            writer.write(text.encode() + b"\\n")
            return float(await reader.readline())


client = Client()


async def judge(texts):
    assert asyncio.get_running_loop() is loop_of_import
    return await asyncio.gather(*map(client.ask, texts))


def judge_by_hand(texts):
    """Plain, with the loop that was there at import."""
    return loop_of_import.run_until_complete(judge(texts))


def judge_on_the_current_loop(texts):
    return asyncio.get_event_loop().run_until_complete(judge(texts))


def loop_of_its_own(texts):
    async def score():
        return [length(text) for text in texts]

    return asyncio.run(score())


beats = []


async def keeps_a_task(texts):
    async def beat():
        while True:
            beats.append(len(beats))
            await asyncio.sleep(0.01)

    if not beats:
        keeps_a_task.task = asyncio.create_task(beat())
    return [length(text) for text in texts]


def counts_beats(texts):
    return [float(len(beats))] * len(texts)


# ---- processes


def spawn_pool(texts):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.map(length, texts)


def fork_pool(texts):
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.map(length, texts)


def forkserver_executor(texts):
    context = multiprocessing.get_context("forkserver")
    with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
        return list(pool.map(length, texts))


def program(texts):
    done = subprocess.run(["wc", "-c"], input="".join(texts).encode(), capture_output=True)
    assert int(done.stdout) == sum(map(len, texts))
    return [length(text) for text in texts]


def reads(texts):
    assert sys.stdin.read() == ""
    return [length(text) for text in texts]
'''
NAMES = (
    "itimer", "alarm_in_silence", "alarm_that_rings", "alarm_in_a_coroutine", "database",
    "thread_local", "judge", "judge_by_hand", "judge_on_the_current_loop", "loop_of_its_own",
    "keeps_a_task", "spawn_pool", "fork_pool", "forkserver_executor", "program", "reads",
)  # fmt: skip


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    path = tmp_path_factory.mktemp("kinds") / "kinds.py"
    path.write_text(KINDS, encoding="utf-8")
    return {
        name: load_user_reward(f"{path}:{name}", {}, max_failures=1)
        for name in (*NAMES, "counts_beats")
    }


@pytest.mark.parametrize("name", NAMES)
def test_every_call_is_as_the_first(kinds, name):
    for _ in range(3):
        np.testing.assert_array_equal(kinds[name](ANSWERS, NOWHERE), LENGTHS)


def test_an_async_client_works_in_every_step_beside_other_rewards(kinds):
    for _ in range(9):
        for name in ("judge", "loop_of_its_own", "itimer", "judge_by_hand"):
            np.testing.assert_array_equal(kinds[name](ANSWERS, NOWHERE), LENGTHS)


def test_tasks_of_the_loop_run_between_calls(kinds):
    kinds["keeps_a_task"](ANSWERS, NOWHERE)
    counts = set()
    for _ in range(200):  # until the sleep of the task is over
        counts.add(float(kinds["counts_beats"](ANSWERS, NOWHERE)[0]))
        if len(counts) > 2:
            return
        subprocess.run(["sleep", "0.02"], check=True)
    raise AssertionError(f"found {counts}")


# ---- files beside a file


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Writes {name: code} below the working directory."""
    monkeypatch.chdir(tmp_path)

    def write(files: dict[str, str]) -> None:
        for name, code in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(textwrap.dedent(code))

    return write


def score_one(use: str) -> float:
    (score,) = load_user_reward(use, {}, max_failures=1)(Samples({}, texts=["a"]), NOWHERE)
    return float(score)


def test_files_beside_a_reward_are_found_and_do_not_mix(tree):
    """The working directory has one of the name too, as a command's first place to look."""
    uses = "import helper_values\ndef f(texts): return [helper_values.WEIGHT]\n"
    late = "def f(texts):\n    from helper_values import WEIGHT\n    return [WEIGHT]\n"
    tree({
        "helper_values.py": "WEIGHT = 0",
        "a/helper_values.py": "WEIGHT = 1", "a/rewards.py": uses,
        "b/helper_values.py": "WEIGHT = 2", "b/rewards.py": uses, "b/late.py": late,
        "b/yaml.py": late,
    })  # fmt: skip
    first, second = (load_user_reward(f"{folder}/rewards.py:f", {}) for folder in "ab")
    one = Samples({}, texts=["a"])
    assert [first(one, NOWHERE), second(one, NOWHERE), first(one, NOWHERE)] == [1, 2, 1]
    assert score_one("b/late.py:f") == 2
    assert score_one("b/yaml.py:f") == 2, "a file whose name is taken has neighbours too"


def test_a_file_beside_a_reward_hides_no_module_of_python(tree):
    tree({
        "a/colorsys.py": "raise SystemExit('hidden')", "a/helper.py": "import colorsys",
        "a/rewards.py": "import helper\ndef f(texts): return [1]",
    })  # fmt: skip
    assert score_one("a/rewards.py:f") == 1


def test_relative_imports_work_in_a_package(tree):
    tree({
        "src/mypack/__init__.py": "", "src/mypack/deep/__init__.py": "",
        "src/mypack/values.py": "WEIGHT = 4",
        "src/mypack/deep/more.py": "from ..values import WEIGHT",
        "src/mypack/deep/rewards.py": """
            import multiprocessing
            from .more import WEIGHT
            from mypack.values import WEIGHT as same
            import more as by_its_folder
            def _double(value): return 2 * value
            def f(texts):
                assert WEIGHT == same == by_its_folder.WEIGHT
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    return pool.map(_double, [WEIGHT])
        """,
    })  # fmt: skip
    # by_its_folder has no package, so its own relative import cannot work.
    with pytest.raises(InputError, match=r"relative import.*put an __init__\.py into the file"):
        load_user_reward("src/mypack/deep/rewards.py:f", {})
    tree({"src/mypack/deep/more.py": "from mypack.values import WEIGHT"})
    assert score_one("src/mypack/deep/rewards.py:f") == 8


def test_what_cannot_be_found_names_the_remedy(tree):
    tree({
        "a/missing.py": "from nothing_here import x\ndef f(texts): return [1]",
        "a/relative.py": "from .values import x\ndef f(texts): return [1]", "a/values.py": "x = 1",
        "a/hidden.py": "from token import x\ndef f(texts): return [1]", "a/token.py": "x = 1",
    })  # fmt: skip
    for name, remedy in (
        ("hidden", "line 1: .*token is a module of Python itself; rename the file beside"),
        ("missing", "line 1: .*No module named 'nothing_here'; install it, or put it beside"),
        ("relative", "line 1: .*no known parent package; put an __init__.py into"),
    ):
        with pytest.raises(InputError, match=remedy):
            load_user_reward(f"a/{name}.py:f", {})


def test_a_program_below_the_main_line_does_not_run(tree):
    tree({"a.py": "def f(texts): return [1]\nif __name__ == '__main__':\n    raise SystemExit(3)"})
    assert score_one("a.py:f") == 1


# ---- surroundings


def test_nothing_that_a_reward_prints_reaches_standard_output(tree, capfd):
    tree({"a.py": """
        import os, subprocess, sys
        print("at import")
        def f(texts):
            print("a line", {"reward": 99}, "\\u2713")
            sys.stdout.write("no end of line")
            os.write(1, b", by number, ")
            subprocess.run(["echo", "by a program"])
            return [1]
    """})  # fmt: skip
    assert score_one("a.py:f") == 1
    assert capfd.readouterr() == (
        "",
        "at import\na line {'reward': 99} \u2713\nno end of line, by number, by a program\n",
    )


def test_a_reward_knows_its_place_and_takes_no_device(tree):
    tree({"a/rewards.py": f"""
        import os, sys
        def f(texts):
            assert os.environ["JAX_PLATFORMS"] == "cpu" and os.environ["{INDEX_VARIABLE}"] == "0"
            assert os.path.exists("a/rewards.py"), "paths start where the command's do"
            assert not {{"jax", "numpy"}} & sys.modules.keys(), "starts in no time"
            return [1]
    """})  # fmt: skip
    assert score_one("a/rewards.py:f") == 1


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_to_all_processes_of_a_job_leaves_the_reward_to_end_its_step(tree, name):
    """But not what it has started, which handles signals as ever."""
    tree({"a.py": f"""
        import multiprocessing, os, signal, time
        def f(texts):
            os.kill(os.getpid(), signal.{name})
            child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
            child.start()
            os.kill(child.pid, signal.SIGTERM)
            child.join()
            return [-child.exitcode]
    """})  # fmt: skip
    assert score_one("a.py:f") == 15


def test_another_reward_of_a_file_whose_process_has_ended(tree):
    tree({"a.py": """
        import os
        def f(texts): os._exit(1)
        def g(texts): return [2]
    """})  # fmt: skip
    first, one = load_user_reward("a.py:f", {}), Samples({}, texts=["a"])
    assert np.isnan(first(one, NOWHERE))
    second = load_user_reward("a.py:g", {})
    assert second.process is first.process and second(one, NOWHERE) == 2


def test_an_import_that_ends_the_process_says_so(tree):
    tree({"a.py": "import os\nos._exit(4)"})
    with pytest.raises(InputError, match=r"a\.py:f: ChildProcessError.*exited with code 4"):
        load_user_reward("a.py:f", {})


def test_a_restart_that_fails_counts_as_a_failed_call(tree, monkeypatch):
    tree({"a.py": """
        import os
        if os.path.exists("gone"): raise OSError("no model")
        def f(texts):
            open("gone", "w").close()
            os._exit(1)
    """})  # fmt: skip
    monkeypatch.setattr(own, "REWARD_GRACE_S", 0.2)
    reward, one = load_user_reward("a.py:f", {}, max_failures=2), Samples({}, texts=["a"])
    assert np.isnan(reward(one, NOWHERE))
    with pytest.raises(RewardError, match=r"a\.py line 3: .*OSError: no model"):
        reward(one, NOWHERE)


def test_what_a_module_does_at_exit_is_done(tree, tmp_path):
    tree({"a.py": """
        import atexit
        atexit.register(lambda: open("closed", "w").close())
        def f(texts): return [1]
    """})  # fmt: skip
    reward = load_user_reward("a.py:f", {})
    assert not (tmp_path / "closed").exists()
    del reward
    gc.collect()
    assert (tmp_path / "closed").exists()
