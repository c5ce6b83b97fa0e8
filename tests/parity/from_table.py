"""A PyTorch state dict as parameters, through a key table and nothing else of the loaders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from corl_jax.models import modules
from corl_jax.params import flatten, unflatten
from corl_jax.types import Params
from corl_jax.weights.storage import make_whole_box
from corl_jax.weights.table import Table


def from_table(table: Table, kind: Any, config: Any, state: Mapping[str, np.ndarray]) -> Params:
    """Every leaf filled from `state`, whose keys and shapes must be exactly the table's."""
    shapes = {
        path: leaf.shape for path, leaf in flatten(modules.make_abstract(kind, config)).items()
    }
    slots = table.make_slots(shapes)
    assert not table.find_problems(slots, {key: x.shape for key, x in state.items()}, "test")
    flat = {path: np.full(shape, np.nan, np.float32) for path, shape in shapes.items()}
    for slot in slots:
        leaf = flat[slot.path][... if slot.layer is None else slot.layer]
        box = slot.box(make_whole_box(leaf.shape))
        leaf[...] = slot.transform.to_leaf(state[slot.key][tuple(slice(*ends) for ends in box)])
    assert not any(np.isnan(leaf).any() for leaf in flat.values())
    return unflatten({path: jnp.asarray(leaf) for path, leaf in flat.items()})


def arrays(state: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A torch state dict as float32 arrays."""
    return {key: tensor.detach().float().numpy() for key, tensor in state.items()}
