"""Loads the trained and the frozen parameters of a policy onto the mesh."""

from __future__ import annotations

from typing import Any

import jax

from corl_jax.devices.mesh import param_shardings
from corl_jax.models import lora
from corl_jax.params import leaf_paths, merge, partition
from corl_jax.train import fit
from corl_jax.train.optimizer import master_dtype
from corl_jax.train.resolve import ResolvedRun, RunOutline
from corl_jax.types import Params
from corl_jax.weights.checkpoint import load_sharded

ADAPTER_STREAM = 1 << 16
"""Random stream of the adapters' first values, apart from those of the samples."""


def load_parts(plan: ResolvedRun) -> tuple[Params, Params]:
    """Returns (trained, frozen) parameters on the mesh: master copies, and as stored."""
    config, mesh, family = plan.config, plan.mesh, plan.family
    base, rules = family.base(plan.sizes), family.rules
    shapes, _ = partition(family.abstract(plan.sizes), plan.trained)
    master = master_dtype(config.compat.bfloat16_master)
    if not config.lora.rank:
        trained = dict(leaf_paths(shapes))
        loaded = load_sharded(
            plan.model_dir, family.kind, base,
            param_shardings(family.abstract(base), mesh, rules),
            # None keeps the type of the file: a frozen parameter needs no float32 copy.
            lambda path: master if path in trained else None,
        )  # fmt: skip
        return partition(merge(loaded, draw_alignment(plan, master)), plan.trained)

    def draw_adapters(key: jax.Array) -> Params:
        return jax.tree.map(lambda x: x.astype(master), lora.init_adapters(shapes, key))

    # Not the seed itself, which the samples' keys are made of.
    key = jax.random.fold_in(jax.random.key(config.seed), ADAPTER_STREAM)
    shardings = param_shardings(shapes, mesh, rules)
    return jax.jit(draw_adapters, out_shardings=shardings)(key), load_frozen(plan)


def load_frozen(plan: ResolvedRun) -> Params:
    """Returns the frozen parameters on the mesh, as stored."""
    family = plan.family
    _, frozen = partition(family.abstract(plan.sizes), plan.trained)
    return load_sharded(
        plan.model_dir, family.kind, family.base(plan.sizes),
        param_shardings(frozen, plan.mesh, family.rules), lambda _: None,
    )  # fmt: skip


def describe_trained(plan: RunOutline) -> Params:
    """Returns the shapes of the trained parameters, which a checkpoint has."""
    trained, _ = partition(plan.family.abstract(plan.sizes), plan.trained)
    master = master_dtype(plan.config.compat.bfloat16_master)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, master), trained)


def draw_alignment(plan: ResolvedRun, dtype: Any) -> Params:
    """Returns the first values of the projector of an alignment; empty without one."""
    alignment, sizes = plan.family.alignment, plan.sizes
    if alignment is None or not fit.aligns_images(plan.config):
        return {}

    def draw(key: jax.Array) -> Params:
        return jax.tree.map(lambda x: x.astype(dtype), alignment.init(sizes, key))

    # No run has adapters as well, whose stream this is.
    key = jax.random.fold_in(jax.random.key(plan.config.seed), ADAPTER_STREAM)
    shardings = param_shardings(jax.eval_shape(draw, key), plan.mesh, plan.family.rules)
    return jax.jit(draw, out_shardings=shardings)(key)
