"""The stage `vq`: trains the image tokenizer of a policy on real images."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from corl_jax.models.vq import VQModel
from corl_jax.params import merge
from corl_jax.policies.janus import network
from corl_jax.policies.janus.network import JanusConfig
from corl_jax.train.run import Iteration, Run, put
from corl_jax.train.sft import drawing_pixels
from corl_jax.train.step import TrainState, apply_gradients
from corl_jax.types import Params, Prompts

def vq_iteration(run: Run, state: TrainState, prompts: Prompts, step: int):
    """(next state, Iteration) of one batch of images."""
    with run.phases("data"):
        images = prompts.columns["real_image"]
        pixels = put(run, np.stack([drawing_pixels(image, run.image_side) for image in images]))
    with run.phases("update"):
        state, metrics = run.train_step(state, run.frozen, pixels)
    return state, Iteration(metrics, {}, {}, [metrics])


def make_vq_step(
    config: JanusConfig, options: Any, optimizer: optax.GradientTransformation, **jit: Any
) -> Callable:
    """The jitted step (state, frozen, pixels) -> (state, metrics); the state is donated."""
    weights = (options.perceptual_weight, options.commitment, options.entropy_weight)

    @functools.partial(jax.jit, donate_argnums=0, **jit)
    def train_step(state: TrainState, frozen: Params, pixels: jax.Array):
        def loss(trained: Params):
            # What is frozen has the dtype of its checkpoint.
            params = network.cast(merge(trained, frozen), jnp.float32)
            model = network.bind(config, params).vqmodel
            return vq_loss(model, pixels, *weights)

        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        state, update = apply_gradients(state, grads, optimizer, value)
        return state, metrics | {"loss": value} | update

    return train_step
