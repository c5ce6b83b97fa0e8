"""Trains a byte-level BPE tokenizer of the drawn world, with the special tokens of a family.

Every word of the world is one token, and so is every byte. So any text can be encoded. Special
tokens come last: their ids follow the merges.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
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
from corl_jax.policies.janus_flow.prompts import SYSTEM_PROMPT
from corl_jax.policies.show_o import tokens as show_o_tokens

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
    """Yields all text that a model of this drawn world reads or writes."""
    yield from [instructions.CAPTION, "\n", "\n\n", ": "]
    for index in range(rows):
        row = generator.make_row(seed, index, split="train", encode=False, world=world)
        yield from (row[name] for name in ("prompt", "qa_problem", "sft_answer", "caption"))


def train_pieces(corpus: Iterable[str], most: int) -> Tokenizer:
    """Trains a tokenizer of at most `most` tokens, without special ones."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=most,
        # All 256 bytes, also those that the corpus lacks. Sorted: the ids follow this order.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def train_tokenizer(seed: int = 0, world: str = "full", more: Iterable[str] = ()) -> Tokenizer:
    """Trains the tokenizer of a Janus on the train split of the seed in a drawn world.

    `more` are texts beside it.
    """
    corpus = [*more, *yield_corpus(seed, world=world)]
    tokenizer = train_pieces(corpus, MAX_VOCABULARY - len(SPECIAL_TOKENS))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    bos = (BOS, tokenizer.token_to_id(BOS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[bos]
    )
    return tokenizer


def train_janus_flow_tokenizer(seed: int = 0, world: str = "full") -> Tokenizer:
    """Trains the tokenizer of a JanusFlow: that of a Janus, with the words before each question."""
    return train_tokenizer(seed, world, [SYSTEM_PROMPT])


def train_show_o_tokenizer(seed: int = 0, world: str = "full") -> Tokenizer:
    """Trains the tokenizer of a Show-o: END is the last text token, the ten others follow it.

    As in the files of Phi-1.5 no token begins a text by itself.
    """
    roles = ["USER: \n", " ASSISTANT:"]  # of the template of questions
    tokenizer = train_pieces([*roles, *yield_corpus(seed, world=world)], MAX_VOCABULARY)
    specials = (show_o_tokens.END, show_o_tokens.PAD)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in specials])
    # Show-o adds these as ordinary tokens.
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in show_o_tokens.CONTROLS])
    return tokenizer


def count_embedding_rows(tokenizer: Tokenizer) -> int:
    """Returns the vocabulary size of a Janus for this tokenizer."""
    # Rounded up: 500 tokens -> 512 rows.
    return -(-tokenizer.get_vocab_size() // ROW_MULTIPLE) * ROW_MULTIPLE


def count_text_tokens(tokenizer: Tokenizer) -> int:
    """Returns the number of text tokens of a Show-o's tokenizer, END included."""
    # END is the last one; PAD follows, the first of the ten tokens.
    end = tokenizer.token_to_id(show_o_tokens.END)
    assert end is not None, "train_show_o_tokenizer adds it"
    return end + 1


def write_tokenizer(out: Path, tokenizer: Tokenizer, settings: dict) -> None:
    """Writes the files from which `corl_jax.weights` makes the tokenizer and processor files."""
    out.mkdir(exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "tokenizer_config.json").write_text(json.dumps(settings) + "\n", encoding="utf-8")
