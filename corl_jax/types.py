"""The pytrees that cross module borders.

Axis legend, used in every docstring and annotation:

    B  prompts in a batch            G  completions per prompt (the paper's group size)
    N  B * G completions, prompt-major: row b * G + g is completion g of prompt b
    P  padded prompt length          T  completion length (image tokens or text tokens)
    D  width of the language model   V  vocabulary       S  image side in pixels
    L  layers (leading axis of every stacked parameter)
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

Array = Any
"""A jax.Array; a numpy array while a batch is on the host, and its shape where one is planned."""
Params = dict[str, Any]
"""A nested dict of arrays; a leaf's path is its keys joined by `/`."""

STREAMS = {"t2i": 0, "mm2t": 1, "caption": 2, "qa": 3, "oc": 4, "od": 5}
"""Random streams, so that what one row's prompt is asked for is drawn independently: the two tasks,
and the answers of the rewards that question a Janus."""


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """Ids of the tokens that carry structure; always read from the tokenizer by string."""

    bos: int
    eos: int
    pad: int
    boi: int  # <begin_of_image>
    eoi: int  # <end_of_image>
    image: int  # <image_placeholder>; one per image token of an understanding prompt


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EncodedPrompts:
    """Token ids of a batch of prompts, left-padded to a common length."""

    input_ids: Array  # [B, P] int32
    attention_mask: Array  # [B, P] bool, True on real tokens
    pixel_values: Array | None = None  # [B, S, S, 3] float32, normalised


@dataclasses.dataclass(frozen=True)
class Prompts:
    """One batch of dataset rows on the host, encoded for the tasks that need it."""

    index: np.ndarray  # [B] int64, global position in the data order; seeds the samples
    columns: dict[str, list]  # raw row values by standard column name
    t2i: EncodedPrompts | None = None
    mm2t: EncodedPrompts | None = None

    def __len__(self) -> int:
        return len(self.index)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rollout:
    """What sampling produced for one task.

    `logprobs` are under the conditional distribution's full softmax at the sampling
    temperature: top-k, top-p and guidance change what is drawn, not what is recorded.
    """

    prompts: EncodedPrompts  # B rows
    tokens: Array  # [N, T] int32
    mask: Array  # [N, T] bool, True up to and including the first EOS
    logprobs: Array  # [N, T] float32

    @property
    def group_size(self) -> int:
        return self.tokens.shape[0] // self.prompts.input_ids.shape[0]
