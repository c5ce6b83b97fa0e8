"""`STARTS`: the models that the quickstart can train."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Start:
    """A shipped model and the config that trains it."""

    title: str
    model: str  # name of the shipped model
    folder: str  # of the converted model, in the folder of the quickstart
    source: str  # whose layout the shipped files have
    config: str
    out: str  # default folder of the quickstart


STARTS = {
    "janus": Start(
        "The nano Janus", "nano", "nano_janus", "transformers", "quickstart", "runs/quickstart"
    ),
    "show-o": Start(
        "The nano Show-o", "nano-show-o", "nano_show_o", "the original code",
        "nano_show_o/unified", "runs/quickstart_show_o",
    ),
    "janus-flow": Start(
        "The nano JanusFlow", "nano-janus-flow", "nano_janus_flow", "the original code",
        "nano_janus_flow/unified", "runs/quickstart_janus_flow",
    ),
}  # fmt: skip
"""Name in the option --model -> what the quickstart trains."""

DEFAULT = "janus"
"""The model of a quickstart without the option."""
