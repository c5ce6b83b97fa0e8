"""Each algorithm's loss against numbers computed in float64, and identities between gradients."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from corl_jax.algorithms import losses
from corl_jax.algorithms.divergences import estimate_kl
from corl_jax.algorithms.losses import (
    CLIPPED_POLICY_LOSS,
    LossConstants,
    LossInputs,
    make_policy_loss,
    weigh_by_entropy,
)
from corl_jax.algorithms.ratios import MAX_LOG_RATIO
from corl_jax.algorithms.recipes import RECIPES

LOGPROBS = jnp.array([[-1.0, -0.5, -2.0], [-0.2, -1.5, -0.7]])
OLD = jnp.array([[-1.1, -0.9, -1.9], [-0.25, -1.2, -0.7]])
REF = jnp.array([[-1.2, -0.6, -1.7], [-0.3, -1.4, -0.9]])
MASK = jnp.array([[1, 1, 1], [1, 1, 0]], bool)
ADVANTAGES = jnp.array([1.2, -0.8])
GSPO, CISPO, RLOO, REMAX = (RECIPES[name].loss for name in ("gspo", "cispo", "rloo", "remax"))
# (loss, constants that differ from the default) -> its value
NUMBERS = {
    "grpo": (CLIPPED_POLICY_LOSS, {}, -0.2717474479),
    "grpo + k3": (CLIPPED_POLICY_LOSS, {"kl_coef": 0.04}, -0.2711578514),
    "bnpo": (CLIPPED_POLICY_LOSS, {"reduction": "token_mean"}, -0.4741986252),
    "dr_grpo": (CLIPPED_POLICY_LOSS, {"reduction": "constant"}, -0.3951655210),
    "dapo": (CLIPPED_POLICY_LOSS, {"reduction": "token_mean", "clip_high": 0.28}, -0.4933986252),
    "gspo, wide": (GSPO, {"clip_low": 0.1, "clip_high": 0.1}, -0.3),
    "gspo": (GSPO, {"clip_low": 3e-4, "clip_high": 4e-4}, -0.20036),
    "cispo, 5": (CISPO, {"reduction": "token_mean", "clip_high": 4.0}, 0.6671448967),
    "cispo, 1.2": (CISPO, {"reduction": "token_mean", "clip_high": 0.2}, 0.6321259329),
    "rloo": (RLOO, {}, -0.4),
    "remax": (REMAX, {"reduction": "token_mean"}, 0.568),
}


def inputs(**changes):
    arrays = {
        "logprobs": LOGPROBS, "mask": MASK, "advantages": ADVANTAGES, "old_logprobs": OLD,
        "ref_logprobs": REF,
    }  # fmt: skip
    return LossInputs(**arrays | changes)


def compute(loss, constants=None, **changes):
    """Returns the loss: sum over count."""
    total, count, _ = loss.compute(inputs(**changes), LossConstants(**constants or {}))
    return total / count


def differentiate(loss, constants=None, **changes):
    """Returns the gradient [N, T] in the log-probs."""
    logprobs = changes.pop("logprobs", LOGPROBS)
    return jax.grad(lambda x: compute(loss, constants, logprobs=x, **changes))(logprobs)


# ---- numbers


@pytest.mark.parametrize("case", NUMBERS)
def test_losses_are_the_numbers(case):
    loss, constants, expected = NUMBERS[case]
    assert float(compute(loss, constants)) == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize("name", RECIPES)
def test_defaults_of_a_recipe_are_those_of_its_numbers(name):
    recipe = RECIPES[name]
    found = (recipe.clip_low, recipe.clip_high, recipe.reductions[0])
    expected = {
        "dr_grpo": (0.2, 0.2, "constant"), "dapo": (0.2, 0.28, "token_mean"),
        "gspo": (3e-4, 4e-4, "sequence_mean"), "cispo": (1.0, 4.0, "token_mean"),
        "remax": (0.2, 0.2, "token_mean"), "reinforce_pp": (0.2, 0.2, "token_mean"),
    }  # fmt: skip
    assert found == expected.get(name, (0.2, 0.2, "sequence_mean"))


@pytest.mark.parametrize(
    ("token_loss", "expected"),
    [
        (losses.clip_mean_ratios, [1.142630812, 0.8824969026]),
        (losses.clip_sequence_ratios, [1.491824698, 0.7788007831]),
    ],
)
def test_ratios_of_whole_rows_are_the_numbers(token_loss, expected):
    log_ratio = jnp.where(MASK, LOGPROBS - OLD, 0.0)
    tokens = losses.Tokens(LOGPROBS, log_ratio, ADVANTAGES[:, None], MASK)
    _, ratio = token_loss(tokens, LossConstants())
    np.testing.assert_allclose(ratio, np.repeat(expected, 3).reshape(2, 3), rtol=1e-6)


def test_reinforce_of_whole_rows():
    """-A sum of log-probs, mean over rows: 1.42. Its gradient is RLOO's at the sampling policy."""
    constants = {"reduction": "constant"}  # which divides by rows times tokens
    assert 3 * float(compute(REMAX, constants)) == pytest.approx(1.42, rel=1e-6)
    np.testing.assert_allclose(
        differentiate(RLOO, old_logprobs=None), 3 * differentiate(REMAX, constants), rtol=1e-6
    )


# ---- gradients


def test_at_the_sampling_policy_values_coincide_and_gradients_do_not():
    """With ratio 1 every row has the loss -A; a token has A / (B n_i), or A / B in RLOO."""
    lengths, rows = MASK.sum(axis=1, keepdims=True), len(MASK)
    for loss in (CLIPPED_POLICY_LOSS, GSPO, RLOO):
        assert float(compute(loss, old_logprobs=None)) == pytest.approx(-0.2, rel=1e-6)
    whole = np.where(MASK, -ADVANTAGES[:, None] / rows, 0)
    np.testing.assert_allclose(differentiate(RLOO, old_logprobs=None), whole, rtol=1e-6)
    for loss in (CLIPPED_POLICY_LOSS, GSPO):
        found = differentiate(loss, old_logprobs=None)
        np.testing.assert_allclose(found, whole / lengths, rtol=1e-6)


@pytest.mark.parametrize("reduction", RECIPES["gspo"].reductions)
def test_gspo_and_grpo_have_one_gradient_at_the_sampling_policy(reduction):
    """For rows of any length, in every reduction: each token has the weight A."""
    found, expected = (
        differentiate(loss, {"reduction": reduction}, old_logprobs=OLD, logprobs=OLD)
        for loss in (GSPO, CLIPPED_POLICY_LOSS)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert (np.asarray(found)[MASK] != 0).all()


def test_gspo_and_grpo_part_away_from_the_sampling_policy():
    wide = {"clip_low": 1.0, "clip_high": 9.0}
    gspo = np.asarray(differentiate(GSPO, wide))
    ratios = np.array([1.142630812, 0.8824969026])
    expected = -np.asarray(ADVANTAGES) * ratios / (2 * np.asarray(MASK).sum(axis=1))
    np.testing.assert_allclose(gspo, np.where(MASK, expected[:, None], 0), rtol=1e-5)
    assert np.abs(gspo - differentiate(CLIPPED_POLICY_LOSS, wide)).max() > 0.01


def test_the_gradient_of_the_ratio_of_a_whole_row():
    wide = {"clip_low": 1.0, "clip_high": 9.0}
    expected = -np.asarray(ADVANTAGES) * np.array([1.491824698, 0.7788007831]) / 2
    found = differentiate(RLOO, wide)
    np.testing.assert_allclose(found, np.where(MASK, expected[:, None], 0), rtol=1e-5)
    # Clipped rows have none: 1.49 > 1.2 with A > 0, and 0.78 < 0.8 with A < 0.
    np.testing.assert_array_equal(differentiate(RLOO), np.zeros((2, 3)))


def test_cispo_bounds_the_weight_of_a_token_and_keeps_its_gradient():
    constants = {"reduction": "token_mean", "clip_high": 0.2}
    ratio = np.minimum(np.exp(np.asarray(LOGPROBS - OLD, np.float64)), 1.2)
    expected = -ratio * np.asarray(ADVANTAGES)[:, None] / 5
    found = differentiate(CISPO, constants)
    np.testing.assert_allclose(found, np.where(MASK, expected, 0), rtol=1e-5)
    clipped = differentiate(CLIPPED_POLICY_LOSS, constants)
    assert clipped[0, 1] == 0 and found[0, 1] != 0  # its ratio is 1.49


@pytest.mark.parametrize("name", RECIPES)
def test_no_advantage_is_exactly_no_gradient(name):
    recipe = RECIPES[name]
    for old in (OLD, None):
        constants = {
            "clip_low": recipe.clip_low, "clip_high": recipe.clip_high,
            "reduction": recipe.reductions[0],
        }  # fmt: skip
        found = differentiate(
            recipe.loss, constants, old_logprobs=old, advantages=jnp.array([0.0, 0.5])
        )
        np.testing.assert_array_equal(found[0], np.zeros(3))
        # The second ratio of a whole row, 0.78, is below all clip ranges but takes part: A > 0.
        assert (np.asarray(found[1, :2]) != 0).all() and found[1, 2] == 0


@pytest.mark.parametrize("name", RECIPES)
def test_padding_and_distant_policies_give_finite_gradients(name):
    far = jnp.where(MASK, LOGPROBS, -jnp.inf)
    old = jnp.where(MASK, jnp.array([[-300.0], [-0.1]]), jnp.nan)
    found = differentiate(RECIPES[name].loss, logprobs=far, old_logprobs=old)
    assert np.isfinite(found).all()
    assert not np.asarray(found)[~np.asarray(MASK)].any()


def test_a_sum_of_log_ratios_is_bounded():
    old, advantages = LOGPROBS - 15.0, -jnp.ones(2)
    wide = {"clip_low": 1.0, "clip_high": 9.0}
    found = float(compute(RLOO, wide, old_logprobs=old, advantages=advantages))
    assert found == pytest.approx(math.exp(MAX_LOG_RATIO), rel=1e-5)
    zero = differentiate(RLOO, wide, old_logprobs=old, advantages=advantages)
    np.testing.assert_array_equal(zero, np.zeros((2, 3)))


# ---- dual clip


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("ratio", [0.5, 1.0, 1.25, 2.9, 3.1, 50.0])
def test_dual_clip_by_hand(ratio, advantage):
    """PPO's minimum, and for A < 0 no less than c A (arXiv 1912.09729 eq. 5)."""
    clipped = min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
    expected = -(max(clipped, 3.0 * advantage) if advantage < 0 else clipped)
    changes = {
        "logprobs": jnp.log(jnp.full((1, 1), 0.5)), "advantages": jnp.full(1, advantage),
        "old_logprobs": jnp.log(jnp.full((1, 1), 0.5 / ratio)), "mask": jnp.ones((1, 1), bool),
        "ref_logprobs": None,
    }  # fmt: skip
    for loss in (CLIPPED_POLICY_LOSS, GSPO, RLOO):
        found = float(compute(loss, {"dual_clip": 3.0}, **changes))
        assert found == pytest.approx(expected, rel=1e-5)


# ---- KL


def test_kl_estimators_by_hand():
    difference = np.asarray(LOGPROBS - REF, np.float64)
    for name, expected in (
        ("k1", difference),
        ("k2", difference**2 / 2),
        ("k3", np.exp(-difference) + difference - 1),
    ):
        np.testing.assert_allclose(estimate_kl(LOGPROBS, REF, name), expected, rtol=1e-5)
    np.testing.assert_array_equal(estimate_kl(REF, REF, "k2"), np.zeros((2, 3)))


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_estimates_against_the_exact_divergence(estimator):
    """The mean of k1 and k3 under the policy is the divergence, that of k2 is only near."""
    policy, ref = np.array([0.5, 0.3, 0.2]), np.array([0.4, 0.35, 0.25])
    estimate = estimate_kl(jnp.log(policy), jnp.log(ref), estimator)
    exact = (policy * np.log(policy / ref)).sum()
    tolerance = 0.05 if estimator == "k2" else 1e-4
    assert float((policy * np.asarray(estimate)).sum()) == pytest.approx(exact, rel=tolerance)


def test_k2_in_the_loss_has_the_gradient_of_k1_in_the_reward_of_each_token():
    """ReMax subtracts the KL of a token from that token's return."""
    constants = {"kl_coef": 0.3, "kl_estimator": "k2", "reduction": "token_mean"}
    found = differentiate(REMAX, constants)
    returns = ADVANTAGES[:, None] - 0.3 * (LOGPROBS - REF)
    np.testing.assert_allclose(found, np.where(MASK, -returns / 5, 0), rtol=1e-5)


def test_k1_in_the_loss_pulls_nowhere():
    """Its gradient in logits, averaged over the policy's samples, is 0; that of k2 is KL's."""
    logits, ref = jnp.array([0.3, -1.0, 0.8]), jax.nn.log_softmax(jnp.array([0.0, 0.5, 1.0]))
    probabilities = jax.nn.softmax(logits)

    def penalty(logits, estimator):  # the samples come from a fixed policy
        return (probabilities * estimate_kl(jax.nn.log_softmax(logits), ref, estimator)).sum()

    def divergence(logits):
        return (jax.nn.softmax(logits) * (jax.nn.log_softmax(logits) - ref)).sum()

    np.testing.assert_allclose(jax.grad(penalty)(logits, "k1"), np.zeros(3), atol=1e-6)
    np.testing.assert_allclose(
        jax.grad(penalty)(logits, "k2"), jax.grad(divergence)(logits), rtol=1e-4, atol=1e-6
    )


def test_the_logged_divergence_is_never_negative_whatever_the_estimator():
    constants = LossConstants(kl_coef=0.1, kl_estimator="k1")
    swapped = inputs(logprobs=REF, ref_logprobs=LOGPROBS)
    _, _, metrics = CLIPPED_POLICY_LOSS.compute(swapped, constants)
    total, tokens = metrics["kl"]
    expected = np.where(MASK, np.exp(LOGPROBS - REF) - (LOGPROBS - REF) - 1, 0).sum()
    assert float(total) == pytest.approx(expected, rel=1e-5) and float(tokens) == 5


# ---- weights of tokens


def test_tokens_of_the_highest_entropy_of_each_row():
    entropy = jnp.array([[0.1, 0.9, 0.5, 9.0], [0.2, 0.2, 0.1, 0.3], [5.0, 5.0, 5.0, 5.0]])
    mask = jnp.array([[1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]], bool)
    for share, expected in (
        (0.01, [[0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]),  # at least one
        (0.5, [[0, 1, 1, 0], [1, 1, 0, 1], [0, 0, 0, 0]]),  # ties stay
        (0.75, [[1, 1, 1, 0], [1, 1, 0, 1], [0, 0, 0, 0]]),
    ):
        np.testing.assert_array_equal(weigh_by_entropy(entropy, mask, share), expected)


@pytest.mark.parametrize(("share", "tokens", "kept"), [(0.72, 700, 504), (0.1, 30, 3), (0.3, 7, 3)])
def test_a_share_is_rounded_up_but_not_by_rounding_errors(share, tokens, kept):
    entropy = jnp.arange(tokens, dtype=jnp.float32)[None]
    weights = weigh_by_entropy(entropy, jnp.ones((1, tokens), bool), share)
    assert float(weights.sum()) == kept


def test_weights_in_proportion_to_entropy_keep_the_mean_of_a_row():
    entropy = jnp.array([[1.0, 3.0, jnp.nan], [0.0, 0.0, 0.0]])
    mask = jnp.array([[1, 1, 0], [1, 1, 1]], bool)
    found = weigh_by_entropy(entropy, mask)
    np.testing.assert_array_equal(found, [[0.5, 1.5, 0], [1, 1, 1]])


@pytest.mark.parametrize("name", RECIPES)
def test_weights_act_on_the_gradient_of_their_tokens(name):
    """Also where one ratio stands for a row: a token left out has no gradient, others keep it."""
    recipe = RECIPES[name]
    constants = {"clip_low": 1.0, "clip_high": 9.0, "reduction": recipe.reductions[0]}
    weights = jnp.array([[0.0, 2.0, 1.0], [1.0, 0.0, 1.0]])
    found = differentiate(recipe.loss, constants, weights=weights)
    np.testing.assert_allclose(
        found, weights * differentiate(recipe.loss, constants), rtol=1e-5, atol=1e-8
    )


def test_the_kl_penalty_has_no_weights():
    constants = {"kl_coef": 0.5, "importance_cap": 2.0}
    changes = {"advantages": jnp.zeros(2), "sampler_logprobs": OLD + 0.3}
    plain = compute(CLIPPED_POLICY_LOSS, {"kl_coef": 0.5}, advantages=jnp.zeros(2))
    weighted = compute(CLIPPED_POLICY_LOSS, constants, weights=jnp.zeros((2, 3)), **changes)
    assert float(weighted) == pytest.approx(float(plain), rel=1e-6) and plain > 0


# ---- sampler and trainer


@pytest.mark.parametrize("name", RECIPES)
def test_the_importance_cap_by_hand(name):
    """min(old / sampler, 2) times each token's loss; without old log-probs the policy's own."""
    sampler = jnp.array([[-1.1, -2.9, -1.5], [-0.25, -1.0, jnp.nan]])
    recipe = RECIPES[name]
    constants = {"clip_low": 1.0, "clip_high": 9.0, "reduction": recipe.reductions[0]}
    for old in (OLD, None):
        trainer = np.asarray(LOGPROBS if old is None else old, np.float64)
        factor = np.minimum(np.exp(trainer - np.asarray(sampler)), 2.0)
        plain = differentiate(recipe.loss, constants, old_logprobs=old)
        found = differentiate(
            recipe.loss, constants | {"importance_cap": 2.0}, old_logprobs=old,
            sampler_logprobs=sampler,
        )  # fmt: skip
        np.testing.assert_allclose(found, np.where(MASK, factor, 0) * plain, rtol=1e-5)
    assert np.exp(-0.9 + 2.9) > 2  # so that the cap acts


def test_a_cap_without_a_sampler_is_refused():
    with pytest.raises(ValueError, match="importance_cap needs the log-probs of the sampler"):
        compute(CLIPPED_POLICY_LOSS, {"importance_cap": 2.0})


# ---- sums and counts


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean", "constant"])
def test_parts_of_a_batch_add_up(name, reduction):
    rng = np.random.default_rng(4)
    rows, tokens = 6, 5
    mask = np.arange(tokens) < np.array([5, 0, 1, 3, 2, 5])[:, None]
    arrays = {key: -rng.exponential(size=(rows, tokens)) for key in ("logprobs", "old_logprobs")}
    arrays |= {"ref_logprobs": -rng.exponential(size=(rows, tokens)), "mask": mask}
    arrays |= {"advantages": rng.normal(size=rows), "sampler_logprobs": arrays["old_logprobs"] + 1}
    arrays["weights"] = weigh_by_entropy(rng.exponential(size=(rows, tokens)), mask)
    constants = LossConstants(
        kl_coef=0.1, reduction=reduction, kl_estimator="k2", importance_cap=0.5
    )
    loss = RECIPES[name].loss
    total, count, _ = loss.compute(LossInputs(**arrays), constants)
    parts = [
        loss.compute(LossInputs(**{key: x[i::2] for key, x in arrays.items()}), constants)
        for i in range(2)
    ]
    assert float(sum(part[0] for part in parts)) == pytest.approx(float(total), rel=1e-5)
    counts = {"sequence_mean": 5, "token_mean": 16, "constant": rows * tokens}
    assert float(count) == sum(float(part[1]) for part in parts) == counts[reduction]
    assert float(loss.count(mask, constants)) == float(count)


def test_by_token_says_whether_the_shares_have_extremes():
    assert make_policy_loss(losses.clip_token_ratios).extremes is None
    assert CLIPPED_POLICY_LOSS.extremes is not None
