"""Makes the optax optimizer and its schedule from a config."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
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
    options: Any, total_steps: int, eps: float = 1e-8, undecayed: Sequence[str] = (),
    groups: Mapping[str, Sequence[str]] | None = None,
) -> optax.GradientTransformation:  # fmt: skip
    """Returns clipping by global norm, then the named optimizer.

    `options` is `schema.Optimizer`, `eps` belongs to AdamW. `undecayed` are regexes of the paths of
    parameters without weight decay. `groups` are regexes of the parameters that can have a learning
    rate of their own, by the name of their group; the options may name no other groups.
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
    if options.learning_rates:
        factors = {
            pattern: rate / options.learning_rate
            for name, rate in options.learning_rates.items()
            for pattern in (groups or {})[name]
        }
        update = scale_updates(update, factors)
    if options.max_grad_norm:
        return optax.chain(optax.clip_by_global_norm(options.max_grad_norm), update)
    return update


def scale_updates(
    optimizer: optax.GradientTransformation, factors: Mapping[str, float]
) -> optax.GradientTransformation:
    """Returns the optimizer with updates multiplied by the factors of regexes of their paths.

    A factor on the update is one on the learning rate, also of the weight decay. The state is that
    of the optimizer.
    """

    def scale(path: str, update: Any) -> Any:
        for pattern, factor in factors.items():
            if re.fullmatch(pattern, path):
                return update * factor
        return update

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = optimizer.update(updates, state, params)
        return map_with_path(scale, updates), state

    return optax.GradientTransformation(optimizer.init, update)


def is_in_group(path: str, patterns: Sequence[str]) -> bool:
    """Returns whether any regex of a group matches the path of a parameter."""
    return any(re.fullmatch(pattern, path) for pattern in patterns)


def mark_decayed(undecayed: Sequence[str], params: Params) -> Params:
    """Returns True for each parameter whose path no regex of `undecayed` matches."""
    return map_with_path(lambda path, _: not is_in_group(path, undecayed), params)


def master_dtype(bfloat16: bool) -> Any:
    """Returns the dtype of the optimizer's parameters: float32, or bfloat16 for compat Q2."""
    return jnp.bfloat16 if bfloat16 else jnp.float32
