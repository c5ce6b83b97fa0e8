"""Answers packed in rows: which stand where, and that scoring gives what answers apart give."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from corl_jax.algorithms.losses import LossConstants, LossInputs
from corl_jax.algorithms.recipes import RECIPES
from corl_jax.models.attention import attend_causally
from corl_jax.policies.causal_answers import score_text
from corl_jax.policies.family import LogprobOptions
from corl_jax.policies.janus import network
from corl_jax.policies.packing import Blocks, Packing, count_tokens_to_score, pack_rows
from tests.support.tiny_models import two_layers
from tests.support.tiny_runs import SPECIAL, random_params, text_batch
from tests.support.tolerances import LOGPROBS, NETWORK

pytestmark = pytest.mark.usefixtures("exact_products")

PROMPTS, GROUP, LENGTH = 4, 8, 7
ONE = Blocks(shards=1, micro_batches=1)


def test_rows_are_filled_by_hand():
    """Lengths 3, 1, 4, 2 in rows of 6: 4 and 2 fill the first row, 3 and 1 the second."""
    packed = pack_rows(np.array([[3, 1, 4, 2]]), 6, ONE)
    assert packed is not None
    assert packed.tolist() == [[12, 13, 14, 15, 18, 19], [0, 1, 2, 6, -1, -1]]


def test_a_prompt_may_have_the_rows_that_another_one_does_not_need():
    """Three rows of prompt 0 and one of prompt 1 are two a prompt."""
    packed = pack_rows(np.array([[6, 6, 5, 1], [0, 2, 1, 0]]), 6, ONE)
    assert packed is not None and packed.shape == (4, 6)
    assert (packed // 24)[:, 0].tolist() == [0, 0, 0, 1]
    assert packed[3].tolist() == [30, 31, 36, -1, -1, -1]


@pytest.mark.parametrize(
    ("lengths", "rows"),
    [
        ([[1] * 6 + [0] * 2], 1),  # an eighth
        ([[1] * 8], 2),
        ([[6, 1, 0, 0, 0, 0, 0, 0]], 2),
        ([[6] * 5 + [0] * 3], 6),  # five are no share; the next one are six of eight
        ([[6] * 7 + [0]], None),
        ([[4] * 8], None),
        ([[0] * 8], 1),
        ([[3, 3]], 1),
        ([[6, 1]], None),
    ],
)
def test_the_number_of_rows_is_one_of_a_few(lengths, rows):
    packed = pack_rows(np.array(lengths), 6, ONE)
    assert (packed is None) if rows is None else (packed is not None and len(packed) == rows)


@pytest.mark.parametrize("blocks", [ONE, Blocks(2, 1), Blocks(1, 2), Blocks(2, 2)], ids=str)
def test_each_token_stands_once_in_a_row_of_its_block(blocks):
    """Blocks as `step.split_batch` and the mesh make them of rows that each prompt has R of."""
    rng = np.random.default_rng(1)
    lengths = rng.integers(0, 4, (8, GROUP))
    packed = pack_rows(lengths, LENGTH, blocks)
    assert packed is not None
    rows = blocks.split(packed.reshape(8, -1, LENGTH))  # [shards, micro-batches, prompts, R, T]
    of_block = blocks.split(lengths)
    for shard, piece in np.ndindex(*rows.shape[:2]):
        numbers = rows[shard, piece].reshape(-1, LENGTH)
        kept = np.arange(LENGTH) < of_block[shard, piece].reshape(-1)[:, None]
        assert sorted(numbers[numbers >= 0]) == np.flatnonzero(kept).tolist()
        for row in numbers:
            real = row[row >= 0]
            assert len(set(real // (GROUP * LENGTH))) <= 1, "a row has answers of two prompts"
            for answer in set(real // LENGTH):
                (places,) = np.nonzero(row // LENGTH == answer)
                assert row[places].tolist() == list(
                    range(row[places[0]], row[places[0]] + len(places))
                )
                assert row[places[0]] % LENGTH == 0 and places[-1] - places[0] == len(places) - 1


def test_tokens_behind_the_last_one_in_the_loss_are_not_read():
    mask = jnp.array([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]], bool)
    assert count_tokens_to_score(mask).tolist() == [3, 0, 4]


def test_packing_and_unpacking_keep_values():
    lengths = np.array([[2, 0, 1, 3, 1, 1, 1, 0]])
    packed = pack_rows(lengths, 6, ONE)
    assert packed is not None and len(packed) == 2
    packing = Packing(jnp.asarray(packed), (8, 6), 8)
    answers = jnp.arange(1.0, 49.0).reshape(8, 6)
    kept = np.arange(6) < lengths.reshape(-1)[:, None]
    rows = packing.pack(answers)
    np.testing.assert_array_equal(rows[packed >= 0], answers.reshape(-1)[packed[packed >= 0]])
    np.testing.assert_array_equal(packing.unpack(rows), np.where(kept, answers, 0.0))


def test_attention_with_keys_of_each_query_is_that_with_keys_of_all():
    rng = np.random.default_rng(3)
    query, key, value = (jnp.asarray(rng.standard_normal((2, n, 2, 4))) for n in (3, 5, 5))
    mask = jnp.asarray(rng.random((2, 5)) < 0.6)
    by_query = jnp.broadcast_to(mask[:, None], (2, 3, 5))
    np.testing.assert_array_equal(
        attend_causally(query, key, value, by_query), attend_causally(query, key, value, mask)
    )


# ---- scoring


@pytest.fixture(scope="module")
def config(tiny_config):
    return two_layers(tiny_config)


@pytest.fixture(scope="module")
def params(config):
    return random_params(config)


@pytest.fixture(scope="module")
def task(config):
    """Answers of 0 to 4 of 7 tokens, of which a mask has a gap."""
    task = text_batch(
        config.siglip.image_size, config.num_image_tokens, PROMPTS, GROUP, length=LENGTH
    )
    (text,) = task.segments
    lengths = np.arange(PROMPTS * GROUP) * 3 % 5
    mask = np.arange(LENGTH) < lengths[:, None]
    mask[3, 1] = False  # 4 tokens
    return dataclasses.replace(task, segments=(dataclasses.replace(text, mask=mask),))


@pytest.fixture(scope="module")
def packed(task):
    lengths = np.asarray(count_tokens_to_score(task.segments[0].mask))
    assert lengths[3] == 4
    packed = pack_rows(lengths.reshape(PROMPTS, GROUP), LENGTH, ONE)
    assert packed is not None and len(packed) == 3 * PROMPTS
    return packed


def score_with_gradients(config, params, task, packed, **changes):
    """((log-probs, entropies), gradients of the parameters)."""
    weights = np.random.default_rng(2).standard_normal(task.segments[0].values.shape)
    options = LogprobOptions(SPECIAL, temperature=0.9, remat="none", chunk=40)
    options = dataclasses.replace(options, **changes)

    def score(params):
        model = network.bind(config, params)
        scores = score_text(model, task.prompts, task.segments[0].values, options, packed)
        kept = jnp.where(task.segments[0].mask, scores[0], 0.0)
        return (kept * weights).sum(), scores

    (_, scores), grads = jax.jit(jax.value_and_grad(score, has_aux=True))(params)
    return scores, grads


@pytest.fixture(scope="module")
def apart(config, params, task):
    with jax.default_matmul_precision("highest"):
        return score_with_gradients(config, params, task, None)


def assert_gradients_agree(found, expected) -> None:
    def compare(a: jax.Array, b: jax.Array) -> None:
        np.testing.assert_allclose(a, b, rtol=0, atol=NETWORK * max(np.abs(b).max(), 0.01))

    jax.tree.map(compare, found, expected)


def test_packed_answers_have_the_same_scores_and_gradients(config, params, task, packed, apart):
    (scores, grads), (expected, wanted) = (
        score_with_gradients(config, params, task, jnp.asarray(packed)),
        apart,
    )
    mask = task.segments[0].mask
    for found, right in zip(scores, expected, strict=True):
        np.testing.assert_allclose(found[mask], right[mask], atol=LOGPROBS)
        read = np.arange(LENGTH) < np.asarray(count_tokens_to_score(mask))[:, None]
        assert (np.asarray(found)[~read] == 0).all()
    assert_gradients_agree(grads, wanted)


def test_cudnn_gets_an_even_number_of_packed_tokens(
    config, params, task, packed, apart, monkeypatch
):
    """cuDNN needs a GPU, so XLA computes what it gets."""
    real, lengths = jax.nn.dot_product_attention, set()

    def attend(query, key, value, *, mask, implementation=None):
        if implementation == "cudnn":
            lengths.add(query.shape[1])
        return real(query, key, value, mask=mask)

    monkeypatch.setattr(jax.nn, "dot_product_attention", attend)
    packed = jnp.asarray(packed)
    _, grads = score_with_gradients(config, params, task, packed, attention="cudnn", remat="full")
    assert LENGTH + 1 in lengths and LENGTH not in lengths
    assert_gradients_agree(grads, apart[1])


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_loss_of_packed_answers_is_the_same(config, params, task, packed, apart, recipe):
    """With the same log-probs in other places of the program no loss sees what is not in it."""
    (text,) = task.segments
    rng = np.random.default_rng(4)
    old, ref = (apart[0][0] + rng.normal(0, 0.3, text.values.shape) for _ in range(2))
    packing = Packing(jnp.asarray(packed), text.values.shape, GROUP)
    for reduction in RECIPES[recipe].reductions:
        constants = LossConstants(kl_coef=0.1, reduction=reduction, importance_cap=2.0)
        (total, count, metrics), (wanted, right_count, right) = (
            RECIPES[recipe].loss.compute(
                LossInputs(
                    logprobs, text.mask, task.advantages, old, ref, entropy, sampler_logprobs=old
                ),
                constants,
            )
            for logprobs, entropy in (
                [packing.unpack(packing.pack(x)) for x in apart[0]],
                apart[0],
            )
        )
        assert count == right_count
        np.testing.assert_allclose(total, wanted, rtol=NETWORK)
        for name, pair in right.items():
            np.testing.assert_allclose(metrics[name], pair, rtol=NETWORK, atol=1e-6)
