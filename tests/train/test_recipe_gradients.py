"""The gradients of every loss: in pieces they are those of the whole batch.

A table of log-probs stands for the network, so that a case compiles in a moment.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from corl_jax.algorithms.losses import LossConstants
from corl_jax.algorithms.recipes import RECIPES
from corl_jax.policies.family import LogprobOptions, TurnProgram
from corl_jax.tasks import CODES, TEXT
from corl_jax.train import step
from corl_jax.types import EncodedPrompts, Segment

PROMPTS, GROUP, TOKENS, WORDS = 4, 2, 5, 6
LOSSES = {recipe.loss: name for name, recipe in reversed(RECIPES.items())}
"""Each loss of the table -> the first recipe that has it."""
SELECTIONS = (step.TokenSelection(CODES, 0.5), step.TokenSelection(CODES))


def score(sizes, params, prompts, segments, options):
    """The log-probs and entropies of a softmax whose logits depend on prompt and place."""
    (segment,) = segments
    rows = jnp.repeat(prompts.input_ids[:, 0], GROUP)
    logprobs = jax.nn.log_softmax(params["table"][rows] * (1 + jnp.arange(TOKENS))[:, None])
    entropy = -(jnp.exp(logprobs) * logprobs).sum(axis=-1)
    chosen = jnp.take_along_axis(logprobs, segment.values[..., None], axis=-1)[..., 0]
    return ((chosen, jax.lax.stop_gradient(entropy)),)


FAMILY: Any = SimpleNamespace(
    cast=lambda params, dtype: params,
    turns={((kind,),): TurnProgram(score, score) for kind in (CODES, TEXT)},
)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    words = rng.normal(scale=0.3, size=(PROMPTS, 1, WORDS)).astype(np.float32)
    return {"table": np.repeat(words, TOKENS, axis=1)}


def make_task(kind, lengths, seed):
    rng = np.random.default_rng(seed)
    rows = PROMPTS * GROUP

    def draw():
        return (-1.7 + rng.normal(scale=0.4, size=(rows, TOKENS))).astype(np.float32)

    segment = Segment(
        kind, rng.integers(0, WORDS, (rows, TOKENS)), np.arange(TOKENS) < lengths[:, None], draw()
    )
    prompts = EncodedPrompts(np.arange(PROMPTS)[:, None], np.ones((PROMPTS, 1), bool))
    advantages = rng.normal(size=rows).astype(np.float32)
    return step.TaskBatch(prompts, (segment,), advantages, (draw(),), (draw(),))


@pytest.fixture(scope="module")
def batch():
    """Images of equal length, and answers of which some are masked out whole."""
    return {
        "t2i": make_task(CODES, np.full(8, TOKENS), 1),
        "mm2t": make_task(TEXT, np.array([5, 0, 1, 3, 2, 5, 0, 4]), 2),
    }


@functools.cache
def compile_gradients(options):
    return jax.jit(lambda *args: step.gradients(FAMILY, None, options, *args))


def compute(name, params, batch, pieces=1, selections=(), **constants):
    """Returns (gradients of the table, metrics)."""
    recipe = RECIPES[name]
    constants = {
        "clip_low": recipe.clip_low, "clip_high": recipe.clip_high, "kl_coef": 0.1,
        "reduction": recipe.reductions[0], "kl_estimator": recipe.kl_estimator,
    } | constants  # fmt: skip
    options = step.UpdateOptions(
        recipe.loss, LossConstants(**constants), LogprobOptions(None),
        weights=(("t2i", 1.0), ("mm2t", 0.7)), dtype=jnp.float32, micro_batches=pieces,
        selections=selections,
    )  # fmt: skip
    gradients, metrics = compile_gradients(options)(params, {}, batch)
    return np.asarray(gradients["table"]), jax.device_get(metrics)


@pytest.mark.parametrize(
    ("name", "reduction"),
    [(name, reduction) for name in LOSSES.values() for reduction in RECIPES[name].reductions],
)
def test_pieces_are_the_whole(params, batch, name, reduction):
    """Every reduction, with weights by entropy, an importance cap and a dual clip."""
    compute_case = functools.partial(
        compute, name, params, batch, selections=SELECTIONS, reduction=reduction,
        importance_cap=1.2, dual_clip=1 + RECIPES[name].clip_high + 0.1,
    )  # fmt: skip
    whole, metrics = compute_case()
    split, split_metrics = compute_case(pieces=4)
    np.testing.assert_allclose(split, whole, rtol=1e-5, atol=1e-7)
    assert metrics.keys() == split_metrics.keys() and np.abs(whole).max() > 1e-3
    for key, value in metrics.items():
        np.testing.assert_allclose(split_metrics[key], value, rtol=1e-5, atol=1e-7, err_msg=key)


@pytest.mark.parametrize("name", LOSSES.values())
def test_groups_without_an_advantage_move_nothing(params, batch, name):
    """Each row of the table belongs to one prompt."""
    changed = {}
    for task, part in batch.items():
        advantages = np.array(part.advantages)
        advantages[:GROUP] = 0
        changed[task] = step.TaskBatch(
            part.prompts, part.segments, advantages, part.old_logprobs, part.ref_logprobs
        )
    found, _ = compute(name, params, changed, kl_coef=0.0)
    np.testing.assert_array_equal(found[0], np.zeros((TOKENS, WORDS)))
    assert all(np.abs(found[i]).max() > 0 for i in range(1, PROMPTS))
    with_penalty, _ = compute(name, params, changed)
    assert np.abs(with_penalty[0]).max() > 0


def test_a_selection_acts_on_its_kind_of_segment_alone(params, batch):
    plain, _ = compute("grpo", params, {"mm2t": batch["mm2t"]})
    found, _ = compute("grpo", params, {"mm2t": batch["mm2t"]}, selections=SELECTIONS)
    np.testing.assert_array_equal(found, plain)
    plain, _ = compute("grpo", params, {"t2i": batch["t2i"]}, kl_coef=0.0)
    found, _ = compute("grpo", params, {"t2i": batch["t2i"]}, kl_coef=0.0, selections=SELECTIONS)
    # The logits grow with the place, so that the first places have the highest entropy: of 5
    # tokens the first 3 stay.
    assert not found[:, 3:].any() and (np.abs(found[:, :3]).max(axis=-1) > 0).any()
    assert np.abs(plain[:, 3:]).max() > 0
