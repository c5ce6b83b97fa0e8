"""The two models that ship with the package. Recipes: docs/measured/mini.md and nano.md."""

from __future__ import annotations

from pathlib import Path

MINI_JANUS = Path(__file__).parent / "mini_janus"
NANO_JANUS = Path(__file__).parent / "nano_janus"
