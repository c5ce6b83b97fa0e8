"""Completes the sampling options of commands: as given, or as the checkpoint states, or default."""

from __future__ import annotations

import argparse
import math
import numbers
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from corl_jax.config.fields import LARGEST, LEAST
from corl_jax.errors import InputError

if TYPE_CHECKING:
    from corl_jax.policies.family import Family

DEFAULTS: dict[str, Any] = {
    "cfg_scale": 5.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 512,
    "instruction": "none",
}  # fmt: skip
"""Values for options that neither the command line nor generation_config.json states.

A family may have others, see `policies.family.Family.defaults`.
"""
FLOAT32 = f"expected a number that float32 holds, of {LEAST:.2g} to {LARGEST:.2g}"
HARMLESS = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}  # values that change no distribution


def choose_cfg_scale(stated: float | None, family: Family) -> float:
    """Returns the guidance of images: as stated, or else the family's own."""
    return {**DEFAULTS, **family.defaults}["cfg_scale"] if stated is None else stated


def describe_default(name: str) -> str:
    """Returns, for --help, the source of an option's value if it is not given."""
    return f"default: as the checkpoint states, else {_format_value(DEFAULTS[name])}"


def spell_option(name: str) -> str:
    """Returns an option as commands take it: cfg_scale -> --cfg-scale."""
    return f"--{name.replace('_', '-')}"


def is_number(value: Any, *, whole: bool = False) -> bool:
    """Returns whether a value is a number, also of NumPy; with `whole` an integer."""
    return isinstance(value, numbers.Integral if whole else numbers.Real)


def find_temperature_problems(
    value: Any, spell: Callable[[str], str] = spell_option, *, takes_greedy: bool = True
) -> list[str]:
    """Returns a problem for a temperature that cannot divide logits.

    `spell` returns the name of an option in messages. `takes_greedy`: `greedy` may be advised.
    """
    if value is None or (is_number(value) and LEAST <= value <= LARGEST):
        return []
    if is_number(value) and 0 < value < math.inf:
        return [f"{spell('temperature')}: found {value}; {FLOAT32}"]
    # Other programs take 0 for greedy decoding.
    remedy = f"; give {spell('greedy')} in its place to take the likeliest"
    shown = remedy if value == 0 and takes_greedy else ""
    return [f"{spell('temperature')}: found {value}; expected a number above 0{shown}"]


def complete_options(args: argparse.Namespace, names: Sequence[str]) -> list[str]:
    """Sets `greedy` and each option of `names` that was not given; returns problems of the file.

    `args.sampling` becomes a text with each value and its source. `args.not_applied` becomes the
    list of settings of the file that have no effect.
    """
    from corl_jax.policies import find_family
    from corl_jax.policies.generation_config import NOTHING_STATED, read_generation
    from corl_jax.weights.hub import resolve_model_dir

    problems, stated, defaults = [], NOTHING_STATED, DEFAULTS
    try:
        folder = resolve_model_dir(args.model)
    except InputError:
        folder = None  # the function that loads the model reports it
    try:
        if folder:
            # Guidance of another kind of model would draw worse images than no choice at all.
            defaults = {**DEFAULTS, **find_family(folder).defaults}
            stated = read_generation(folder)
    except InputError as error:
        problems = error.problems
    if args.greedy is None:
        # Who gives --temperature, --top-k or --top-p wants samples, whatever the checkpoint states.
        has_sampling_option = any(getattr(args, name, None) is not None for name in HARMLESS)
        args.greedy = stated.is_greedy and not has_sampling_option
    shown = ["greedy"] if args.greedy else []
    for name in names:
        if name in HARMLESS and args.greedy:
            continue
        key = {"cfg_scale": "guidance_scale"}.get(name, name)
        sources = {
            "given": getattr(args, name),
            "checkpoint": getattr(stated, key),
            "default": defaults[name],
        }
        # The first source with a value wins: a dict keeps its order.
        source, value = next((s, v) for s, v in sources.items() if v is not None)
        setattr(args, name, value)
        shown.append(f"{name} {_format_value(value)} ({source})")
    args.sampling, args.not_applied = ", ".join(shown), list(stated.not_applied)
    for name in () if args.greedy else ("top_k", "top_p"):
        value = getattr(stated, name)
        if name not in names and value not in (None, HARMLESS[name]):
            args.not_applied.append(f"{name} {value:g}")
    return problems


def tell_sampling(args: argparse.Namespace) -> None:
    """Prints to stderr the sampling settings, and settings of the checkpoint without an effect."""
    print(f"sampling: {args.sampling}", file=sys.stderr)
    if args.not_applied:
        print(
            f"note: generation_config.json also has {', '.join(args.not_applied)}, which has no "
            "effect on what this command samples",
            file=sys.stderr,
        )


def _format_value(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:g}"
