"""Reads generation_config.json, the sampling settings of a checkpoint, as transformers does.

A value that the file does not state is None. The command then uses its default.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from corl_jax.data.instructions import INSTRUCTIONS
from corl_jax.errors import InputError
from corl_jax.weights.foreign_config import MAX_SIZE
from corl_jax.weights.storage import read_json

FILE = "generation_config.json"
INSTRUCTION_KEY = "question_instruction"
"""A key of ours; transformers keeps unknown keys and does not read them."""
MAX_NUMBER = 1e9

# Keys that change the samples of transformers but have no effect here. The values are those that
# change nothing there either; they need no note.
NOT_APPLIED: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,), "min_p": (0,), "top_h": (), "typical_p": (1,), "epsilon_cutoff": (0,),
    "eta_cutoff": (0,), "repetition_penalty": (1,), "no_repeat_ngram_size": (0,),
    "min_length": (0,), "min_new_tokens": (0,), "max_length": (20,), "max_time": (),
    "stop_strings": (), "bad_words_ids": ([],), "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],), "forced_bos_token_id": (), "forced_eos_token_id": (),
    "sequence_bias": (), "exponential_decay_length_penalty": (), "penalty_alpha": (0,),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Generation:
    """The sampling settings of a generation_config.json; None for a setting it does not state."""

    guidance_scale: float | None = None  # 1: no guidance
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None  # 0: the whole vocabulary
    top_p: float | None = None
    max_new_tokens: int | None = None
    instruction: str | None = None  # one of INSTRUCTIONS
    not_applied: tuple[str, ...] = ()  # `key value` of settings without an effect here

    @property
    def is_greedy(self) -> bool:
        """True if the file asks for the most likely token."""
        # transformers decodes greedily without do_sample. The files of the released Janus lack it,
        # but their images are meant to be sampled.
        return self.do_sample is False or (self.do_sample is None and self.temperature == 0)

    def as_json(self) -> dict[str, Any]:
        """Returns the stated values by the file's keys."""
        values = {
            "do_sample": self.do_sample,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "guidance_scale": self.guidance_scale,
            "max_new_tokens": self.max_new_tokens,
            INSTRUCTION_KEY: self.instruction,
        }
        return {key: value for key, value in values.items() if value is not None}


NOTHING_STATED = Generation()


def read_generation(folder: str | Path) -> Generation:
    """Reads the file of a model directory; without a file returns NOTHING_STATED.

    Raises: InputError listing every value that cannot be used.
    """
    file = Path(folder) / FILE
    return parse_generation(read_json(file), file) if file.is_file() else NOTHING_STATED


def parse_generation(data: Mapping[str, Any], file: Path) -> Generation:
    """Parses the JSON of the file; see `read_generation`."""
    problems: list[str] = []

    def take(key: str, expected: str, fits: Any) -> Any:
        value = data.get(key)
        if value is None or fits(value):
            return value
        shown = repr(value)
        shown = shown if len(shown) <= 60 else shown[:60] + "..."
        problems.append(
            f"{file}: {key} is {shown}, expected {expected}; correct it, or remove the key for "
            "the default"
        )
        return None

    sampled = take("do_sample", "true or false", lambda value: isinstance(value, bool))
    lowest = "above 0" if sampled else "of at least 0"  # greedy decoding reads no temperature
    generation = Generation(
        guidance_scale=take("guidance_scale", "a number of at least 0", _is_at_least_zero),
        do_sample=sampled,
        temperature=take(
            "temperature", f"a number {lowest}",
            lambda value: _is_at_least_zero(value) and (value > 0 or not sampled),
        ),
        top_k=take("top_k", "a whole number of at least 0", lambda value: _is_whole(value, 0)),
        top_p=take(
            "top_p", "a number from 0 to 1", lambda value: _is_at_least_zero(value) and value <= 1
        ),
        max_new_tokens=take(
            "max_new_tokens", "a whole number of at least 1", lambda value: _is_whole(value, 1)
        ),
        instruction=take(
            INSTRUCTION_KEY, f"one of {', '.join(INSTRUCTIONS)}",
            lambda value: isinstance(value, str) and value in INSTRUCTIONS,
        ),
        not_applied=_list_not_applied(data),
    )  # fmt: skip
    if problems:
        raise InputError(problems)
    return _convert_values(generation)


def _convert_values(generation: Generation) -> Generation:
    """Returns the values as transformers applies them, in the types that the samplers take."""
    guidance, top_p = generation.guidance_scale, generation.top_p
    return dataclasses.replace(
        generation,
        # transformers has guidance above 1 only.
        guidance_scale=None if guidance is None else max(float(guidance), 1.0),
        temperature=None if generation.temperature is None else float(generation.temperature),
        # At 0 transformers keeps the most likely token, as a probability next to nothing does.
        top_p=None if top_p is None else max(float(top_p), 1e-6),
    )


def _list_not_applied(data: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(
        f"{key} {repr(data[key])[:40]}"
        for key, harmless in NOT_APPLIED.items()
        if data.get(key) is not None and data[key] not in harmless
    )


def _is_at_least_zero(value: Any) -> bool:
    # type(), because True is an int as well. The comparison is False for NaN.
    return type(value) in (int, float) and 0 <= value <= MAX_NUMBER


def _is_whole(value: Any, low: int) -> bool:
    return type(value) is int and low <= value <= MAX_SIZE
