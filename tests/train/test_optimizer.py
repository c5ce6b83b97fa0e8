"""Which parameters decay, by hand: a gradient of 0 leaves the decay alone."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from corl_jax.config.schema import Optimizer
from corl_jax.policies import FAMILIES
from corl_jax.train.optimizer import make_optimizer

PARAMS = {
    "lm_head": {"kernel": jnp.full((2, 2), 4.0), "bias": jnp.full(2, 4.0)},
    "norm": {"scale": jnp.full(2, 4.0), "bias": jnp.full(2, 4.0)},
}
NAMES = ["adamw", "adafactor", "lion", "sgd"]


def update(family: str, name: Any = "adamw", decay: float = 0.1) -> tuple[Any, Any]:
    options = Optimizer(
        name=name, learning_rate=0.5, weight_decay=decay, schedule="constant", max_grad_norm=0.0
    )
    optimizer = make_optimizer(options, 10, undecayed=FAMILIES[family].undecayed)
    updates, state = optimizer.update(
        jax.tree.map(jnp.zeros_like, PARAMS), optimizer.init(PARAMS), PARAMS
    )
    return optax.apply_updates(PARAMS, updates), state


@pytest.mark.parametrize("name", NAMES)
def test_biases_of_a_show_o_do_not_decay(name):
    """As in its own training, whose norms and embeddings do."""
    new, _ = update("show_o", name)
    for bias in (new["lm_head"]["bias"], new["norm"]["bias"]):
        np.testing.assert_array_equal(bias, 4.0)
    for decayed in (new["lm_head"]["kernel"], new["norm"]["scale"]):
        assert (np.asarray(decayed) < 4.0).all()
    if name == "adamw":
        np.testing.assert_allclose(new["norm"]["scale"], 4.0 * (1 - 0.5 * 0.1))


@pytest.mark.parametrize("name", NAMES)
def test_all_parameters_of_a_janus_decay(name):
    new, _ = update("janus", name)
    assert all((np.asarray(leaf) < 4.0).all() for leaf in jax.tree.leaves(new))


def test_without_decay_the_optimizer_is_the_same():
    """A run of it can be resumed, and its results are the same to the bit."""
    states = [update(family, decay=0.0)[1] for family in ("show_o", "janus")]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
