"""The stage `vq`: trains the image tokenizer of a policy on real images."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax

from corl_jax.data.columns import IMAGE_COLUMN
from corl_jax.metrics import to_metrics
from corl_jax.params import merge
from corl_jax.policies.family import Family
from corl_jax.train.image_codes import fit_pixels
from corl_jax.train.run import Iteration, Run, put_batch
from corl_jax.train.step import TrainState, apply_gradients
from corl_jax.types import Params, Prompts, Sizes


def tokenizer_iteration(run: Run, state: TrainState, prompts: Prompts, step: int):
    """Returns (next state, Iteration) of one batch of images."""
    with run.phases("data"):
        pixels = put_batch(run, fit_pixels(run, prompts.columns[IMAGE_COLUMN]))
    with run.phases("update"):
        state, metrics = run.train_step(state, run.frozen, pixels)
    return state, Iteration(metrics, {}, {}, [metrics])


def make_tokenizer_step(
    family: Family, sizes: Sizes, optimizer: optax.GradientTransformation, **jit: Any
) -> Callable:
    """Returns the jitted step (state, frozen, pixels) -> (state, metrics); donates the state."""

    @functools.partial(jax.jit, donate_argnums=0, **jit)
    def train_step(state: TrainState, frozen: Params, pixels: jax.Array):
        def loss(trained: Params):
            assert family.tokenizer_loss is not None  # the config was checked
            return family.tokenizer_loss(sizes, merge(trained, frozen), pixels)

        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        state, update = apply_gradients(state, grads, optimizer, value)
        return state, to_metrics(metrics | {"loss": value} | update)

    return train_step
