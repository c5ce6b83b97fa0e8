"""The kinds of networks beside the policies: those of rewards, and the VAE of latents.

Each is in a file with its settings, key table and sharding rules.
"""

from __future__ import annotations

from corl_jax.weights.kinds import NetworkKind
from corl_jax.weights.layouts import aesthetic, bert, blip, clip, mask2former, sd_vae, vgg

KINDS: dict[str, NetworkKind] = {
    kind.name: kind
    for kind in (
        bert.KIND,
        blip.KIND,
        clip.KIND,
        vgg.KIND,
        aesthetic.KIND,
        mask2former.KIND,
        sd_vae.KIND,
    )
}
"""Every such kind by its name."""
