"""Turns prompts and images into arrays on the host, as for Janus but for the templates.

Sources: `VLChatProcessor` and `VLMImageProcessor` of deepseek-ai/Janus, `janus/janusflow`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from corl_jax.policies.janus import prompts as janus
from corl_jax.policies.janus.image_settings import ImageSettings
from corl_jax.policies.janus.prompts import BUCKET, GENERATE, QUESTION, THINK
from corl_jax.policies.janus.tokens import ROLE_NAMES
from corl_jax.policies.janus_flow.checkpoint.flow_config import parse_vision

PROMPTS = (GENERATE, QUESTION, THINK)
"""Kinds of prompts that this processor encodes."""
SYSTEM_PROMPT = (
    "You are a helpful language and vision assistant. You are able to understand the visual "
    "content that the user provides, and assist the user with a variety of tasks using natural "
    "language."
)
"""The text before every question, with which the model was trained; images have none."""


class Processor(janus.Processor):
    """Chat template, tokenizer and image preprocessing of one JanusFlow directory."""

    def __init__(self, model_dir: str | Path, image: ImageSettings, *, bucket_size: int = BUCKET):
        """Opens the tokenizer.

        Raises:
            InputError: unreadable tokenizer, missing special tokens.
        """
        # The roles are User and Assistant, also with a tokenizer that has Janus-Pro's role tokens.
        super().__init__(model_dir, image, template=ROLE_NAMES["old"], bucket_size=bucket_size)

    @classmethod
    def from_dir(cls, model_dir: str | Path, *, bucket_size: int = BUCKET) -> Processor:
        """Opens a model directory of the original layout or of ours.

        Raises:
            InputError: listing every missing file, setting and special token.
        """
        folder = Path(model_dir)
        _, image = janus.read_settings(folder, parse_vision)
        return cls(folder, image, bucket_size=bucket_size)

    def _make_t2i_parts(self, prompt: str) -> list[str]:
        # Without the tag that begins an image: the time stands in its place.
        return super()._make_t2i_parts(prompt)[:-1]

    def mm2t_ids(
        self,
        question: str,
        system_prompt: str = SYSTEM_PROMPT,
        *,
        num_images: int = 1,
        lead: str = "\n",
    ) -> list[int]:
        """Returns BOS and the understanding prompt with BOI, image tokens and EOI, unpadded.

        All images come first, then `lead` and the question.
        """
        return super().mm2t_ids(question, system_prompt, num_images=num_images, lead=lead)

    def prompt_ids(
        self, prompt: str, columns: Mapping[str, Any], system_prompt: str = ""
    ) -> list[int]:
        """Returns the unpadded ids of a row's prompt of the kind `prompt`.

        A question without a system prompt has the model's own.
        """
        assert prompt in PROMPTS, prompt
        return super().prompt_ids(prompt, columns, system_prompt or SYSTEM_PROMPT)
