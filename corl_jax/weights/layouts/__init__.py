"""The kinds of reward networks, each in a file with its settings, key table and sharding rules."""

from __future__ import annotations

from corl_jax.weights.kinds import NetworkKind
from corl_jax.weights.layouts import aesthetic, bert, blip, clip, mask2former, vgg

KINDS: dict[str, NetworkKind] = {
    kind.name: kind
    for kind in (
        bert.KIND,
        blip.KIND,
        clip.KIND,
        vgg.KIND,
        aesthetic.KIND,
        mask2former.KIND,
    )
}
"""Every kind of reward network by its name."""
