"""A small tokenizer in the form of Phi-1.5's, and processors on it."""

from __future__ import annotations

from pathlib import Path

from corl_jax.policies.show_o.prompts import ImageSettings, Processor
from corl_jax.policies.show_o.tokens import CONTROLS, END
from tests.support.tiny_models import CORPUS

CODES = 8
SIDE, TOKENS = 64, 16
"""An image of 64 pixels has 4 x 4 codes."""


def tokenizer_dir(path: Path) -> Path:
    """Writes a byte-level BPE tokenizer without Show-o's control tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    path.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, show_progress=False, special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator([CORPUS] * 4, trainer)
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def count_tokens(folder: Path) -> int:
    """Returns the number of tokens of a tokenizer with Show-o's."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size() + 1 + len(CONTROLS)


def processor(folder: Path, **options) -> Processor:
    """Opens a processor of `tokenizer_dir` for CODES codes and 4 x 4 of them."""
    vocab_size = count_tokens(folder) + CODES + 1
    return Processor(
        folder, ImageSettings(SIDE, TOKENS), vocab_size=vocab_size, codebook_size=CODES, **options
    )
