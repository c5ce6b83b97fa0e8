"""Guards over hand-made series: when each one speaks, how often, and what a resume remembers."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest

from corl_jax.config import files as config_files
from corl_jax.config.guard_limits import Guards as Options
from corl_jax.config.readers import find_unused_options
from corl_jax.errors import GuardError, InputError, RewardError
from corl_jax.evaluation import shapes
from corl_jax.runs.directory import to_json
from corl_jax.runs.guards import FAILED_WINDOW, UNREWARDED_STEPS, WINDOW, Guards, Update
from corl_jax.train.alarms import ALARMS, list_alarms, make_guards
from corl_jax.train.rollout_metrics import count_duplicates, measure_group_difference

GOOD = Update(False, loss=1.0, grad_norm=2.0, parts={"t2i/loss": 1.0, "mm2t/loss": 0.1})
BAD = Update(True, math.nan, math.inf, {"t2i/loss": math.nan, "mm2t/loss": 0.1})


def said(watched: Guards, name: str, series: list[float], key: str) -> list[int]:
    """The logged steps (from 1) at which the alarm begins."""
    found = []
    for step, value in enumerate(series, 1):
        metrics, lines = watched.check_logged(step, {key: value})
        assert all(line.startswith(f"alarm {name} at step {step}: {key} ") for line in lines)
        assert not lines or metrics[f"alarm/{name}"] == 1
        found += [step] * len(lines)
    return found


# ---- updates


def test_skipped_updates_in_a_row_end_the_run():
    watched = make_guards(Options(max_skipped_updates=3))
    for step, updates in enumerate([[BAD, BAD], [GOOD, BAD], [BAD, GOOD], [BAD]], 1):
        watched.check_step(step, updates)
    with pytest.raises(GuardError) as error:
        watched.check_step(5, [BAD, BAD])  # the third in a row is the second of this step
    for part in ("step 5: 3 update(s)", "loss nan", "norm inf", "not finite: t2i/loss. "):
        assert part in str(error.value)
    assert watched.skipped == 7


def test_a_derivative_that_is_not_finite_is_told_from_a_loss():
    watched = make_guards(Options(max_skipped_updates=1))
    with pytest.raises(GuardError, match=r"no part of the loss, so it is a derivative"):
        watched.check_step(1, [dataclasses.replace(GOOD, skipped=True, grad_norm=math.nan)])


def test_skipped_updates_are_counted_between_logged_steps():
    watched = make_guards(Options())
    watched.check_step(1, [BAD, GOOD])
    watched.check_step(2, [BAD])
    counts = [watched.check_logged(2, {})[0], watched.check_logged(3, {})[0]]
    assert [one["update/skipped"] for one in counts] == [2, 0]
    assert [one["update/skipped_total"] for one in counts] == [2, 2]


# ---- rewards


def test_a_reward_that_fails_too_often_ends_the_run():
    """Never twice in a row, so that `max_failures` alone would let it go on for ever."""
    watched = make_guards(Options(max_failed_reward_fraction=0.4))
    name = "judge of mm2t"
    for step in range(1, FAILED_WINDOW):
        watched.check_step(step, [], {name: step % 2, "critic of mm2t": 0.1})
    with pytest.raises(RewardError, match=rf"step {FAILED_WINDOW}: reward {name} failed on 50%"):
        watched.check_step(FAILED_WINDOW, [], {name: 0.0})
    tolerant = make_guards(Options(max_failed_reward_fraction=0.5))
    for step in range(1, 100):
        tolerant.check_step(step, [], {name: step % 2})


def unrewarded(watched: Guards, shares: list[float], is_last: bool = False) -> None:
    for step, share in enumerate(shares, 1):
        is_end = is_last and step == len(shares)
        watched.check_step(step, [], unrewarded=share, is_last=is_end)


def test_a_run_in_which_no_reward_ever_applies_ends():
    with pytest.raises(GuardError, match=rf"step {UNREWARDED_STEPS}: no reward has applied"):
        unrewarded(make_guards(Options()), [1.0] * UNREWARDED_STEPS)
    with pytest.raises(GuardError, match=r"step 3: .* of the 3 step\(s\) of this run"):
        unrewarded(make_guards(Options()), [1.0] * 3, is_last=True)
    unrewarded(make_guards(Options()), [1.0, 0.99, *[1.0] * 50], is_last=True)
    unrewarded(make_guards(Options(not_applicable=None)), [1.0] * 50, is_last=True)


def test_a_run_without_rewards_counts_on_when_it_is_resumed():
    before, after = make_guards(Options()), make_guards(Options())
    unrewarded(before, [1.0] * (UNREWARDED_STEPS - 1))
    after.restore(json.loads(json.dumps(to_json(before.get_state()))))
    with pytest.raises(GuardError):
        unrewarded(after, [1.0])
    old = {key: value for key, value in before.get_state().items() if key != "unrewarded"}
    earlier = make_guards(Options())
    earlier.restore(old)  # a checkpoint of a version that did not count them
    unrewarded(earlier, [1.0])


# ---- alarms


def test_completions_without_a_reward_are_an_alarm():
    share = {"not_applicable": 0.4, "mm2t/not_applicable": 0.8, "t2i/not_applicable": 0.0}
    watched = make_guards(Options())
    lines = [watched.check_logged(step, share)[1] for step in range(1, 13)]
    assert [bool(said) for said in lines] == [step == WINDOW for step in range(1, 13)]
    assert "mm2t/not_applicable 0.8, above 0.5" in lines[WINDOW - 1][0]
    with pytest.raises(GuardError, match=r"guards\.fatal lists it"):
        make_guards(Options(fatal=["not_applicable"])).require_none_fatal(lines[WINDOW - 1])


def test_a_reward_that_never_applies_is_an_alarm_beside_others_that_do():
    """One that applies to few rows is none."""
    watched = make_guards(Options())
    for step in range(1, 30):
        values = {
            "not_applicable": 0.0,
            "mm2t/rewards/judge/not_applicable": 1.0,
            "mm2t/rewards/rare/not_applicable": 1.0 if step % 9 else 0.98,
        }
        metrics, lines = watched.check_logged(step, values)
        assert bool(lines) == (step == WINDOW), (step, lines)
        if lines:
            assert "mm2t/rewards/judge/not_applicable 1, above" in lines[0]
            assert "rare" not in lines[0]
    assert metrics["alarm/not_applicable"] == 1.0


def test_a_reward_that_never_applies_is_said_at_the_end_of_a_short_run():
    values = {"not_applicable": 0.0, "t2i/rewards/judge/not_applicable": 1.0}
    watched = make_guards(Options())
    lines = [watched.check_logged(step, values, is_last=step == 3)[1] for step in (1, 2, 3)]
    assert [len(said) for said in lines] == [0, 0, 1]
    used = make_guards(Options())
    used.check_logged(1, values | {"t2i/rewards/judge/not_applicable": 0.9})
    assert not used.check_logged(2, values, is_last=True)[1]


def test_steps_without_a_reward_say_nothing_of_the_spread():
    watched = make_guards(Options())
    for step in range(1, 25):
        assert not watched.check_logged(step, {"frac_reward_zero_std": math.nan})[1]
    assert said(watched, "zero_spread", [1.0] * WINDOW, "frac_reward_zero_std") == [WINDOW]


@pytest.mark.parametrize("name", ["kl", "drift_mean", "drift_max", "drift_steps"])
def test_an_alarm_is_said_once_per_crossing(name):
    (key,) = [alarm.keys[1] for alarm in ALARMS if alarm.name == name]
    limit = getattr(Options(), name)
    low, high = limit, 1.01 * limit
    quiet = [low] * WINDOW
    series = [low, high, high, low, high, *quiet, high, math.nan, *quiet, math.nan]
    assert said(make_guards(Options()), name, series, key) == [2, 16, 28]


@pytest.mark.parametrize(
    ("name", "key"),
    [("duplicates", "t2i/duplicate_fraction"), ("zero_spread", "frac_reward_zero_std")],
)
def test_shares_are_averaged_so_that_one_batch_says_nothing(name, key):
    limit = getattr(Options(), name)
    one_off = [1.0, *[limit / 2] * WINDOW] * 3
    assert said(make_guards(Options()), name, one_off, key) == []
    assert said(make_guards(Options()), name, [limit] * 30 + [1.0] * 30, key) == [31]
    assert said(make_guards(Options()), name, [1.0] * 9, key) == []  # too few to say


def test_entropy_is_compared_with_the_runs_own_beginning():
    for scale in (0.02, 9.0):
        falling = [scale] * 15 + [0.05 * scale] * 20
        # The mean of ten falls below a tenth of the first ones with the tenth low value.
        assert said(make_guards(Options()), "entropy", falling, "mm2t/entropy") == [25]
        assert said(make_guards(Options()), "entropy", [scale] * 40, "mm2t/entropy") == []
    assert said(make_guards(Options(entropy=None)), "entropy", falling, "mm2t/entropy") == []


def test_both_tasks_are_watched_and_named():
    values = {"t2i/kl": 3.0, "mm2t/kl": 2.0}
    ((line,), metrics) = make_guards(Options(kl=1.5)).check_logged(7, values)[::-1]
    assert "t2i/kl 3 and mm2t/kl 2, above 1.5" in line and metrics["alarm/kl"] == 1
    assert "alarm/duplicates" not in metrics  # nothing was drawn


def test_only_listed_alarms_are_fatal():
    line = "alarm kl at step 3: t2i/kl 4, above 1"
    make_guards(Options(fatal=["drift_mean"])).require_none_fatal([line])
    make_guards(Options(fatal=["kl"])).require_none_fatal([])
    with pytest.raises(GuardError, match=r"guards\.fatal lists it"):
        make_guards(Options(fatal=["kl"])).require_none_fatal([line])


# ---- evaluations


def run_of(watched: Guards, rewards: list[float], scores: list[float], error=0.01) -> list[int]:
    """Evaluations (from 0) that begin an alarm; five steps of each reward lie before each."""
    begins = []
    for number, score in enumerate(scores):
        if number:
            for step in range(5):
                watched.check_logged(5 * number + step, {"reward": rewards[number - 1]})
        metrics, lines = watched.check_evaluation(5 * number, {"eval/t2i/clip": (score, error)})
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
    assert run_of(make_guards(Options()), rewards, scores) == begins
    assert run_of(make_guards(Options()), rewards, scores, error=1.0) == []


def test_scores_of_the_drawn_world_are_its_two_accuracies():
    names = ("draw/accuracy", "draw/counting", "answer/accuracy")
    rates = {name: shapes.Rate(0.5, 0.4, 0.6, 10) for name in names}
    report = shapes.ShapesReport(rates, np.zeros((0, 8, 8, 3), np.uint8), [], [], [])
    scores = report.scores()
    assert scores.keys() == {"eval/draw/accuracy", "eval/answer/accuracy"}
    assert scores["eval/draw/accuracy"] == (0.5, pytest.approx(0.2 / (2 * 1.959963984540054)))
    rates["answer/accuracy"] = shapes.Rate.of(0, 0)
    assert report.scores().keys() == {"eval/draw/accuracy"}


def test_a_score_that_is_not_finite_is_left_out():
    watched = make_guards(Options())
    for pair in ((math.nan, 0.1), (0.5, math.nan)):
        assert watched.check_evaluation(1, {"eval/a": pair}) == ({}, [])


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
        watched.check_step(step, [GOOD, BAD][step % 2 :], {"r of t2i": step % 3 == 0})
        found = [watched.check_logged(step, series[step])]
        if step % 7 == 0:
            found.append(watched.check_evaluation(step, {"eval/a": (-0.01 * step, 0.001)}))
        return found

    straight = make_guards(Options())
    expected = [look(straight, step) for step in range(60)]
    assert sum(bool(lines) for step in expected for _, lines in step) >= 5
    for cut in (1, 9, 25, 44):
        before, after = make_guards(Options()), make_guards(Options())
        found = [look(before, step) for step in range(cut)]
        after.restore(json.loads(json.dumps(to_json(before.get_state()), allow_nan=False)))
        found += [look(after, step) for step in range(cut, 60)]
        assert found == expected, cut


# ---- metrics and options


def test_duplicates_are_counted_within_groups():
    tokens = np.arange(24).reshape(8, 3)
    tokens[1] = tokens[0]  # one of group 0
    tokens[6] = tokens[7] = tokens[4]  # two of group 1
    tokens[3, 0] = tokens[2, 0]  # a token alone is no duplicate
    assert count_duplicates(tokens, 4) == pytest.approx(3 / 8)
    assert count_duplicates(tokens, 2) == pytest.approx(2 / 8)


def test_the_difference_within_groups_is_a_mean_over_pairs():
    tokens = np.array([[1, 2], [1, 2], [1, 3], [4, 5], [6, 7], [4, 8]])
    # Group 1: pairs differ at 0, 1 and 1 of 2 places. Group 2: at 2, 1 and 2.
    assert measure_group_difference(tokens, 3) == pytest.approx((0 + 1 + 1 + 2 + 1 + 2) / (6 * 2))
    assert measure_group_difference(tokens[:3] * 0, 3) == 0
    assert np.isnan(measure_group_difference(tokens, 1))


BASE = {
    "output_dir": "x", "model": {"path": "m"}, "data": {"path": "d"},
    "rewards": [{"name": "format"}],
}  # fmt: skip


def test_an_alarm_that_is_on_is_fatal_for_a_resumed_run_that_lists_it():
    before = make_guards(Options())
    assert before.check_logged(1, {"t2i/kl": 5.0})[1]
    saved = json.loads(json.dumps(to_json(before.get_state())))
    for fatal, ends in (([], False), (["entropy"], False), (["kl"], True)):
        resumed = make_guards(Options(fatal=fatal))
        resumed.restore(saved)
        _, lines = resumed.check_logged(2, {"t2i/kl": 5.0})
        assert bool(lines) == ends
        if ends:
            with pytest.raises(GuardError, match="fatal lists it"):
                resumed.require_none_fatal(lines)


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
        (
            {"guards": {"held_out": 2.0}},
            "guards.held_out: 2.0", "an eval.suite other than none, or eval.suites",
        ),
        (
            {"guards": {"duplicates": 0.1}, "algorithm": {"tasks": "mm2t"}},
            "guards.duplicates: 0.1", "a task that makes images",
        ),
        (
            {"guards": {"max_failed_reward_fraction": 0.1}},
            "guards.max_failed_reward_fraction: 0.1", "a reward by `use` or by http",
        ),
        (
            {"guards": {"drift_max": 1.0}, "stage": "sft", "rewards": []},
            "guards.drift_max: 1.0", "a stage with rollouts",
        ),
    ],
)  # fmt: skip
def test_guards_that_have_nothing_to_watch_are_reported(tree, found, reader):
    lines = find_unused_options(config_files.validate(BASE | tree, "test"))
    assert f"{found} has no effect; only {reader} reads it" in lines


def test_the_watchdog_waits_for_all_rewards_together():
    rewards = [{"use": "f.py:judge"}, {"use": "f.py:critic"}]
    tree = BASE | {"guards": {"step_timeout_s": 123.0}, "rewards": rewards}
    config_files.validate(tree, "test")


def test_any_guard_may_be_switched_off_and_every_fatal_one_has_a_limit():
    off = dict.fromkeys([*(alarm.name for alarm in ALARMS), "held_out", "step_timeout_s"])
    config = config_files.validate(BASE | {"guards": off}, "test")
    assert not list_alarms(config.guards)
    assert Options().max_skipped_updates == 3
