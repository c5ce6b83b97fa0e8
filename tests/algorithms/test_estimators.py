"""Each algorithm's advantages against numbers computed in float64, and identities between them."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from corl_jax.algorithms.advantages import ADVANTAGE_MODES, AdvantageOptions, RewardInputs
from corl_jax.algorithms.estimators import (
    compute_group_advantages,
    compute_rloo_advantages,
    divide_by_spread,
)
from corl_jax.algorithms.recipes import RECIPES

NAN = np.nan
REWARDS = np.array([0.1, 0.9, 0.4, 0.7, 2.0, -1.0, 0.5, 0.25], np.float32)
GREEDY = np.array([0.5, 0.3], np.float32)
GROUP = 4
CENTRED = [-0.425, 0.375, -0.125, 0.175, 1.5625, -1.4375, 0.0625, -0.1875]
LEAVE_ONE_OUT = [
    -0.5666666667, 0.5, -0.1666666667, 0.2333333333,
    2.083333333, -1.916666667, 0.08333333333, -0.25,
]  # fmt: skip
AGAINST_GREEDY = [-0.4, 0.4, -0.1, 0.2, 1.7, -1.3, 0.2, -0.05]
# (recipe, scale) -> advantages of REWARDS in groups of 4.
NUMBERS = {
    ("grpo", "group"): [
        -1.213938875, 1.071122536, -0.3570408455, 0.4998571837,
        1.269079622, -1.167553252, 0.05076318488, -0.1522895546,
    ],
    ("dr_grpo", "none"): CENTRED,
    ("rloo", "none"): LEAVE_ONE_OUT,
    ("remax", "none"): AGAINST_GREEDY,
}  # fmt: skip
GROUP_RECIPES = [name for name, recipe in RECIPES.items() if recipe.min_group_size > 1]


def compare(name, rewards, greedy=None, penalties=None, **changes):
    """Returns the advantages of a recipe by task, of rewards [F, N] by task."""
    weights = {task: (1.0,) * len(values) for task, values in rewards.items()}
    options = {
        "reward_weights": tuple(weights.items()),
        "task_weights": (("t2i", 1.0), ("mm2t", 0.8)),
        "mode": "unified_reward", "group_size": GROUP, "scale": RECIPES[name].scales[0],
    } | changes  # fmt: skip
    inputs = RewardInputs(rewards, greedy, penalties)
    found, _ = RECIPES[name].advantages(inputs, AdvantageOptions(**options))
    return {task: np.asarray(values) for task, values in found.items()}


def compare_images(name, rewards=REWARDS, greedy=GREEDY, **changes):
    """Returns the advantages of a recipe for one task with one reward."""
    greedy = {"t2i": greedy[None]}
    return compare(name, {"t2i": np.float32(rewards)[None]}, greedy, **changes)["t2i"]


# ---- numbers


@pytest.mark.parametrize(("name", "scale"), NUMBERS)
def test_advantages_are_the_numbers(name, scale):
    found = compare_images(name, scale=scale)
    np.testing.assert_allclose(found, NUMBERS[name, scale], rtol=2e-5, atol=1e-7)


def test_other_libraries_divide_by_the_number_of_rewards():
    """Flow-GRPO and PromptRL: ddof 0, for the std of the group or of the batch."""
    of_group = [
        -1.401673936, 1.23677112, -0.4122570399, 0.5771598558,
        1.46538851, -1.348157429, 0.05861554041, -0.1758466212,
    ]  # fmt: skip
    of_batch = [
        -0.5413384904, 0.4776516092, -0.1592172031, 0.2229040843,
        1.990215038, -1.830997835, 0.07960860153, -0.2388258046,
    ]  # fmt: skip
    for scale, numbers in (("group", of_group), ("batch", of_batch)):
        found = compare_images("grpo", scale=scale, ddof=0)
        np.testing.assert_allclose(found, numbers, rtol=2e-6, atol=1e-7)


def test_a_missing_reward_does_not_count_without_degrees_of_freedom():
    rewards = np.float32([1.0, NAN, 3.0, 8.0, 2.0, 2.0, 2.0, 2.0])
    deviations = np.array([-3.0, 0.0, -1.0, 4.0, 0, 0, 0, 0])
    valid = rewards[~np.isnan(rewards)].astype(np.float64)
    for scale, std in (("group", valid[:3].std()), ("batch", valid.std())):
        found = compare_images("grpo", rewards, scale=scale, ddof=0)
        np.testing.assert_allclose(found, deviations / (std + 1e-4), rtol=1e-5)


def test_reinforce_pp_compares_with_the_whole_batch():
    centred = REWARDS.astype(np.float64) - REWARDS.mean()
    expected = centred / (REWARDS.astype(np.float64).std(ddof=1) + 1e-4)
    np.testing.assert_allclose(compare_images("reinforce_pp"), expected, rtol=1e-5)
    # Groups play no part.
    alone = compare_images("reinforce_pp", group_size=1)
    np.testing.assert_allclose(alone, expected, rtol=1e-5)
    unscaled = compare_images("reinforce_pp", scale="none")
    np.testing.assert_allclose(unscaled, centred, rtol=1e-5, atol=1e-7)


def test_leave_one_out_divided_by_the_std_of_the_batch():
    expected = np.array(LEAVE_ONE_OUT) / (np.std(LEAVE_ONE_OUT, ddof=1) + 1e-4)
    np.testing.assert_allclose(compare_images("rloo", scale="batch"), expected, rtol=1e-5)


def test_remax_divided_by_its_size_keeps_its_baseline():
    expected = np.array(AGAINST_GREEDY) / (np.sqrt(np.sum(np.square(AGAINST_GREEDY)) / 7) + 1e-4)
    np.testing.assert_allclose(compare_images("remax", scale="batch"), expected, rtol=1e-5)
    # All as far below their greedy completion: still below, and no division by a std of 0.
    worse = compare_images("remax", np.repeat(GREEDY - 0.25, GROUP), scale="batch")
    np.testing.assert_allclose(worse, -0.25 / (0.25 * np.sqrt(8 / 7) + 1e-4), rtol=1e-5)


def test_gdpo_adds_normalised_rewards_and_divides_by_their_std():
    second = np.array([3.0, 1.0, 1.0, 2.0, 10.0, 30.0, 20.0, 20.0], np.float32)
    found = compare("gdpo", {"t2i": np.stack([REWARDS, second])})["t2i"]
    total = np.zeros(8)
    for values in (REWARDS, second):
        groups = values.astype(np.float64).reshape(2, 4)
        centred = groups - groups.mean(axis=1, keepdims=True)
        total += (centred / (groups.std(axis=1, ddof=1, keepdims=True) + 1e-4)).reshape(-1)
    np.testing.assert_allclose(found, total / (total.std(ddof=1) + 1e-4), rtol=1e-4, atol=1e-6)


def test_a_penalty_on_normalised_rewards_moves_no_whole_group():
    penalties = np.repeat(np.float32([0.0, 5.0]), GROUP)
    rewards = {"t2i": REWARDS[None]}
    found = compare("gdpo", rewards, penalties={"t2i": penalties})["t2i"]
    np.testing.assert_allclose(found, compare("gdpo", rewards)["t2i"], rtol=1e-5, atol=1e-6)
    penalties = np.float32([1, 0, 0, 0, 0, 0, 0, 0])
    assert compare("gdpo", rewards, penalties={"t2i": penalties})["t2i"][0] < found[0]


# ---- identities


def test_leave_one_out_is_the_centred_reward_times_g_over_g_minus_one():
    rng = np.random.default_rng(0)
    for group in (2, 3, 8):
        rewards = jnp.asarray(rng.normal(size=4 * group), jnp.float32)
        centred = compute_group_advantages(rewards, group, scale="none")
        found = compute_rloo_advantages(rewards, group)
        np.testing.assert_allclose(found, centred * group / (group - 1), rtol=1e-5, atol=1e-6)
        groups = np.asarray(rewards, np.float64).reshape(4, group)
        others = (groups.sum(axis=1, keepdims=True) - groups) / (group - 1)
        np.testing.assert_allclose(found, (groups - others).reshape(-1), rtol=1e-4, atol=1e-5)


def test_leave_one_out_leaves_missing_rewards_out():
    rewards = np.float32([1.0, 2.0, 6.0, 4.0, NAN, 5.0, NAN, NAN, 3.0])
    expected = [1 - 4, 2 - 3.5, 6 - 1.5, 4 - 5, 0, 5 - 4, 0, 0, 0]
    found = compute_rloo_advantages(jnp.asarray(rewards), 3)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    # Neither the missing rows nor the row without others count in the std of the batch.
    compared = [-3.0, -1.5, 4.5, -1.0, 1.0]
    divided = compare_images("rloo", rewards, group_size=3, scale="batch")
    np.testing.assert_allclose(
        divided, np.array(expected) / (np.std(compared, ddof=1) + 1e-4), rtol=1e-5
    )


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("mode", ADVANTAGE_MODES)
def test_missing_rewards_get_no_advantage_and_change_no_others(name, mode):
    """Row 1 lacks a text reward and row 6 an image reward."""
    images = np.float32([[1, 2, 3, 5, 0, 1, NAN, 1]])
    texts = np.float32([[0, 1, 1, 0, 1, 0, 1, 1], [1, NAN, 0, 0, NAN, NAN, NAN, NAN]])
    greedy = {"t2i": np.float32([[1, 1]]), "mm2t": np.float32([[1, 0], [1, NAN]])}
    rewards = {"t2i": images, "mm2t": texts}
    found = compare(name, rewards, greedy, mode=mode)
    values = np.stack([found["t2i"], found["mm2t"]])
    assert np.isfinite(values).all() and values.any(axis=1).all()
    if mode == "unified_reward":
        assert not values[:, [1, 6]].any()
    if mode == "separate":
        assert not values[0, 6] and not values[1, 1]
    if mode != "separate":
        np.testing.assert_array_equal(values[0], values[1])


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("task", ["t2i", "mm2t"])
def test_one_task_has_the_advantages_of_its_rewards_in_every_mode(name, task):
    greedy = {task: GREEDY[None]}
    found = [
        compare(name, {task: REWARDS[None]}, greedy, mode=mode)[task] for mode in ADVANTAGE_MODES
    ]
    for values in found:
        np.testing.assert_array_equal(values, compare_images(name))


@pytest.mark.parametrize("name", RECIPES)
def test_two_tasks_are_joined_before_or_after_the_comparison(name):
    texts = np.float32([0, 1, 1, 0, 1, 0.5, 0, 0])
    rewards = {"t2i": REWARDS[None], "mm2t": texts[None]}
    zeros = np.zeros(2, np.float32)
    greedy = {"t2i": GREEDY[None], "mm2t": zeros[None]}
    images, answers = compare_images(name), compare_images(name, texts, zeros)
    apart = compare(name, rewards, greedy, mode="separate")
    np.testing.assert_allclose(apart["t2i"], images, rtol=1e-6)
    np.testing.assert_allclose(apart["mm2t"], answers, rtol=1e-6)
    after = compare(name, rewards, greedy, mode="unified_advantage")
    np.testing.assert_allclose(after["t2i"], images + 0.8 * answers, rtol=1e-5, atol=1e-6)
    if name != "gdpo":  # which normalises each reward before they are added
        before = compare(name, rewards, greedy)
        expected = compare_images(name, REWARDS + np.float32(0.8) * texts, GREEDY)
        np.testing.assert_allclose(before["t2i"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", GROUP_RECIPES)
@pytest.mark.parametrize("mode", ADVANTAGE_MODES)
def test_groups_with_equal_rewards_get_exactly_nothing(name, mode):
    """Beside a group that differs; the mean of the batch is not 0 to the last bit."""
    rng = np.random.default_rng(1)
    varied = rng.normal(size=12).astype(np.float32)
    rewards = {
        "t2i": np.concatenate([np.full(4, 0.1, np.float32), varied])[None],
        "mm2t": np.concatenate([np.full(4, 1 / 3, np.float32), varied[::-1]])[None],
    }
    for scale in RECIPES[name].scales:
        for values in compare(name, rewards, mode=mode, scale=scale).values():
            np.testing.assert_array_equal(values[:4], np.zeros(4))
            assert (values[4:] != 0).all()


@pytest.mark.parametrize("scale", RECIPES["remax"].scales)
def test_the_greedy_completion_itself_has_advantage_zero(scale):
    rewards = REWARDS.copy()
    rewards[[2, 5]] = GREEDY  # one of each group
    found = compare_images("remax", rewards, scale=scale)
    assert found[2] == found[5] == 0 and (np.delete(found, [2, 5]) != 0).all()
    texts = np.float32([1, 0, 1, 0, 0, 1, 1, 0])
    both = {"t2i": rewards[None], "mm2t": texts[None]}
    greedy = {"t2i": GREEDY[None], "mm2t": np.float32([[1, 1]])}
    for values in compare("remax", both, greedy, scale=scale).values():
        assert values[2] == values[5] == 0


def test_remax_with_one_completion_per_prompt():
    found = compare_images("remax", np.float32([0.7, 0.1]), group_size=1)
    np.testing.assert_allclose(found, [0.2, -0.2], rtol=1e-5)


def test_remax_without_greedy_rewards_is_refused():
    with pytest.raises(ValueError, match="rewards of greedy completions"):
        compare("remax", {"t2i": REWARDS[None]})


@pytest.mark.parametrize("name", RECIPES)
def test_a_penalty_lowers_the_rewards_that_are_compared(name):
    penalty = np.float32([0.2, 0, 0, 0, 0, 0, 0, 0.1])
    greedy = {"t2i": GREEDY[None]}
    found = compare(name, {"t2i": REWARDS[None]}, greedy, {"t2i": penalty})["t2i"]
    if name != "gdpo":
        np.testing.assert_allclose(found, compare_images(name, REWARDS - penalty), rtol=1e-5)
    without = compare_images(name)
    assert found[0] < without[0] and found[7] < without[7]


def test_a_spread_of_nothing_divides_nothing():
    zeros, some = jnp.zeros(3), jnp.array([True, False, False])
    np.testing.assert_array_equal(divide_by_spread(zeros, some), zeros)
    np.testing.assert_array_equal(divide_by_spread(zeros, ~some & False), zeros)
