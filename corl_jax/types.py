"""The values that modules pass to each other.

Axis legend, used in every docstring and annotation:

    B  prompts in a batch            G  completions per prompt (the paper's group size)
    N  B * G completions, prompt-major: row b * G + g is completion g of prompt b
    P  padded prompt length          T  choices of a segment (text tokens, image codes, ...)
    D  width of the language model   V  vocabulary       S  image side in pixels
    L  layers (leading axis of every stacked parameter)
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = Any
"""A jax.Array; a numpy array while a batch is on the host, and its shape where one is planned."""
Params = dict[str, Any]
"""A nested dict of arrays; a leaf's path is its keys joined by `/`."""
Sizes = Any
"""The sizes of one network: a frozen, hashable dataclass of its family or kind."""
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
"""Compute dtype of a network, by the name that options give it."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EncodedPrompts:
    """Token ids of a batch of prompts, left-padded to a common length."""

    input_ids: Array  # [B, P] int32
    attention_mask: Array  # [B, P] bool, True on real tokens
    pixel_values: Array | None = None  # [B, S, S, 3] float32, normalised
    # The prompts of the next turn; an image in them is one that the policy makes in this turn.
    next: EncodedPrompts | None = None


@dataclasses.dataclass(frozen=True)
class Prompts:
    """One batch of dataset rows on the host, encoded for the tasks that need it."""

    # [B] int64, global position in the data order. It seeds the samples, so that they depend on
    # neither the batch size nor the number of processes.
    index: np.ndarray
    columns: dict[str, list]  # raw row values by standard column name
    encoded: dict[str, EncodedPrompts] = dataclasses.field(default_factory=dict)  # by task

    def __len__(self) -> int:
        return len(self.index)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Segment:
    """The choices that a policy made for one part of its output, one choice per column.

    A choice is a text token, an image code or a denoising step. `logprobs` are those of the full
    distribution that the family records. For text this is the softmax at the sampling temperature.
    """

    # Static: jit compiles for the kind, and does not trace it.
    kind: str = dataclasses.field(metadata={"static": True})  # "text", "codes", "latents"
    values: Array  # [N, T] int32; of denoising steps the latents, [N, T + 1, ...]
    mask: Array  # [N, T] bool, the choices that count
    # [N, T] float32, as sampled; None for given completions. Top-k and top-p do not change them:
    # the update computes log-probs over the full softmax, and the two must agree.
    logprobs: Array | None = None
    # Arrays that scoring needs to repeat the choices, by name, such as the step of each code.
    replay: dict[str, Array] = dataclasses.field(default_factory=dict)
    weights: Array | None = None  # [N, T] factors of the choices' losses; None: all 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rollout:
    """The completions of a batch of prompts: the segments of all turns, in order."""

    prompts: EncodedPrompts  # B rows
    segments: tuple[Segment, ...]  # each of N rows

    @property
    def group_size(self) -> int:
        """The number of completions per prompt."""
        return self.segments[0].mask.shape[0] // self.prompts.input_ids.shape[0]
