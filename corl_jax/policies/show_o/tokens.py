"""The control tokens that Show-o adds to the tokenizer of Phi-1.5, and their ids."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from corl_jax.errors import InputError
from corl_jax.weights.storage import read_json

END = "<|endoftext|>"
"""Begins and ends every text."""
PAD = "[PAD]"
CONTROLS = (
    "<|soi|>", "<|eoi|>", "<|sov|>", "<|eov|>", "<|t2i|>", "<|mmu|>", "<|t2v|>", "<|v2v|>",
    "<|lvg|>",
)  # fmt: skip
"""Control tokens in the order in which Show-o adds them, behind PAD."""


END_ID = 50256
"""Its id in every released Show-o."""


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """Ids of the structural tokens."""

    eos: int  # begins a text, too
    pad: int
    soi: int  # start of an image
    eoi: int  # end of an image
    t2i: int  # begins a prompt for an image
    mmu: int  # begins a question about an image
    first_code: int  # image code k has the id first_code + k
    mask: int  # stands at the place of an image code that is not known


def make_special_tokens(text_tokens: int, codebook_size: int) -> SpecialTokens:
    """Returns the ids of structural tokens behind a text vocabulary, in a network's sizes."""
    first_code = text_tokens + 1 + len(CONTROLS)
    ids = {name: text_tokens + place for place, name in enumerate((PAD, *CONTROLS))}
    return SpecialTokens(
        eos=END_ID, pad=ids[PAD], soi=ids["<|soi|>"], eoi=ids["<|eoi|>"], t2i=ids["<|t2i|>"],
        mmu=ids["<|mmu|>"], first_code=first_code, mask=first_code + codebook_size,
    )  # fmt: skip


def load_tokenizer(folder: str | Path, special: SpecialTokens) -> tuple[Any, SpecialTokens]:
    """Opens tokenizer.json, of Phi-1.5 or with Show-o's tokens, as a `tokenizers.Tokenizer`.

    Returns it, and the special tokens with its END.

    Raises:
        InputError: no usable file, no END in it, or tokens that are not those of `special`.
    """
    from tokenizers import Tokenizer

    file = Path(folder) / "tokenizer.json"
    read_json(file)  # for its messages about files that are missing or no JSON
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the Rust parser raises a bare Exception
        raise InputError(f"{file}: not a usable tokenizer.json ({error})") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    advice = "expected the tokenizer.json of microsoft/phi-1_5"
    if (end := tokenizer.token_to_id(END)) is None:
        raise InputError(f"{file}: has no token {END!r}; {advice}")
    # By the network's sizes, as its rows are in this order, and not behind the last token of a
    # file, which may have fewer or more tokens than its network.
    expected = {name: special.pad + place for place, name in enumerate((PAD, *CONTROLS))}
    stated = {name: tokenizer.token_to_id(name) for name in expected}
    problems = [
        f"{file}: token {name!r} is {token_id}, the network has it at {expected[name]}; {advice}"
        for name, token_id in stated.items()
        if token_id not in (None, expected[name])
    ]
    added = sum(token_id is not None for token_id in stated.values())
    count = tokenizer.get_vocab_size(with_added_tokens=True) - added
    if count > special.pad:
        problems.append(
            f"{file}: found {count} tokens of text, the network has {special.pad}; {advice}"
        )
    if problems:
        raise InputError(problems)
    return tokenizer, dataclasses.replace(special, eos=end)
