"""Options of the commands that sample: given, or stated by the checkpoint, or the default."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from typing import Any

from corl_jax.errors import InputError

DEFAULTS: dict[str, Any] = {
    "cfg_scale": 5.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 512,
    "instruction": "none",
}  # fmt: skip
"""What holds where neither the command line nor the checkpoint's generation_config.json says."""
HARMLESS = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}  # values that change no draw


def describe_default(name: str) -> str:
    """For --help: where an option's value comes from if it is not given."""
    return f"default: as the checkpoint states, else {_shown(DEFAULTS[name])}"


def temperature_problems(value: float | None) -> list[str]:
    """A problem for a temperature that divides no logits; 0 is what others call greedy."""
    if value is None or 0 < value < math.inf:
        return []
    remedy = "; give --greedy in its place to take the likeliest" if value == 0 else ""
    return [f"--temperature: found {value}; expected a number above 0{remedy}"]


def complete_options(args: argparse.Namespace, names: Sequence[str]) -> list[str]:
    """Sets `greedy` and those of `names` that were not given; returns problems of the file.

    A model that is no folder is no problem here: whoever loads it tells. `args.sampling` becomes
    the values with where each comes from, `args.not_applied` what else the file asks for.
    """
    from corl_jax.policies.generation_config import NOTHING_STATED, read_generation
    from corl_jax.weights.hub import resolve_model_dir

    problems, stated = [], NOTHING_STATED
    try:
        folder = resolve_model_dir(args.model)
    except InputError:
        folder = None
    try:
        stated = read_generation(folder) if folder else stated
    except InputError as error:
        problems = error.problems
    if args.greedy is None:  # an option of sampling asks for it, whatever the checkpoint states
        asked = any(getattr(args, name, None) is not None for name in HARMLESS)
        args.greedy = stated.is_greedy and not asked
    shown = ["greedy"] if args.greedy else []
    for name in names:
        if name in HARMLESS and args.greedy:
            continue
        key = {"cfg_scale": "guidance_scale"}.get(name, name)
        sources = {
            "given": getattr(args, name),
            "checkpoint": getattr(stated, key),
            "default": DEFAULTS[name],
        }
        source, value = next((s, v) for s, v in sources.items() if v is not None)
        setattr(args, name, value)
        shown.append(f"{name} {_shown(value)} ({source})")
    args.sampling, args.not_applied = ", ".join(shown), list(stated.not_applied)
    for name in () if args.greedy else ("top_k", "top_p"):
        value = getattr(stated, name)
        if name not in names and value not in (None, HARMLESS[name]):
            args.not_applied.append(f"{name} {value:g}")
    return problems


def tell_sampling(args: argparse.Namespace) -> None:
    """Says on stderr how is sampled, and what the checkpoint asks for that is not done."""
    print(f"sampling: {args.sampling}", file=sys.stderr)
    if args.not_applied:
        print(
            f"note: generation_config.json also has {', '.join(args.not_applied)}, which has no "
            "effect on what this command samples",
            file=sys.stderr,
        )


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:g}"
