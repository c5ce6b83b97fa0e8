"""optax from a config, and which parameters it sees."""

from __future__ import annotations

import re
from typing import Any

import jax.numpy as jnp
import optax

from corl_jax.devices.mesh import leaf_paths
from corl_jax.errors import InputError
from corl_jax.types import Params


def learning_rate(options: Any, total_steps: int) -> optax.Schedule:
    """Warm-up from 0, then the named decay to 0 at the last of `total_steps` updates."""
    peak, warmup = options.learning_rate, options.warmup_steps
    rest = max(total_steps - warmup, 1)
    decay = {
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "constant": optax.constant_schedule(peak),
    }[options.schedule]
    if not warmup:
        return decay
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), decay], [warmup])


def make_optimizer(options: Any, total_steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then the named optimizer; `options` is `schema.Optimizer`."""
    rate = learning_rate(options, total_steps)
    decay = options.weight_decay
    update = {
        "adamw": lambda: optax.adamw(rate, options.b1, options.b2, options.eps, weight_decay=decay),
        "adafactor": lambda: optax.adafactor(rate, weight_decay_rate=decay or None),
        "lion": lambda: optax.lion(rate, options.b1, options.b2, weight_decay=decay),
        "sgd": lambda: optax.chain(
            optax.add_decayed_weights(decay), optax.sgd(rate, momentum=options.b1 or None)
        ),
    }[options.name]()
    if options.max_grad_norm:
        return optax.chain(optax.clip_by_global_norm(options.max_grad_norm), update)
    return update


def partition(params: Params, trainable: list[str]) -> tuple[Params, Params]:
    """(trained, frozen): two trees that `merge` puts together again.

    Raises:
        InputError: a pattern is no regex, or matches no parameter.
    """
    paths = [path for path, _ in leaf_paths(params)]
    problems = []
    for pattern in trainable:
        try:
            if not any(re.fullmatch(pattern, path) for path in paths):
                tops = ", ".join(sorted({path.split("/")[0] for path in paths}))
                problems.append(
                    f"train.trainable: {pattern!r} matches no parameter path; "
                    f"paths start with {tops}"
                )
        except re.error as error:
            problems.append(f"train.trainable: {pattern!r} is no regular expression: {error}")
    if problems:
        raise InputError(problems)
    chosen = {path for path in paths if any(re.fullmatch(p, path) for p in trainable)}
    return _select(params, chosen, True), _select(params, chosen, False)


def _select(tree: Params, chosen: set[str], wanted: bool, prefix: str = "") -> Params:
    selected: Params = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict):
            if inner := _select(value, chosen, wanted, f"{path}/"):
                selected[key] = inner
        elif (path in chosen) == wanted:
            selected[key] = value
    return selected


def merge(first: Params, second: Params) -> Params:
    """The union of two disjoint trees."""
    merged = dict(first)
    for key, value in second.items():
        merged[key] = merge(merged[key], value) if key in merged else value
    return merged


def master_dtype(bfloat16: bool) -> Any:
    """That in which the optimizer keeps parameters: float32, or bfloat16 for compat Q2."""
    return jnp.bfloat16 if bfloat16 else jnp.float32
