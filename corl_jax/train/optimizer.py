"""Makes the optax optimizer and its schedule from a config."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import optax


def learning_rate(options: Any, total_steps: int) -> optax.Schedule:
    """Returns the schedule: a warm-up from 0, then the named decay over the other updates."""
    peak, warmup = options.learning_rate, options.warmup_steps
    rest = max(total_steps - warmup, 1)
    decay = {
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "constant": optax.constant_schedule(peak),
    }[options.schedule]
    if not warmup:
        return decay
    # Each part counts from 0 at its start, so the decay spans `rest` updates.
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), decay], [warmup])


def make_optimizer(
    options: Any, total_steps: int, eps: float = 1e-8
) -> optax.GradientTransformation:
    """Returns clipping by global norm, then the named optimizer.

    `options` is `schema.Optimizer`, `eps` belongs to AdamW.
    """
    rate = learning_rate(options, total_steps)
    decay = options.weight_decay
    # Functions, so that only the named optimizer is made.
    update = {
        "adamw": lambda: optax.adamw(rate, options.b1, options.b2, eps, weight_decay=decay),
        "adafactor": lambda: optax.adafactor(rate, weight_decay_rate=decay or None),
        "lion": lambda: optax.lion(rate, options.b1, options.b2, weight_decay=decay),
        # optax.sgd has no weight decay: here it is added to the gradient, before the momentum.
        "sgd": lambda: optax.chain(
            optax.add_decayed_weights(decay), optax.sgd(rate, momentum=options.b1 or None)
        ),
    }[options.name]()
    if options.max_grad_norm:
        return optax.chain(optax.clip_by_global_norm(options.max_grad_norm), update)
    return update


def master_dtype(bfloat16: bool) -> Any:
    """Returns the dtype of the optimizer's parameters: float32, or bfloat16 for compat Q2."""
    return jnp.bfloat16 if bfloat16 else jnp.float32
