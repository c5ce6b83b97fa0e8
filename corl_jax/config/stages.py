"""States facts about each stage for the checks of a config: plain data, without jax."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class StageFacts:
    """The options that a stage reads, and the part that it trains."""

    block: str | None  # the block of options that no other stage reads
    has_rollouts: bool = False  # samples completions and learns from their rewards
    has_micro_batches: bool = True
    trains_language_model: bool = True  # False: the image tokenizer


STAGE_FACTS = {
    "rl": StageFacts(block="algorithm", has_rollouts=True),
    "sft": StageFacts(block="sft"),
    "vq": StageFacts(block=None, has_micro_batches=False, trains_language_model=False),
}
"""Value of the option `stage` -> its facts."""
