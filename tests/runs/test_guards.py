"""Guards over hand-made series: when each one speaks, how often, and what a resume remembers."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from corl_jax.config import files as config_files
from corl_jax.config.checks import find_idle_options
from corl_jax.config.schema import Guards as Options
from corl_jax.errors import GuardError, InputError, RewardError
from corl_jax.runs import guards
from corl_jax.runs.directory import jsonable
from corl_jax.runs.guards import FAILED_WINDOW, RULES, UNREWARDED_STEPS, WINDOW, Guards
from corl_jax.train.iteration import duplicates

GOOD = {"update/skipped": 0.0, "loss": 1.0, "grad_norm": 2.0, "t2i/loss": 1.0, "mm2t/loss": 0.1}
BAD = GOOD | {"update/skipped": 1.0, "loss": math.nan, "grad_norm": math.inf, "t2i/loss": math.nan}


def said(watched: Guards, name: str, series: list[float], key: str) -> list[int]:
    """The logged steps (from 1) at which the alarm begins."""
    found = []
    for step, value in enumerate(series, 1):
        metrics, lines = watched.logged(step, {key: value})
        assert all(line.startswith(f"alarm {name} at step {step}: {key} ") for line in lines)
        assert not lines or metrics[f"alarm/{name}"] == 1
        found += [step] * len(lines)
    return found


# ---- updates


def test_skipped_updates_in_a_row_end_the_run():
    watched = Guards(Options(max_skipped_updates=3))
    for step, updates in enumerate([[BAD, BAD], [GOOD, BAD], [BAD, GOOD], [BAD]], 1):
        watched.step(step, updates, {})
    with pytest.raises(GuardError) as error:
        watched.step(5, [BAD, BAD], {})  # the third in a row is the second of this step
    for part in ("step 5: 3 update(s)", "loss nan", "norm inf", "not finite: t2i/loss. "):
        assert part in str(error.value)
    assert watched.skipped == 7


def test_a_derivative_that_is_not_finite_is_told_from_a_loss():
    watched = Guards(Options(max_skipped_updates=1))
    with pytest.raises(GuardError, match=r"no part of the loss, so it is a derivative"):
        watched.step(1, [GOOD | {"update/skipped": 1.0, "grad_norm": math.nan}], {})


def test_skipped_updates_are_counted_between_logged_steps():
    watched = Guards(Options())
    watched.step(1, [BAD, GOOD], {})
    watched.step(2, [BAD], {})
    counts = [watched.logged(2, {})[0], watched.logged(3, {})[0]]
    assert [one["update/skipped"] for one in counts] == [2, 0]
    assert [one["update/skipped_total"] for one in counts] == [2, 2]


# ---- rewards


def test_a_reward_that_fails_too_often_ends_the_run():
    """Never twice in a row, so that `max_failures` alone would let it go on for ever."""
    watched = Guards(Options(max_failed_reward_fraction=0.4))
    name = "mm2t/rewards/judge/failed"
    for step in range(1, FAILED_WINDOW):
        watched.step(step, [], {name: step % 2, "mm2t/rewards/format/seconds": 1.0})
    with pytest.raises(RewardError, match=rf"step {FAILED_WINDOW}: reward judge failed on 50%"):
        watched.step(FAILED_WINDOW, [], {name: 0.0})
    tolerant = Guards(Options(max_failed_reward_fraction=0.5))
    for step in range(1, 100):
        tolerant.step(step, [], {name: step % 2})


def unrewarded(watched: Guards, shares: list[float], is_last: bool = False) -> None:
    for step, share in enumerate(shares, 1):
        watched.step(step, [], {"not_applicable": share}, is_last and step == len(shares))


def test_a_run_in_which_no_reward_ever_applies_ends():
    with pytest.raises(GuardError, match=rf"step {UNREWARDED_STEPS}: no reward has applied"):
        unrewarded(Guards(Options()), [1.0] * UNREWARDED_STEPS)
    with pytest.raises(GuardError, match=r"step 3: .* of the 3 step\(s\) of this run"):
        unrewarded(Guards(Options()), [1.0] * 3, is_last=True)
    unrewarded(Guards(Options()), [1.0, 0.99, *[1.0] * 50], is_last=True)
    unrewarded(Guards(Options(not_applicable=None)), [1.0] * 50, is_last=True)


def test_a_run_without_rewards_counts_on_when_it_is_resumed():
    before, after = Guards(Options()), Guards(Options())
    unrewarded(before, [1.0] * (UNREWARDED_STEPS - 1))
    after.restore(json.loads(json.dumps(jsonable(before.state()))))
    with pytest.raises(GuardError):
        unrewarded(after, [1.0])
    old = {key: value for key, value in before.state().items() if key != "unrewarded"}
    earlier = Guards(Options())
    earlier.restore(old)  # a checkpoint of a version that did not count them
    unrewarded(earlier, [1.0])


# ---- alarms


def test_completions_without_a_reward_are_an_alarm():
    share = {"not_applicable": 0.4, "mm2t/not_applicable": 0.8, "t2i/not_applicable": 0.0}
    watched = Guards(Options())
    lines = [watched.logged(step, share)[1] for step in range(1, 13)]
    assert [bool(said) for said in lines] == [step == WINDOW for step in range(1, 13)]
    assert "mm2t/not_applicable 0.8, above 0.5" in lines[WINDOW - 1][0]
    with pytest.raises(GuardError, match=r"guards\.fatal lists it"):
        Guards(Options(fatal=["not_applicable"])).require(lines[WINDOW - 1])


def test_a_reward_that_never_applies_is_an_alarm_beside_others_that_do():
    """One that applies to few rows is none."""
    watched = Guards(Options())
    for step in range(1, 30):
        values = {
            "not_applicable": 0.0,
            "mm2t/rewards/judge/not_applicable": 1.0,
            "mm2t/rewards/rare/not_applicable": 1.0 if step % 9 else 0.98,
        }
        metrics, lines = watched.logged(step, values)
        assert bool(lines) == (step == WINDOW), (step, lines)
        if lines:
            assert "mm2t/rewards/judge/not_applicable 1, above" in lines[0]
            assert "rare" not in lines[0]
    assert metrics["alarm/not_applicable"] == 1.0


def test_a_reward_that_never_applies_is_said_at_the_end_of_a_short_run():
    values = {"not_applicable": 0.0, "t2i/rewards/judge/not_applicable": 1.0}
    watched = Guards(Options())
    lines = [watched.logged(step, values, is_last=step == 3)[1] for step in (1, 2, 3)]
    assert [len(said) for said in lines] == [0, 0, 1]
    used = Guards(Options())
    used.logged(1, values | {"t2i/rewards/judge/not_applicable": 0.9})
    assert not used.logged(2, values, is_last=True)[1]


def test_steps_without_a_reward_say_nothing_of_the_spread():
    watched = Guards(Options())
    for step in range(1, 25):
        assert not watched.logged(step, {"frac_reward_zero_std": math.nan})[1]
    assert said(watched, "zero_spread", [1.0] * WINDOW, "frac_reward_zero_std") == [WINDOW]


@pytest.mark.parametrize("name", ["kl", "drift_mean", "drift_max"])
def test_an_alarm_is_said_once_per_crossing(name):
    limit, key = getattr(Options(), name), RULES[name].keys[1]
    low, high = limit, 1.01 * limit
    quiet = [low] * WINDOW
    series = [low, high, high, low, high, *quiet, high, math.nan, *quiet, math.nan]
    assert said(Guards(Options()), name, series, key) == [2, 16, 28]


@pytest.mark.parametrize(
    ("name", "key"),
    [("duplicates", "t2i/duplicate_fraction"), ("zero_spread", "frac_reward_zero_std")],
)
def test_shares_are_averaged_so_that_one_batch_says_nothing(name, key):
    limit = getattr(Options(), name)
    one_off = [1.0, *[limit / 2] * WINDOW] * 3
    assert said(Guards(Options()), name, one_off, key) == []
    assert said(Guards(Options()), name, [limit] * 30 + [1.0] * 30, key) == [31]
    assert said(Guards(Options()), name, [1.0] * 9, key) == []  # too few to say


def test_entropy_is_compared_with_the_runs_own_beginning():
    for scale in (0.02, 9.0):
        falling = [scale] * 15 + [0.05 * scale] * 20
        # The mean of ten falls below a tenth of the first ones with the tenth low value.
        assert said(Guards(Options()), "entropy", falling, "mm2t/entropy") == [25]
        assert said(Guards(Options()), "entropy", [scale] * 40, "mm2t/entropy") == []
    assert said(Guards(Options(entropy=None)), "entropy", falling, "mm2t/entropy") == []


def test_both_tasks_are_watched_and_named():
    values = {"t2i/kl": 3.0, "mm2t/kl": 2.0}
    ((line,), metrics) = Guards(Options(kl=1.5)).logged(7, values)[::-1]
    assert "t2i/kl 3 and mm2t/kl 2, above 1.5" in line and metrics["alarm/kl"] == 1
    assert "alarm/duplicates" not in metrics  # nothing was drawn


def test_only_listed_alarms_are_fatal():
    line = "alarm kl at step 3: t2i/kl 4, above 1"
    Guards(Options(fatal=["drift_mean"])).require([line])
    Guards(Options(fatal=["kl"])).require([])
    with pytest.raises(GuardError, match=r"guards\.fatal lists it"):
        Guards(Options(fatal=["kl"])).require([line])


# ---- evaluations


def run_of(watched: Guards, rewards: list[float], scores: list[float], error=0.01) -> list[int]:
    """Evaluations (from 0) that begin an alarm; five steps of each reward lie before each."""
    begins = []
    for number, score in enumerate(scores):
        if number:
            for step in range(5):
                watched.logged(5 * number + step, {"reward": rewards[number - 1]})
        values = {"eval/t2i/clip": score, "eval/t2i/clip_stderr": error}
        metrics, lines = watched.evaluated(5 * number, values)
        assert metrics["alarm/held_out"] in (0, 1)
        begins += [number] * len(lines)
    return begins


@pytest.mark.parametrize(
    ("rewards", "scores", "begins"),
    [
        ([0.2, 0.3, 0.4], [0.5, 0.6, 0.5, 0.4], [2]),  # said once
        ([0.2, 0.3, 0.4], [0.5, 0.6, 0.58, 0.6], []),  # within the error
        ([0.4, 0.3, 0.2], [0.5, 0.6, 0.5, 0.4], []),  # the reward falls as well
        ([0.2, 0.3, 0.4], [0.5, 0.4, 0.3, 0.2], [2]),  # the first compares with its own steps
        ([0.2, 0.3, 0.4, 0.5], [0.5, 0.6, 0.4, 0.6, 0.4], [2, 4]),  # again after recovering
    ],
)
def test_a_held_out_score_that_falls_while_the_reward_rises(rewards, scores, begins):
    assert run_of(Guards(Options()), rewards, scores) == begins
    assert run_of(Guards(Options()), rewards, scores, error=1.0) == []


def test_scores_of_the_drawn_world_are_its_two_accuracies():
    values = {
        f"eval/{name}{end}": value
        for name in ("draw/accuracy", "draw/counting", "answer/accuracy")
        for end, value in (("", 0.5), ("_low", 0.4), ("_high", 0.6))
    }
    found = guards.held_out_scores(values | {"eval/seconds": 3.0})
    assert found.keys() == {"eval/draw/accuracy", "eval/answer/accuracy"}
    assert found["eval/draw/accuracy"] == (0.5, pytest.approx(0.2 / 3.92))


# ---- resuming


def test_a_resumed_run_counts_on():
    """Through the JSON of a checkpoint, cut at any place of a series, it says the same."""
    rng = np.random.default_rng(3)
    series = [
        {
            "reward": 0.01 * step, "t2i/kl": math.nan if step % 23 == 5 else 0.5,
            "t2i/entropy": 1.0 if step < 20 else 0.01,
            "frac_reward_zero_std": 0.8 + 0.2 * rng.random(),
        }
        for step in range(60)
    ]  # fmt: skip

    def look(watched: Guards, step: int):
        watched.step(step, [GOOD, BAD][step % 2 :], {"t2i/rewards/r/failed": step % 3 == 0})
        found = [watched.logged(step, series[step])]
        if step % 7 == 0:
            scores = {"eval/a": -0.01 * step, "eval/a_stderr": 0.001}
            found.append(watched.evaluated(step, scores))
        return found

    straight = Guards(Options())
    expected = [look(straight, step) for step in range(60)]
    assert sum(bool(lines) for step in expected for _, lines in step) >= 5
    for cut in (1, 9, 25, 44):
        before, after = Guards(Options()), Guards(Options())
        found = [look(before, step) for step in range(cut)]
        after.restore(json.loads(json.dumps(jsonable(before.state()), allow_nan=False)))
        found += [look(after, step) for step in range(cut, 60)]
        assert found == expected, cut


# ---- metrics and options


def test_duplicates_are_counted_within_groups():
    tokens = np.arange(24).reshape(8, 3)
    tokens[1] = tokens[0]  # one of group 0
    tokens[6] = tokens[7] = tokens[4]  # two of group 1
    tokens[3, 0] = tokens[2, 0]  # a token alone is no duplicate
    assert duplicates(tokens, 4) == pytest.approx(3 / 8)
    assert duplicates(tokens, 2) == pytest.approx(2 / 8)


BASE = {
    "output_dir": "x", "model": {"path": "m"}, "data": {"path": "d"},
    "rewards": [{"name": "format"}],
}  # fmt: skip


def test_an_alarm_that_is_on_is_fatal_for_a_resumed_run_that_lists_it():
    before = Guards(Options())
    assert before.logged(1, {"t2i/kl": 5.0})[1]
    saved = json.loads(json.dumps(jsonable(before.state())))
    for fatal, ends in (([], False), (["entropy"], False), (["kl"], True)):
        resumed = Guards(Options(fatal=fatal))
        resumed.restore(saved)
        _, lines = resumed.logged(2, {"t2i/kl": 5.0})
        assert bool(lines) == ends
        if ends:
            with pytest.raises(GuardError, match="fatal lists it"):
                resumed.require(lines)


@pytest.mark.parametrize(
    ("tree", "part"),
    [
        (
            {"guards": {"fatal": ["entropy"], "entropy": None}},
            "guards.fatal: found entropy, but guards.entropy is null",
        ),
        (
            {"guards": {"step_timeout_s": 60.0}, "rewards": [{"use": "f.py:judge"}]},
            "guards.step_timeout_s: 60 is not above the 61 s that the rewards judge may take",
        ),
        (
            {
                "guards": {"step_timeout_s": 120.0},
                "rewards": [{"use": "f.py:judge"}, {"name": "format"}, {"use": "f.py:critic"}],
            },
            "120 is not above the 122 s that the rewards judge and critic may take",
        ),
        ({"guards": {"fatal": ["klx"]}}, "guards.fatal"),
    ],
)
def test_guards_that_contradict_other_options_are_refused(tree, part):
    with pytest.raises(InputError) as error:
        config_files.validate(BASE | tree, "test")
    assert any(part in problem for problem in error.value.problems), error.value.problems


@pytest.mark.parametrize(
    ("tree", "found", "reader"),
    [
        ({"guards": {"kl": 0.5}}, "guards.kl: 0.5", "algorithm.kl_coef above 0"),
        ({"guards": {"fatal": ["kl"]}}, "guards.fatal: 'kl'", "algorithm.kl_coef above 0"),
        ({"guards": {"held_out": 2.0}}, "guards.held_out: 2.0", "an eval.suite other than none"),
        (
            {"guards": {"duplicates": 0.1}, "algorithm": {"tasks": "mm2t"}},
            "guards.duplicates: 0.1", "the task t2i",
        ),
        (
            {"guards": {"max_failed_reward_fraction": 0.1}},
            "guards.max_failed_reward_fraction: 0.1", "a reward by `use`",
        ),
        (
            {"guards": {"drift_max": 1.0}, "stage": "sft", "rewards": []},
            "guards.drift_max: 1.0", "a stage with rollouts",
        ),
    ],
)  # fmt: skip
def test_guards_that_have_nothing_to_watch_are_reported(tree, found, reader):
    lines = find_idle_options(config_files.validate(BASE | tree, "test"))
    assert f"{found} has no effect; only {reader} reads it" in lines


def test_the_watchdog_waits_for_all_rewards_together():
    rewards = [{"use": "f.py:judge"}, {"use": "f.py:critic"}]
    tree = BASE | {"guards": {"step_timeout_s": 123.0}, "rewards": rewards}
    config_files.validate(tree, "test")


def test_any_guard_may_be_switched_off_and_every_fatal_one_has_a_limit():
    off = dict.fromkeys([*RULES, "held_out", "step_timeout_s"])
    config_files.validate(BASE | {"guards": off}, "test")
    assert Options().max_skipped_updates == 3
