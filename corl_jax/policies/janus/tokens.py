"""Reads the special tokens of a checkpoint from its tokenizer files, by string."""

from __future__ import annotations

import dataclasses
from collections.abc import Container
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
    ids = _list_vocabulary(read_tokenizer(file), file)
    problems = [
        f"{file}: has no token {string!r}; use the tokenizer that came with the checkpoint"
        for string in STRINGS.values()
        if string not in ids
    ]
    if problems:
        raise InputError(problems)
    return SpecialTokens(**{name: ids[string] for name, string in STRINGS.items()})


def read_tokenizer(file: Path) -> dict[str, Any]:
    """Returns the content of a tokenizer.json; adds the image token if that one alone is missing.

    Source: Janus `VLChatProcessor`, which adds it behind all other tokens.
    """
    data = read_json(file)
    ids = _list_vocabulary(data, file)
    if [string for string in STRINGS.values() if string not in ids] != [STRINGS["image"]]:
        return data
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    token = {"id": max(ids.values()) + 1, "content": STRINGS["image"], **flags, "special": True}
    return {**data, "added_tokens": [*(data.get("added_tokens") or ()), token]}


def choose_template(stated: Any, tokens: Container[str]) -> Any:
    """Returns the template of a checkpoint: the stated one, or that of the tokens for roles."""
    # Files from before Janus-Pro state `deepseek` too, which then had the roles of `deepseek_old`.
    if stated in (None, "deepseek"):
        has_roles = all(role in tokens for role in ROLES["deepseek"])
        return "deepseek" if has_roles else "deepseek_old"
    return stated


def _list_vocabulary(data: dict[str, Any], file: Path) -> dict[str, int]:
    """Returns the id of every token of a tokenizer.json, added tokens included."""
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
