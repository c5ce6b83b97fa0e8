"""The weights that ship with the package. Recipes of the models: docs/measured/."""

from __future__ import annotations

from pathlib import Path

MINI_JANUS = Path(__file__).parent / "mini_janus"
NANO_JANUS = Path(__file__).parent / "nano_janus"
NANO_SHOW_O = Path(__file__).parent / "nano_show_o"
NANO_JANUS_FLOW = Path(__file__).parent / "nano_janus_flow"

LPIPS_HEADS = Path(__file__).parent / "lpips_vgg" / "heads.safetensors"
"""The heads of LPIPS on VGG16, of lpips 0.1.4 (BSD-2-Clause, see LICENSE beside the file)."""

SHIPPED = {
    "mini": MINI_JANUS,
    "nano": NANO_JANUS,
    "nano-show-o": NANO_SHOW_O,
    "nano-janus-flow": NANO_JANUS_FLOW,
}
"""Name of a shipped model, wherever a command takes a directory or a hub id -> its directory."""
