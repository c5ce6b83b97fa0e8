"""Defines the options of supervised fine-tuning."""

from __future__ import annotations

from corl_jax.config.fields import NonNegativeFloat, Section, TaskChoice, option


class Sft(Section):
    """Supervised fine-tuning of the language model on one task or both."""

    tasks: TaskChoice = option(
        "unified",
        "Tasks to train. mm2t: answers to questions about images; t2i: images; unified: both.",
    )
    caption_column: str | None = option(
        "caption", "Column with the answers to the captioning instruction. null: no captions."
    )
    text_column: str | None = option(
        None,
        "Column with texts that are learned without an image, at weight 0.1. null: none.",
    )
    t2i_weight: NonNegativeFloat | None = option(
        None, "Weight of the image loss; texts have 1. null: 1, in self_sft_through 0 (no loss)."
    )
    repa_weight: NonNegativeFloat = option(
        0.0,
        "Weight of the alignment of an image's states with the image encoder, REPA. 0: none. "
        "JanusFlow was trained with it. Its projector is not exported.",
    )
    released: bool = option(
        False,
        "Also the terms that only the code that a model comes from has. Show-o: the tokens before "
        "and behind an image, and the question before an answer.",
    )
    redraw: bool = option(False, "self_sft_through: a fresh image takes the gradient.")
