"""`Processor`: what the program needs of a family's tokenizer, templates and image settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from corl_jax.types import EncodedPrompts


class Processor(Protocol):
    """Turns rows into prompts and tokens into text, for one checkpoint, on the host.

    A `prompt` is the name of a kind of prompt, as turns in `tasks.TASKS` name them.
    """

    special: Any  # ids of special tokens: a hashable dataclass with at least `eos`
    image: Any  # how images of prompts are normalised: a hashable value
    num_tokens: int  # tokens that the tokenizer knows

    def prompt_ids(
        self, prompt: str, columns: Mapping[str, Any], system_prompt: str = ""
    ) -> list[int]:
        """Returns the unpadded token ids of the prompt of a row.

        Beside the columns of a task, a question may have `num_images` (1), all before its text, and
        `lead` (a line break), the text between images and question.
        """
        ...

    def encode(
        self,
        prompt: str,
        ids: Sequence[Sequence[int]],
        images: Sequence[Any] | None = None,
        length: int | None = None,
    ) -> EncodedPrompts:
        """Pads prompts on the left to `length`, or to the bucket of the longest; adds images.

        A question takes one PIL image for each prompt, of any size, or a list of as many for all.
        """
        ...

    def pad(self, ids: Sequence[Sequence[int]], length: int | None = None) -> EncodedPrompts:
        """Pads prompts without images on the left, as `encode`."""
        ...

    def bucket(self, length: int) -> int:
        """Returns the padded length of a prompt of `length` tokens."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns the text of token ids, without special tokens."""
        ...

    def answer_ids(self, text: str) -> list[int]:
        """Returns the token ids of a completion, without an end token."""
        ...
