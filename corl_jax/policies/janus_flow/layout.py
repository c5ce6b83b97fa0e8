"""Tables of the parameters of a JanusFlow: place on a mesh, compute dtype, trained or not."""

from __future__ import annotations

from jax.sharding import PartitionSpec

from corl_jax.devices.mesh import Rules

# Pixels show the rounding of bfloat16.
FLOAT32_PARTS = ("vae",)
"""Parts that compute in float32 in any compute dtype."""

TRAINABLE = ("language_model/.*", "lm_head/.*", "generation_.*")
"""Regexes of the parameters that are trained: all that text or a velocity depends on."""

GROUPS = {
    "language_model": ("language_model/.*", "lm_head/.*"),
    # around the language model: latents in, velocities out, and the projector of training
    "image_head": ("generation_.*", "alignment_projector/.*"),
    # `begin_embedding` has no gradient, as in the original: a rate of its group can only decay it.
    "image_encoder": ("vision_model/.*", "aligner/.*", "begin_embedding"),
    "image_tokenizer": ("vae/.*",),
}
"""Name -> regexes of the parameters that can have a learning rate of their own."""

TOKENIZER_PARTS = ("vae",)
"""Parts that turn pixels into latents and back."""

ADAPTER_TARGETS = (
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
)  # fmt: skip
"""Projections of each layer of the language model that can have an adapter."""

ALIGNMENT_PATHS = "alignment_projector/.*"
"""Regex of the parameters that only training has: no checkpoint and no export."""

ADAPTER_PATHS = "language_model/layers/.*/lora_[ab]"
"""Regex of the adapters' parameters."""

_WHOLE = PartitionSpec()
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
    (r"(vision_model/layers/mlp|generation_(en|de)coder/layers)/fc1/kernel", _COLUMN),
    (r"(vision_model/layers/mlp|generation_(en|de)coder/layers)/fc2/kernel", _ROW),
    (r"language_model/embed_tokens/embedding", _OUTER),  # vocabulary over `tensor`
    (r"lm_head/kernel", _INNER),
    (r"((generation_)?aligner|alignment_projector/fc\d)/kernel", _INNER),
    (r"generation_projection/kernel", _INNER),
    (r"generation_encoder/time_embedding/fc1/kernel", _INNER),
    (r"generation_encoder/time_embedding/fc2/kernel", _OUTER),
    # Scale and shift are of whole maps, so their channels stay together.
    (r"generation_(en|de)coder/layers/film/kernel", PartitionSpec(None, "fsdp")),
    (r"generation_(en|de)coder/layers/(depthwise|response_norm)/.*", _WHOLE),
    (r"generation_encoder/patch_embedding/kernel", _WHOLE),
    (r"generation_decoder/output/kernel", _WHOLE),
    (r"vision_model/(patch_embedding|position_embedding)/.*", _WHOLE),
    (r".*norm\d?/(scale|bias)", _WHOLE),
    (r".*/bias", _WHOLE),
    (r"begin_embedding", _WHOLE),
    (r"vae/.*", _WHOLE),  # 84 million parameters: small beside the language model
)
"""Layout of each parameter on a mesh, by its path."""
