"""What a reward gets: completions with the rows they answer, and the networks that it may ask.

`in_pieces` is how a reward runs a device program over all rows.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from corl_jax.devices.batches import (
    find_mesh,
    num_batch_shards,
    process_shard,
    put_rows,
    to_host_rows,
)
from corl_jax.devices.offload import Offloadable
from corl_jax.errors import InputError
from corl_jax.policies.janus.network import JanusConfig
from corl_jax.types import Params


@dataclasses.dataclass(frozen=True)
class Samples:
    """N completions of one task on the host; `columns` repeats each row for its completions."""

    columns: dict[str, list]
    # Drawing: [N, S, S, 3] uint8. For a user's own reward, which takes them one by one, also a
    # list of [H, W, 3] of any sizes.
    images: np.ndarray | list[np.ndarray] | None = None
    texts: list[str] | None = None  # answering

    def __post_init__(self):
        if (self.images is None) == (self.texts is None):
            raise ValueError("samples: found both or neither of images and texts; expected one")
        wrong = {name: len(v) for name, v in self.columns.items() if len(v) != len(self)}
        if wrong:
            raise ValueError(f"samples: {len(self)} completions, but columns of lengths {wrong}")

    def __len__(self) -> int:
        return len(self.texts if self.images is None else self.images)  # type: ignore[arg-type]

    def column(self, name: str) -> list:
        """The values of a column, None for each row if there is no such column."""
        return self.columns.get(name) or [None] * len(self)

    def drawn(self) -> np.ndarray:
        """The images as one array. Raises ValueError for answers, and for images of any sizes."""
        if not isinstance(self.images, np.ndarray):
            found = "texts" if self.images is None else "images of any sizes"
            raise ValueError(f"samples: found {found} where a reward of equal images was asked for")
        return self.images

    def pictures(self) -> list[np.ndarray]:
        """The images one by one. Raises ValueError for answers."""
        return list(self.drawn() if self.images is None else self.images)

    def written(self) -> list[str]:
        """The texts. Raises ValueError for images: the reward belongs to the other task."""
        if self.texts is None:
            raise ValueError("samples: found images where a reward of texts was asked for")
        return self.texts


@dataclasses.dataclass(frozen=True)
class Policy:
    """The network that rewards may question, and how its prompts are made."""

    config: JanusConfig
    params: Params
    processor: Any  # data.processor.Processor
    dtype: Any


@dataclasses.dataclass(frozen=True)
class Network:
    """A reward network, ready to run; its tokenizer and image settings are files in `folder`."""

    config: Any
    params: Params
    folder: Path
    dtype: Any  # of the parameters


class FrozenNetwork:
    """A frozen `Network` or `Policy` whose parameters are on the device only inside `use()`."""

    def __init__(self, holder: Any, sharding: Any, *, offload: bool = False):
        self._lent = Offloadable(holder.params, sharding, offload=offload)
        self._holder = dataclasses.replace(holder, params=None)

    @contextlib.contextmanager
    def use(self) -> Iterator[Any]:
        """The network with its parameters on the device."""
        with self._lent.use() as params:
            yield dataclasses.replace(self._holder, params=params)


@dataclasses.dataclass(frozen=True)
class Context:
    """What rewards share: the moving policy, frozen networks, where random draws start from.

    The first four are None only where no reward that names the policy is scored. `networks`
    holds the reward networks by name, and the frozen scorers by what an option `scorer` says.
    """

    config: JanusConfig | None
    params: Params | None
    processor: Any
    dtype: Any
    seed: int
    step: int
    networks: Mapping[str, FrozenNetwork] = dataclasses.field(default_factory=dict)

    @property
    def policy(self) -> Policy:
        """The policy. Raises InputError where there is none."""
        if self.config is None or self.params is None or self.processor is None:
            raise InputError("rewards: found no model; a reward that asks the policy needs one")
        return Policy(self.config, self.params, self.processor, self.dtype)

    def scorer(self, name: str) -> AbstractContextManager[Policy]:
        """The policy as it stands (`policy`), or the frozen one that `name` says."""
        if name == "policy":
            return contextlib.nullcontext(self.policy)
        return self.network(name)

    def network(self, name: str) -> AbstractContextManager[Any]:
        """A frozen network, on the device for as long as the context lasts.

        Raises: InputError where it was not loaded.
        """
        if name not in self.networks:
            raise InputError(f"rewards: the network {name} is not loaded; found {[*self.networks]}")
        return self.networks[name].use()


RewardFunction = Callable[[Samples, Context], np.ndarray]
"""Rewards [N] float32; NaN where one does not apply to a row."""


def in_pieces(
    program: Callable[..., Any],
    take: Callable[[np.ndarray], tuple],
    rows: int,
    most: int,
    params: Params | None,
) -> list[np.ndarray]:
    """The arrays [rows, ..] that `program(*take(row numbers))` gives, in pieces, on the host.

    All pieces have one size, at most about `most` rows, so that one compiled program serves
    them; the last row fills up. Rows are spread over the devices on which `params` lie.
    """
    mesh = find_mesh(params)
    blocks = 1 if mesh is None else num_batch_shards(mesh) // process_shard(mesh)[1]
    outputs = []
    for index in chunks(rows, most, blocks):
        placed = take(index) if mesh is None else put_rows(mesh, take(index))
        outputs.append(jax.tree.leaves(program(*placed)))
    columns = zip(*outputs, strict=True)
    return [np.concatenate([to_host_rows(x) for x in xs])[:rows] for xs in columns]


def chunks(rows: int, most: int, multiple: int = 1) -> Iterator[np.ndarray]:
    """Row numbers in pieces of one size, as even as can be; the last row is repeated to fill up.

    Pieces have at most `most` rows, rounded up to a multiple of `multiple`.
    """
    if not rows:
        return
    pieces = -(-rows // most)
    size = -(-rows // (pieces * multiple)) * multiple
    for first in range(0, rows, size):
        yield np.minimum(np.arange(first, first + size), rows - 1)
