"""States facts about each stage for the checks of a config: plain data, without jax."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class StageFacts:
    """The options that a stage reads, and the part that it trains."""

    method: str  # in words
    block: str | None  # the block of options that no other stage reads
    has_rollouts: bool = False  # samples completions and scores their rewards
    compares: bool = False  # learns from the advantages of the completions
    reaches_images: bool = False  # the gradient of an answer flows into the model's own image
    image_weight: float = 1.0  # of the loss of images in supervised training, if no option sets it
    has_micro_batches: bool = True
    trains_language_model: bool = True  # False: the image tokenizer


STAGE_FACTS = {
    "rl": StageFacts("reinforcement learning", block="algorithm", has_rollouts=True, compares=True),
    "sft": StageFacts("supervised fine-tuning", block="sft"),
    "self_sft": StageFacts(
        "supervised fine-tuning on the model's own images", block="sft", has_rollouts=True
    ),
    "self_sft_through": StageFacts(
        "supervised fine-tuning through the model's own images",
        block="sft", has_rollouts=True, reaches_images=True,
        image_weight=0.0,  # as in the paper's eq. 3, which has the loss of the answers alone
    ),
    "vq": StageFacts(
        "training of the image tokenizer",
        block=None, has_micro_batches=False, trains_language_model=False,
    ),
}  # fmt: skip
"""Value of the option `stage` -> its facts."""
