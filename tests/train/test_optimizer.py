"""Which parameters decay and how fast they move, by hand."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from corl_jax.config.files import validate
from corl_jax.config.schema import Config, Optimizer
from corl_jax.errors import InputError
from corl_jax.params import leaf_paths
from corl_jax.policies import FAMILIES
from corl_jax.train.fit import find_trainable_problems
from corl_jax.train.optimizer import is_in_group, make_optimizer

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


# ---- learning rates of groups

RATES = {"image_head": 0.125, "language_model": 0.75}
WEIGHTS = {
    "generation_head": {"kernel": jnp.full((2, 2), 4.0)},
    "lm_head": {"kernel": jnp.full((2, 2), 4.0)},
    "aligner": {"fc1": {"kernel": jnp.full((2, 2), 4.0)}},
}


def train(name: Any, rates: dict[str, float]) -> tuple[Any, Any]:
    """One update with equal gradients."""
    options = Optimizer(
        name=name, learning_rate=0.5, learning_rates=rates, weight_decay=0.1, schedule="constant"
    )
    optimizer = make_optimizer(options, 10, groups=FAMILIES["janus"].groups)
    gradients = jax.tree.map(jnp.ones_like, WEIGHTS)
    updates, state = optimizer.update(gradients, optimizer.init(WEIGHTS), WEIGHTS)
    return optax.apply_updates(WEIGHTS, updates), state


@pytest.mark.parametrize("name", NAMES)
def test_each_group_moves_at_its_own_rate(name):
    """The same gradients at 1/4 and 3/2 of the rate of all others; decay follows the rate."""
    (plain, state), (found, own_state) = train(name, {}), train(name, RATES)
    moved = {part: float(jax.tree.leaves(plain[part])[0][0, 0]) - 4.0 for part in WEIGHTS}
    for part, factor in (("generation_head", 0.25), ("lm_head", 1.5), ("aligner", 1.0)):
        assert moved[part] < 0
        leaf = np.asarray(jax.tree.leaves(found[part])[0])
        np.testing.assert_allclose(leaf - 4.0, factor * moved[part], rtol=1e-5)
    # Of the same structure, so that a checkpoint does not depend on the option.
    assert jax.tree.structure(state) == jax.tree.structure(own_state)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_every_parameter_is_in_one_group(family):
    for path, _ in leaf_paths(family.abstract(next(iter(family.presets.values())))):
        groups = [name for name, regexes in family.groups.items() if is_in_group(path, regexes)]
        assert len(groups) == 1, path


def read_config(rates: dict[str, float]) -> Config:
    tree = {
        "output_dir": "run", "stage": "sft", "model": {"path": "model"}, "data": {"path": "data"},
        "optimizer": {"learning_rates": rates},
    }  # fmt: skip
    return validate(tree, "config")


@pytest.mark.parametrize("rate", [0, -1e-6, float("inf"), float("nan")])
def test_a_rate_without_a_meaning_is_refused(rate):
    with pytest.raises(InputError) as error:
        read_config({"image_head": rate})
    (problem,) = error.value.problems
    assert "optimizer.learning_rates: found {'image_head': " in problem
    assert "to freeze a group, leave its parameters out of train.trainable" in problem


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("image_hed", "learning_rates.image_hed: no group of parameters; did you mean image_head?"),
        ("image_head", "learning_rates.image_head: nothing of this group is trained"),
        ("language_model", None),
    ],
)
def test_rates_of_groups_that_train_nothing_are_refused(name, problem):
    """A Janus trains its language model and the head of its texts alone."""
    family = FAMILIES["janus"]
    sizes = next(iter(family.presets.values()))
    problems = find_trainable_problems(read_config({name: 1e-5}), family, sizes)
    assert len(problems) == (problem is not None)
    assert all(problem in line for line in problems)
