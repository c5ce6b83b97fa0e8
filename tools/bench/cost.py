"""Counts the work that the mathematics needs: bytes of a decode step, operations of passes.

In the language model D is the width, L the layers, H the heads' total width, K that of the keys, N
the weights of all layers, without norms, and `head` those of the head that scores a task. A prompt
has P tokens, an answer T.

Decode step, bytes that must be read, weights and keys and values in bfloat16:

    2 (N + head)                                        every weight once
    + 4 L K * rows * (P + T / 2)                        each row's own keys and values, on average
    or 4 L K * (prompts * P + rows * T / 2)             the prompt's read once for its whole group

Forward pass, operations; a backward pass counts twice as many, recomputation not at all:

    2 N * tokens read + 2 head * tokens scored + 4 L H * pairs of a query and a key that it sees

With A weights of adapters 2 A * tokens read are added. The frozen matrices then have no gradient:
their backward pass counts once.

A pair is two products, 2 H operations each. A prompt has P^2 / 2 pairs, an answer T P + T^2 / 2.
Where tokens see all of their part, as an image that is drawn in any order does, they have twice the
pairs inside of it. `shared`: each prompt is read once, as in this project; otherwise once for every
answer, as in the reference.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

BYTES = 2  # of a bfloat16
IMAGE = "t2i"
"""The task whose completions are images."""


@dataclasses.dataclass(frozen=True)
class Costs:
    """What the work of a language model depends on."""

    layers: int
    layer_weights: int  # N
    query_width: int  # H
    key_width: int  # K
    heads: Mapping[str, int]  # task -> weights of the head that computes its logits
    adapter_weights: int = 0  # A
    # An image is drawn in any order: it sees all of itself, also as the front of a question.
    any_order: bool = False
    borders: int = 0  # tokens around the codes of an image that are read with them
    front: int = 0  # tokens of a question that see each other in both directions


@dataclasses.dataclass(frozen=True)
class Work:
    """The completions of one task: `prompts` times `group`, of `length` tokens."""

    task: str
    prompts: int
    group: int
    prompt: int  # tokens
    length: int
    guided: bool = False  # each completion has a second row without its prompt

    @property
    def rows(self) -> int:
        return self.prompts * self.group * (1 + self.guided)


def count_step_bytes(costs: Costs, work: Work, shared: bool) -> int:
    """Counts the bytes of a decode step with a cache of mean length; see the formulas above."""
    weights = BYTES * (costs.layer_weights + costs.heads[work.task])
    prompts = work.prompts * (1 + work.guided) if shared else work.rows
    # On average half of an answer is in the cache.
    tokens = prompts * work.prompt + work.rows * work.length / 2
    return round(weights + 2 * BYTES * costs.layers * costs.key_width * tokens)


@dataclasses.dataclass(frozen=True)
class _Operations:
    """Operations of forward passes, by what their backward passes cost."""

    weights: float = 0.0
    others: float = 0.0  # of adapters, and of pairs of queries and keys

    def __add__(self, other: _Operations) -> _Operations:
        return _Operations(self.weights + other.weights, self.others + other.others)

    @property
    def forward(self) -> float:
        return self.weights + self.others


def _count_pass(
    costs: Costs, read: float, pairs: float, head: int = 0, scored: float = 0.0
) -> _Operations:
    products = 2 * (costs.layer_weights * read + head * scored)
    attention = 4 * costs.layers * costs.query_width * pairs
    return _Operations(products, 2 * costs.adapter_weights * read + attention)


def _count_prompts(costs: Costs, work: Work, shared: bool) -> _Operations:
    """Counts the operations of reading the prompts."""
    prompts = work.prompts * (1 + work.guided) if shared else work.rows
    front = 0 if work.task == IMAGE else costs.front
    # Causal: a token sees the tokens before it, half of all pairs.
    return _count_pass(costs, prompts * work.prompt, prompts * (work.prompt**2 + front**2) / 2)


def _count_completions(costs: Costs, work: Work) -> _Operations:
    """Counts the operations of reading the completions behind their prompts, and of their head."""
    is_image = work.task == IMAGE
    length = work.length + (costs.borders if is_image else 0)
    seen = work.prompt + length / (1 if is_image and costs.any_order else 2)
    return _count_pass(
        costs, work.rows * length, work.rows * length * seen,
        costs.heads[work.task], work.rows * work.length,
    )  # fmt: skip


def count_forward_operations(costs: Costs, work: Work, shared: bool) -> float:
    """Counts the operations of one forward pass over prompts and completions."""
    return (_count_prompts(costs, work, shared) + _count_completions(costs, work)).forward


def count_drawing_operations(costs: Costs, work: Work, steps: int) -> float:
    """Counts the operations of drawing images in steps: texts once, images in every step."""
    prompts, images = _count_prompts(costs, work, shared=True), _count_completions(costs, work)
    return prompts.forward + steps * images.forward


def count_training_operations(costs: Costs, works: tuple[Work, ...], shared: bool) -> float:
    """Counts the operations of a forward and a backward pass; see the formulas above."""
    total = _Operations()
    for work in works:
        total += _count_prompts(costs, work, shared) + _count_completions(costs, work)
    return (2 if costs.adapter_weights else 3) * total.weights + 3 * total.others
