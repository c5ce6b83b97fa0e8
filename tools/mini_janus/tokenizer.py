"""Trains a byte-level BPE tokenizer of the drawn world, with Janus's special tokens.

Every word of the world is one token, and so is every byte. So any text can be encoded. Special
tokens come last, as in Janus: their ids follow the merges.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)

from corl_jax.data import instructions
from corl_jax.data.drawn_world import generator
from corl_jax.policies.janus.checkpoint.assets import ORIGINAL_SPECIALS
from corl_jax.policies.janus.tokens import STRINGS

BOS = STRINGS["bos"]
_STRUCTURE = ("bos", "eos", "pad", "boi", "eoi")
SPECIAL_TOKENS = (*(STRINGS[name] for name in _STRUCTURE), *ORIGINAL_SPECIALS)

CORPUS_ROWS = 2000
# An upper bound. The world has fewer words, and merging stops when each word is one token.
MAX_VOCABULARY = 640
ROW_MULTIPLE = 64  # the embedding has more rows than the tokenizer has tokens, as Janus's has

# Line ends, a tag, one digit, a word, punctuation. A tag is one piece because `<think>` and
# `<answer>` open and close every answer; Janus spells them with ordinary tokens too.
PIECES = r"[\r\n]+| ?</?[a-z]+>|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}<]+|<|\s+"


def yield_corpus(seed: int, rows: int = CORPUS_ROWS, world: str = "full") -> Iterator[str]:
    """Yields all text that a Janus of this drawn world reads or writes."""
    yield from [instructions.CAPTION, "\n", "\n\n", ": "]
    for index in range(rows):
        row = generator.make_row(seed, index, split="train", encode=False, world=world)
        yield from (row[name] for name in ("prompt", "qa_problem", "sft_answer", "caption"))


def train_tokenizer(seed: int = 0, world: str = "full") -> Tokenizer:
    """Trains the tokenizer on the train split of the seed in a drawn world."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCABULARY - len(SPECIAL_TOKENS),
        # All 256 bytes, also those that the corpus lacks. Sorted: the ids follow this order.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(yield_corpus(seed, world=world), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    bos = (BOS, tokenizer.token_to_id(BOS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[bos]
    )
    return tokenizer


def count_embedding_rows(tokenizer: Tokenizer) -> int:
    """Returns the vocabulary size of a model for this tokenizer."""
    # Rounded up: 500 tokens -> 512 rows.
    return -(-tokenizer.get_vocab_size() // ROW_MULTIPLE) * ROW_MULTIPLE


def write_tokenizer(out: Path, tokenizer: Tokenizer, max_positions: int) -> None:
    """Writes the files from which `corl_jax.weights` makes the tokenizer and processor files."""
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {"model_max_length": max_positions}
    (out / "tokenizer_config.json").write_text(json.dumps(settings) + "\n", encoding="utf-8")
