"""The gradient of a table's rows, by additions in memory and in blocks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from corl_jax.models import lookup
from corl_jax.models.lookup import add_up, add_up_in_blocks, look_up

ROWS, FEATURES = 7, 3


def make_gradients(shape: tuple[int, ...], dtype=jnp.float32):
    draw = np.random.default_rng(0)
    # Few ids, so that most are shared, and one of them outside of the table.
    ids = draw.integers(0, ROWS - 2, shape)
    if ids.size:
        ids.flat[-1] = ROWS + 1
    gradients = draw.standard_normal((*shape, FEATURES), np.float32)
    return jnp.asarray(ids, jnp.int32), jnp.asarray(gradients, dtype)


@pytest.mark.parametrize("shape", [(), (1,), (4,), (9,), (2, 5), (2, 3, 6)])
def test_sums_in_blocks_are_those_of_additions_in_memory(monkeypatch, shape):
    monkeypatch.setattr(lookup, "BLOCK", 4)
    ids, gradients = make_gradients(shape)
    np.testing.assert_allclose(
        add_up_in_blocks(ROWS, ids, gradients), add_up(ROWS, ids, gradients), atol=1e-6
    )


def test_bfloat16_is_summed_in_float32():
    # 1 + 1/256 rounds to 1 in bfloat16, so that additions one by one would stay at 1.
    ids = jnp.zeros((1, 257), jnp.int32)
    gradients = jnp.full((1, 257, 1), 1 / 256, jnp.bfloat16).at[0, 0].set(1)
    (total,) = np.asarray(add_up_in_blocks(1, ids, gradients))
    assert total.dtype == jnp.bfloat16
    assert total.tolist() == [2.0]


def test_the_gradient_of_a_look_up_is_that_of_take():
    ids, weights = make_gradients((2, 5))
    ids = jnp.minimum(ids, ROWS - 1)
    table = jnp.arange(ROWS * FEATURES, dtype=jnp.float32).reshape(ROWS, FEATURES)

    def measure(look):
        return jax.value_and_grad(lambda table: (look(table, ids) * weights).sum())(table)

    (value, gradient), (expected, right) = (
        measure(look_up), measure(lambda table, ids: jnp.take(table, ids, axis=0)),
    )  # fmt: skip
    assert value == expected
    np.testing.assert_array_equal(gradient, right)


@pytest.mark.parametrize(("platform", "in_blocks"), [("cuda", True), ("cpu", False)])
def test_only_gpus_add_up_in_blocks(platform, in_blocks):
    ids = jnp.zeros((2, 5), jnp.int32)
    program = jax.jit(jax.grad(lambda table: look_up(table, ids).astype(jnp.float32).sum()))
    table = jax.ShapeDtypeStruct((ROWS, FEATURES), jnp.bfloat16)
    text = program.trace(table).lower(lowering_platforms=(platform,)).as_text()
    assert ("dot_general" in text) == in_blocks
    # Atomic additions in bfloat16 are the slow ones.
    _, scatter = text.split('"stablehlo.scatter"(')
    assert (f"-> tensor<{ROWS}x{FEATURES}xf32>" in scatter) == in_blocks


def test_an_id_outside_of_the_table_is_nan():
    table = jnp.ones((ROWS, FEATURES))
    assert np.isnan(look_up(table, jnp.asarray([0, ROWS]))).any(axis=-1).tolist() == [False, True]
