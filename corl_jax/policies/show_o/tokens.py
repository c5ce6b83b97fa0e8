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


def load_tokenizer(folder: str | Path) -> Any:
    """Opens tokenizer.json, of Phi-1.5 or with Show-o's tokens, as a `tokenizers.Tokenizer`.

    Adds the control tokens that are missing, so that they follow the last token.

    Raises:
        InputError: no usable file, or no END in it.
    """
    from tokenizers import AddedToken, Tokenizer

    file = Path(folder) / "tokenizer.json"
    if not file.is_file():
        raise InputError(
            f"{file}: not found; Show-o has the tokenizer of microsoft/phi-1_5: copy its "
            "tokenizer.json"
        )
    read_json(file)  # for its messages about files that are no JSON
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the Rust parser raises a bare Exception
        raise InputError(f"{file}: not a usable tokenizer.json ({error})") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if tokenizer.token_to_id(END) is None:
        raise InputError(
            f"{file}: has no token {END!r}; expected the tokenizer of microsoft/phi-1_5"
        )
    tokenizer.add_special_tokens([AddedToken(PAD, special=True, normalized=False)])
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in CONTROLS])
    return tokenizer


def find_special_tokens(tokenizer: Any, vocab_size: int, codebook_size: int) -> SpecialTokens:
    """Returns the ids of a tokenizer's structural tokens, in a network with `vocab_size` rows.

    Raises:
        InputError: tokens, image codes and the mask token are not as many as the rows.
    """
    num_tokens = tokenizer.get_vocab_size(with_added_tokens=True)
    expected = vocab_size - codebook_size - 1
    if num_tokens != expected:
        raise InputError(
            f"tokenizer.json: found {num_tokens} tokens with Show-o's {1 + len(CONTROLS)}; "
            f"expected {expected}, which with {codebook_size} image codes and the mask token are "
            f"the network's {vocab_size}; copy the tokenizer that the network was trained with"
        )
    soi, eoi, _, _, t2i, mmu, *_ = (tokenizer.token_to_id(name) for name in CONTROLS)
    return SpecialTokens(
        eos=tokenizer.token_to_id(END), pad=tokenizer.token_to_id(PAD), soi=soi, eoi=eoi, t2i=t2i,
        mmu=mmu, first_code=num_tokens, mask=vocab_size - 1,
    )  # fmt: skip
