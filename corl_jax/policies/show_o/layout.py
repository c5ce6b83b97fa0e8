"""Tables of the parameters of a Show-o: place on a mesh, compute dtype, trained or not."""

from __future__ import annotations

from jax.sharding import PartitionSpec

from corl_jax.devices.mesh import Rules

# A rounded latent can change its sign, which is a bit of a code.
FLOAT32_PARTS = ("vqmodel",)
"""Parts that compute in float32 in any compute dtype."""

TRAINABLE = ("language_model/.*", "lm_head/.*")
"""Regexes of the parameters that are trained."""

# Image codes are words of the language model, so there is no part for them alone.
GROUPS = {
    "language_model": ("language_model/.*", "lm_head/.*"),
    "image_encoder": ("vision_tower/.*", "mm_projector/.*"),
    "image_tokenizer": ("vqmodel/.*",),
}
"""Name -> regexes of the parameters that can have a learning rate of their own."""

# The original's list also has norms and embeddings, under names that no parameter has.
UNDECAYED = (".*/bias",)
"""Regexes of the parameters without weight decay, as in Show-o's own training."""

TOKENIZER_PARTS = ("vqmodel",)
"""Parts that turn pixels into codes and back."""

ADAPTER_TARGETS = ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2")
"""Projections of each layer of the language model that can have an adapter."""

ADAPTER_PATHS = "language_model/layers/.*/lora_[ab]"
"""Regex of the adapters' parameters."""

_WHOLE = PartitionSpec()
_COLUMN = PartitionSpec(None, "fsdp", "tensor")  # [L, in, out], outputs split
_ROW = PartitionSpec(None, "tensor", "fsdp")  # [L, in, out], inputs split
RULES: Rules = (
    (r"language_model/layers/attn/[qkv]_proj/kernel", _COLUMN),
    (r"language_model/layers/attn/dense/kernel", _ROW),
    (r"language_model/layers/mlp/fc1/kernel", _COLUMN),
    (r"language_model/layers/mlp/fc2/kernel", _ROW),
    (r"language_model/layers/.*/(q_proj|k_proj|v_proj|fc1)/lora_a", PartitionSpec(None, "fsdp")),
    (
        r"language_model/layers/.*/(q_proj|k_proj|v_proj|fc1)/lora_b",
        PartitionSpec(None, None, "tensor"),
    ),
    (r"language_model/layers/.*/(dense|fc2)/lora_a", PartitionSpec(None, "tensor")),
    (r"language_model/layers/.*/(dense|fc2)/lora_b", PartitionSpec(None, None, "fsdp")),
    # 58,498 tokens are 2 x 29,249: only two devices could share the vocabulary.
    (r"language_model/embed_tokens/embedding", PartitionSpec(None, "fsdp")),
    (r"lm_head/kernel", PartitionSpec("fsdp")),
    (r"mm_projector/fc\d/kernel", PartitionSpec("fsdp", "tensor")),
    (r"vision_tower/layers/(attn/[qkv]_proj|mlp/fc1)/kernel", _COLUMN),
    (r"vision_tower/layers/(attn/out_proj|mlp/fc2)/kernel", _ROW),
    (r"vision_tower/.*", _WHOLE),
    (r"language_model/.*norm/(scale|bias)", _WHOLE),
    (r".*/bias", _WHOLE),
    (r"vqmodel/.*", _WHOLE),  # 95 million parameters: small beside the language model
)
"""Layout of each parameter on a mesh, by its path."""
