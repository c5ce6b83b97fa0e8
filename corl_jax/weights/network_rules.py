"""Sharding rules of the reward networks."""

from __future__ import annotations

from jax.sharding import PartitionSpec

from corl_jax.devices.mesh import Rules

_WHOLE = PartitionSpec()
_INNER, _OUTER = PartitionSpec("fsdp", "tensor"), PartitionSpec("tensor", "fsdp")
_COLUMN = PartitionSpec(None, "fsdp", "tensor")  # [L, in, out], outputs split
_ROW = PartitionSpec(None, "tensor", "fsdp")  # [L, in, out], inputs split
NETWORK_RULES: Rules = (
    (r"(.*/)?layers/(cross_)?attn/[qkv]_proj/kernel", _COLUMN),
    (r"(.*/)?layers/(cross_)?attn/out_proj/kernel", _ROW),
    (r"(.*/)?layers/mlp/fc1/kernel", _COLUMN),
    (r"(.*/)?layers/mlp/fc2/kernel", _ROW),
    (r".*/(word_embeddings|token_embedding)/embedding", _OUTER),
    (r"(text_projection|visual_projection|text_decoder/head(/dense)?)/kernel", _INNER),
    (r"(.*/)?(layer_?norm[12]?|\w+_layer_?norm)/(scale|bias)", _WHOLE),
    (r"vision_model/(patch_embedding|position_embedding|class_embedding)(/.*)?", _WHOLE),
    (r".*/(position|token_type)_embeddings?/embedding", _WHOLE),
    (r"(stages|heads)/.*/kernel", _WHOLE),  # LPIPS: 59 MB of convolutions
    (r"layers/\d+/kernel", _WHOLE),  # the aesthetic head: 4 MB
    (r"logit_scale", _WHOLE),
    (r".*/bias", _WHOLE),
)
"""Those of the networks in `weights.networks.KINDS`."""
