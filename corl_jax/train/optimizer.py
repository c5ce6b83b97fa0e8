"""Makes the optax optimizer and its schedule from a config."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import optax

from corl_jax.params import map_with_path
from corl_jax.types import Params


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
    options: Any, total_steps: int, eps: float = 1e-8, undecayed: Sequence[str] = ()
) -> optax.GradientTransformation:
    """Returns clipping by global norm, then the named optimizer.

    `options` is `schema.Optimizer`, `eps` belongs to AdamW. `undecayed` are regexes of the paths of
    parameters without weight decay.
    """
    rate = learning_rate(options, total_steps)
    decay, mask = options.weight_decay, None
    if decay and undecayed:  # else the same program as without a mask
        mask = functools.partial(mark_decayed, undecayed)
    # Functions, so that only the named optimizer is made.
    update = {
        "adamw": lambda: optax.adamw(
            rate, options.b1, options.b2, eps, weight_decay=decay, mask=mask
        ),
        "adafactor": lambda: optax.adafactor(
            rate, weight_decay_rate=decay or None, weight_decay_mask=mask
        ),
        "lion": lambda: optax.lion(rate, options.b1, options.b2, weight_decay=decay, mask=mask),
        # optax.sgd has no weight decay: here it is added to the gradient, before the momentum.
        "sgd": lambda: optax.chain(
            optax.add_decayed_weights(decay, mask), optax.sgd(rate, momentum=options.b1 or None)
        ),
    }[options.name]()
    if options.max_grad_norm:
        return optax.chain(optax.clip_by_global_norm(options.max_grad_norm), update)
    return update


def mark_decayed(undecayed: Sequence[str], params: Params) -> Params:
    """Returns True for each parameter whose path no regex of `undecayed` matches."""
    return map_with_path(
        lambda path, _: not any(re.fullmatch(pattern, path) for pattern in undecayed), params
    )


def master_dtype(bfloat16: bool) -> Any:
    """Returns the dtype of the optimizer's parameters: float32, or bfloat16 for compat Q2."""
    return jnp.bfloat16 if bfloat16 else jnp.float32
