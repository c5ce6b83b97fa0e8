"""The two models that ship with the package. Recipes: docs/measured/mini.md and nano.md."""

from __future__ import annotations

from pathlib import Path

MINI_JANUS = Path(__file__).parent / "mini_janus"
NANO_JANUS = Path(__file__).parent / "nano_janus"

SHIPPED = {"mini": MINI_JANUS, "nano": NANO_JANUS}
"""Name of a shipped model, wherever a command takes a directory or a hub id -> its directory."""
