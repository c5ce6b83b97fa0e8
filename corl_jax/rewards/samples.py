"""The inputs of a reward function: completions with the columns of their rows, and networks."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from corl_jax.data.column_values import QuestionType, read_question_type
from corl_jax.devices.batches import PendingRows
from corl_jax.devices.offload import Offloadable
from corl_jax.errors import InputError, Problems
from corl_jax.policies.family import Family
from corl_jax.types import Params, Sizes


@dataclasses.dataclass(frozen=True)
class Samples:
    """N completions of one task on the host. `columns` repeats each row for its completions."""

    columns: dict[str, list]
    # Generated images: [N, S, S, 3] uint8. Only a user's reward accepts a list of [H, W, 3] of
    # different sizes, because it takes images one by one.
    images: np.ndarray | list[np.ndarray] | None = None
    texts: list[str] | None = None  # answers; beside images, those about the same row's image
    # [N] tokens of each answer with its end token; None where the answers were not sampled.
    num_tokens: np.ndarray | None = None

    def __post_init__(self):
        if self.images is None and self.texts is None:
            raise ValueError("samples: found neither images nor texts; expected some")
        rows = self.columns if self.texts is None else {**self.columns, "texts": self.texts}
        wrong = {name: len(v) for name, v in rows.items() if len(v) != len(self)}
        if wrong:
            raise ValueError(f"samples: {len(self)} completions, but columns of lengths {wrong}")

    def __len__(self) -> int:
        return len(self.texts if self.images is None else self.images)  # type: ignore[arg-type]

    def take(self, rows: np.ndarray) -> Samples:
        """Returns the samples of these row numbers."""

        def take_rows(values: Any) -> Any:
            if values is None or isinstance(values, np.ndarray):
                return values if values is None else values[rows]
            return [values[row] for row in rows]

        columns = {name: take_rows(values) for name, values in self.columns.items()}
        return Samples(columns, *map(take_rows, (self.images, self.texts, self.num_tokens)))

    def replace(self, other: Samples, is_replaced: np.ndarray) -> Samples:
        """Returns the samples with the rows of `other` where `is_replaced` [N] is True."""

        def choose(old: Any, new: Any) -> Any:
            if old is None:
                return None
            if isinstance(old, np.ndarray):
                return np.where(is_replaced.reshape(-1, *[1] * (old.ndim - 1)), new, old)
            rows = zip(old, new, is_replaced, strict=True)
            return [after if is_new else before for before, after, is_new in rows]

        columns = {
            name: choose(values, other.columns[name]) for name, values in self.columns.items()
        }
        return Samples(
            columns, choose(self.images, other.images), choose(self.texts, other.texts),
            choose(self.num_tokens, other.num_tokens),
        )  # fmt: skip

    def column(self, name: str) -> list:
        """Returns the values of a column; None for each row if there is no such column."""
        return self.columns.get(name) or [None] * len(self)

    def require_images(self) -> np.ndarray:
        """Returns the images as one array. Raises ValueError for texts and for several sizes."""
        if not isinstance(self.images, np.ndarray):
            kind = "texts" if self.images is None else "images of any sizes"
            raise ValueError(f"samples: found {kind} where a reward of equal images was asked for")
        return self.images

    def list_images(self) -> list[np.ndarray]:
        """Returns the images one by one, of any sizes. Raises ValueError for texts."""
        return list(self.require_images() if self.images is None else self.images)

    def require_texts(self) -> list[str]:
        """Returns the texts. Raises ValueError for images: the reward is of the other task."""
        if self.texts is None:
            raise ValueError("samples: found images where a reward of texts was asked for")
        return self.texts


@dataclasses.dataclass(frozen=True)
class Policy:
    """A unified model that rewards ask questions, with the processor that makes its prompts."""

    family: Family
    config: Sizes
    params: Params
    processor: Any  # policies.processor.Processor
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
        self._offloadable = Offloadable(holder.params, sharding, offload=offload)
        # Without the parameters: a second reference would keep the device copy alive.
        self._holder = dataclasses.replace(holder, params=None)

    @property
    def is_offloaded(self) -> bool:
        """True if the parameters are in host memory outside of `use()`."""
        return self._offloadable.is_offloaded

    @contextlib.contextmanager
    def use(self) -> Iterator[Any]:
        """Yields the network with its parameters on the device."""
        with self._offloadable.use() as params:
            yield dataclasses.replace(self._holder, params=params)


@dataclasses.dataclass(frozen=True)
class Context:
    """The inputs that rewards share: the policy at this step, frozen networks, the random seed.

    The first four are None if no reward uses the policy. `networks` holds the reward networks by
    name, and each frozen scorer by the value of the option `scorer`.
    """

    family: Family | None
    config: Sizes | None
    params: Params | None
    processor: Any
    dtype: Any
    seed: int
    step: int
    networks: Mapping[str, FrozenNetwork] = dataclasses.field(default_factory=dict)
    max_new_tokens: int | None = None  # of an answer; None outside of a run

    @property
    def policy(self) -> Policy:
        """The policy at this step. Raises InputError if there is none."""
        if self.config is None or self.params is None or self.processor is None:
            raise InputError("rewards: found no model; a reward that asks the policy needs one")
        assert self.family is not None
        return Policy(self.family, self.config, self.params, self.processor, self.dtype)

    def scorer(self, name: str) -> AbstractContextManager[Policy]:
        """Returns the policy at this step for `policy`, else the frozen scorer `name`."""
        if name == "policy":
            return contextlib.nullcontext(self.policy)
        return self.network(name)

    def network(self, name: str) -> AbstractContextManager[Any]:
        """Returns a context in which a frozen network is on the device.

        Raises: InputError if it was not loaded.
        """
        if name not in self.networks:
            raise InputError(f"rewards: the network {name} is not loaded; found {[*self.networks]}")
        return self.networks[name].use()


RewardFunction = Callable[[Samples, Context], np.ndarray | PendingRows]
"""Returns rewards [N] float32; NaN where the reward does not apply to a row.

A reward that asks networks should return them without waiting for the devices.
"""


def read_question_types(samples: Samples) -> list[QuestionType | None]:
    """Returns each row's `qa_type` as MC or OE, None for null.

    Raises:
        InputError: listing the rows whose type is neither.
    """
    types, problems = [], Problems()
    for row, value in enumerate(samples.column("qa_type")):
        with problems.collect(f"row {row}: qa_type: "):
            types.append(read_question_type(value))
    problems.raise_any()
    return types


def read_class_questions(samples: Samples) -> tuple[list, list]:
    """Returns (questions, solutions) of classification: the `cls_` columns of each row.

    A row without `cls_solution` uses its `qa_` columns.
    """
    columns = {
        kind: (samples.column(f"{kind}_problem"), samples.column(f"{kind}_solution"))
        for kind in ("cls", "qa")
    }
    # cls_solution ["cat", None], qa_solution ["A", "B"] -> kinds [cls, qa], solutions ["cat", "B"]
    kinds = ["cls" if solution else "qa" for solution in columns["cls"][1]]
    questions = [columns[kind][0][row] for row, kind in enumerate(kinds)]
    return questions, [columns[kind][1][row] for row, kind in enumerate(kinds)]


def score_rows(function: Callable[..., float], *columns: Sequence) -> np.ndarray:
    """Returns `function(values of the row)` for each row, [N] float32."""
    return np.array([function(*row) for row in zip(*columns, strict=True)], np.float32)
