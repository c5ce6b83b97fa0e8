"""Tables of the parameters of a Janus: place on a mesh, compute dtype, trained or not."""

from __future__ import annotations

from jax.sharding import PartitionSpec

from corl_jax.devices.mesh import Rules

# Pixels show the rounding of bfloat16.
FLOAT32_PARTS = ("vqmodel",)
"""Parts that compute in float32 in any compute dtype."""

TRAINABLE = ("language_model/.*", "lm_head/.*")
"""Regexes of the parameters that CoRL trains."""

GROUPS = {
    "language_model": ("language_model/.*", "lm_head/.*"),
    "image_head": ("generation_.*",),  # codes in, logits of codes out
    "image_encoder": ("vision_model/.*", "aligner/.*"),
    "image_tokenizer": ("vqmodel/.*",),
}
"""Name -> regexes of the parameters that can have a learning rate of their own."""

TOKENIZER_PARTS = ("vqmodel",)
"""Parts that turn pixels into codes and back; only the stage vq trains them."""

ADAPTER_TARGETS = (
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
)  # fmt: skip
"""Projections of each layer of the language model that can have an adapter."""

ADAPTER_PATHS = "language_model/layers/.*/lora_[ab]"
"""Regex of the adapters' parameters."""

_WHOLE = PartitionSpec()
# Column then row: the activations between two matrices stay split over `tensor`, so that a pair
# costs one sum over devices. `fsdp` splits the other axis for storage only.
_INNER, _OUTER = PartitionSpec("fsdp", "tensor"), PartitionSpec("tensor", "fsdp")
_COLUMN = PartitionSpec(None, "fsdp", "tensor")  # [L, in, out], outputs split
_ROW = PartitionSpec(None, "tensor", "fsdp")  # [L, in, out], inputs split
RULES: Rules = (
    (r"(language_model|vision_model)/layers/attn/[qkv]_proj/kernel", _COLUMN),
    (r"(language_model|vision_model)/layers/attn/(o_proj|out_proj)/kernel", _ROW),
    (r"language_model/layers/mlp/(gate|up)_proj/kernel", _COLUMN),
    (r"language_model/layers/mlp/down_proj/kernel", _ROW),
    (r"language_model/layers/.*/(q|k|v|gate|up)_proj/lora_a", PartitionSpec(None, "fsdp")),
    (r"language_model/layers/.*/(q|k|v|gate|up)_proj/lora_b", PartitionSpec(None, None, "tensor")),
    (r"language_model/layers/.*/(o|down)_proj/lora_a", PartitionSpec(None, "tensor")),
    (r"language_model/layers/.*/(o|down)_proj/lora_b", PartitionSpec(None, None, "fsdp")),
    (r"vision_model/layers/mlp/fc1/kernel", _COLUMN),
    (r"vision_model/layers/mlp/fc2/kernel", _ROW),
    (r"language_model/embed_tokens/embedding", _OUTER),  # vocabulary over `tensor`
    (r"lm_head/kernel", _INNER),
    (r"generation_head/(proj_out|vision_head)/kernel", _INNER),
    (r"(generation_)?aligner/hidden_layers/\d+/kernel", _INNER),
    (r"aligner/fc1/kernel", _INNER),
    (r"generation_aligner/fc1/kernel", PartitionSpec(None, "tensor")),  # [8, D]: 8 is too few
    (r"(language_model|vision_model)/.*(norm|norm1|norm2|layernorm)/(scale|bias)", _WHOLE),
    (r"vision_model/(patch_embedding|position_embedding)/.*", _WHOLE),
    (r".*/bias", _WHOLE),
    (r"generation_embeddings/embedding", _WHOLE),
    (r"vqmodel/.*", _WHOLE),  # 72 million parameters: small beside the language model
)
"""Layout of each parameter on a mesh, by its path."""
