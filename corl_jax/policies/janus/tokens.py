"""Reads the special tokens of a checkpoint from its tokenizer files, by string."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from corl_jax.errors import InputError
from corl_jax.weights.storage import read_json


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """Ids of the structural tokens."""

    # Never hard-coded: the pad id is 100002 in Janus-Pro-1B and 100015 in Janus-Pro-7B.

    bos: int
    eos: int
    pad: int
    boi: int  # <begin_of_image>
    eoi: int  # <end_of_image>
    image: int  # <image_placeholder>; one for each image token of an understanding prompt


STRINGS = {
    "bos": "<｜begin▁of▁sentence｜>",
    "eos": "<｜end▁of▁sentence｜>",
    "pad": "<｜▁pad▁｜>",
    "boi": "<begin_of_image>",
    "eoi": "<end_of_image>",
    "image": "<image_placeholder>",
}
"""The strings of every released Janus."""

ROLES = {"deepseek": ("<|User|>", "<|Assistant|>"), "deepseek_old": ("User", "Assistant")}
"""Chat template -> names of user and assistant; those of `deepseek` are single tokens."""

ROLE_NAMES = {"pro": "deepseek", "old": "deepseek_old"}
"""Choice of chat roles -> its template."""


def special_tokens(folder: str | Path) -> SpecialTokens:
    """Reads the ids of the structural tokens from `tokenizer.json`, by string.

    Raises: InputError listing the strings that the tokenizer lacks.
    """
    file = Path(folder) / "tokenizer.json"
    if not file.is_file():
        raise InputError(f"{file}: not found; copy it from the checkpoint's own repository")
    ids = read_vocabulary(file)
    problems = [
        f"{file}: has no token {string!r}; use the tokenizer that came with the checkpoint"
        for string in STRINGS.values()
        if string not in ids
    ]
    if problems:
        raise InputError(problems)
    return SpecialTokens(**{name: ids[string] for name, string in STRINGS.items()})


def read_vocabulary(file: Path) -> dict[str, int]:
    """Returns the id of every token of a tokenizer.json, added tokens included."""
    data = read_json(file)
    vocab = _as_dict(data.get("model")).get("vocab")
    ids: dict[str, Any] = dict(vocab) if isinstance(vocab, dict) else {}
    if isinstance(vocab, list):  # a Unigram model lists [token, score] pairs
        ids = {pair[0]: i for i, pair in enumerate(vocab) if isinstance(pair, list) and pair}
    # After the model's vocabulary: an added token wins, as in the tokenizers library.
    for token in data.get("added_tokens") or ():
        token = _as_dict(token)
        ids[str(token.get("content"))] = token.get("id")
    bad = [token for token, number in ids.items() if type(number) is not int]
    if bad:
        raise InputError(f"{file}: token {bad[0]!r} has no whole number as its id")
    return ids


def _as_dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
