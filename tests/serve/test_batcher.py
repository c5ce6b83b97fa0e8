"""The queue of samples: what shares a call, what fails alone, what is refused, how it ends."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future

import pytest

from corl_jax.serve.batcher import Batcher, Closed, QueueFull


class Recorder:
    """Draws a row as itself; keeps the calls; waits before each while `is_held`."""

    def __init__(self):
        self.calls: list[tuple[str, list]] = []
        self.entered, self.free = threading.Event(), threading.Event()
        self.free.set()

    def __call__(self, program, rows):
        self.entered.set()
        assert self.free.wait(10)
        self.calls.append((program, list(rows)))
        if "poison" in rows:
            raise ValueError("poison")
        return [f"{program}:{row}" for row in rows]


@pytest.fixture
def recorder():
    return Recorder()


@pytest.fixture
def make(recorder):
    """Makes batchers that end with the test."""
    made = []

    def start(**options) -> Batcher:
        options = {"batch_size": 4, "max_wait_s": 0.0, "max_queue": 8} | options
        made.append(Batcher(recorder, **options))
        return made[-1]

    yield start
    recorder.free.set()
    for batcher in made:
        batcher.close()


def hold(batcher: Batcher, recorder: Recorder) -> list[Future]:
    """Keeps the thread in a call, so that what comes next waits."""
    recorder.free.clear()
    first = batcher.submit("first", [0])
    assert recorder.entered.wait(10)
    return first


def results(futures):
    return [future.result(10) for future in futures]


def test_samples_that_arrive_together_share_a_call(make, recorder):
    batcher = make(max_wait_s=5.0)
    futures = [*batcher.submit("a", [1, 2]), *batcher.submit("a", [3, 4])]  # a full batch: no wait
    assert results(futures) == ["a:1", "a:2", "a:3", "a:4"]
    assert recorder.calls == [("a", [1, 2, 3, 4])]


def test_a_sample_waits_for_others_only_so_long(make):
    batcher, began = make(max_wait_s=0.1), time.monotonic()
    assert results(batcher.submit("a", [1])) == ["a:1"]
    assert 0.1 <= time.monotonic() - began < 5


def test_the_oldest_sample_decides_which_program_runs(make, recorder):
    batcher = make()
    hold(batcher, recorder)
    futures = [f for name, row in zip("abab", range(4), strict=True)
               for f in batcher.submit(name, [row])]  # fmt: skip
    recorder.free.set()
    assert results(futures) == ["a:0", "b:1", "a:2", "b:3"]
    assert recorder.calls[1:] == [("a", [0, 2]), ("b", [1, 3])]


def test_a_large_request_is_split(make, recorder):
    batcher = make()
    assert results(batcher.submit("a", range(10))) == [f"a:{i}" for i in range(10)]
    assert results(batcher.submit("a", range(5))) == [f"a:{i}" for i in range(5)]
    assert [len(rows) for _, rows in recorder.calls] == [4, 4, 2, 3, 2]


def test_a_request_is_drawn_in_one_call_where_it_fits(make, recorder):
    batcher = make()
    hold(batcher, recorder)
    futures = [f for rows in ([1, 2, 3], [4, 5], [6]) for f in batcher.submit("a", rows)]
    recorder.free.set()
    assert results(futures) == [f"a:{i}" for i in range(1, 7)]
    assert [rows for _, rows in recorder.calls[1:]] == [[1, 2, 3], [4, 5, 6]]


def test_a_failing_sample_fails_alone(make, caplog):
    good, bad, other = make().submit("a", [1, "poison", 3])
    assert results([good, other]) == ["a:1", "a:3"]
    with pytest.raises(ValueError, match="poison"):
        bad.result(10)
    assert "a call for 3 samples failed" in caplog.text and "a call for 1 samples" in caplog.text


def test_a_full_queue_takes_all_samples_of_a_request_or_none(make, recorder):
    batcher = make()
    hold(batcher, recorder)
    kept = batcher.submit("a", range(6))
    with pytest.raises(QueueFull):
        batcher.submit("a", range(3))
    assert batcher.queued == 6
    kept[0].cancel()
    more = batcher.submit("b", range(3))  # a cancelled one leaves room
    recorder.free.set()
    assert results([*kept[1:], *more]) == [f"a:{i}" for i in range(1, 6)] + ["b:0", "b:1", "b:2"]
    assert 0 not in [row for _, rows in recorder.calls[1:2] for row in rows]


def test_the_end_draws_what_waits_and_takes_no_more(make, recorder):
    batcher = make(max_wait_s=60.0)
    waiting = batcher.submit("a", [1])
    batcher.close()
    assert results(waiting) == ["a:1"] and not batcher.is_open
    with pytest.raises(Closed):
        batcher.submit("a", [2])
