"""The two models that ship with the package; docs/mini.md and docs/nano.md have their recipes."""

from __future__ import annotations

from pathlib import Path

MINI_JANUS = Path(__file__).parent / "mini_janus"
NANO_JANUS = Path(__file__).parent / "nano_janus"
