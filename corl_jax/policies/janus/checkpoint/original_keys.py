"""The layout of the original Janus package (`model_type: multi_modality`).

Vision attention has one fused qkv (rows q, k, v along axis 0). The attention-pool head and the
codebook's usage buffer are in the files, but no forward pass of Janus reads them.
Source: deepseek-ai/Janus, `janus/models`.
"""

from __future__ import annotations

from corl_jax.policies.janus.checkpoint.key_rows import llama, vq_codes, vq_half
from corl_jax.weights.table import DENSE, DROP_LEADING, SAME, Row, Table
from corl_jax.weights.table_rows import conv, dense, embedding, norm

_BLOCK = "vision_model.vision_tower.blocks.{layer}"
_MID = ("0", "1", "2")
_MAX_PROJECTOR_DEPTH = 8


def _fused_qkv() -> list[Row]:
    return [
        Row(f"{_BLOCK}.attn.qkv.{leaf}", f"vision_model/layers/attn/{name}/{field}", how, (i, 3))
        for leaf, field, how in (("weight", "kernel", DENSE), ("bias", "bias", SAME))
        for i, name in enumerate(("q_proj", "k_proj", "v_proj"))
    ]


def _projector(key: str, path: str) -> list[Row]:
    # Linear layers have the even places of a Sequential, activations the odd ones.
    rows = dense(f"{key}.layers.0", f"{path}/fc1")
    for i in range(_MAX_PROJECTOR_DEPTH - 1):
        rows += dense(f"{key}.layers.{2 * i + 2}", f"{path}/hidden_layers/{i}")
    return rows


TABLE = Table(
    name="original",
    rows=(
        *llama("language_model.model", "language_model"),
        *dense("language_model.lm_head", "lm_head", bias=False),
        *conv("vision_model.vision_tower.patch_embed.proj", "vision_model/patch_embedding"),
        *embedding(
            "vision_model.vision_tower.pos_embed", "vision_model/position_embedding", DROP_LEADING
        ),
        *norm(f"{_BLOCK}.norm1", "vision_model/layers/layer_norm1"),
        *norm(f"{_BLOCK}.norm2", "vision_model/layers/layer_norm2"),
        *_fused_qkv(),
        *dense(f"{_BLOCK}.attn.proj", "vision_model/layers/attn/out_proj"),
        *dense(f"{_BLOCK}.mlp.fc1", "vision_model/layers/mlp/fc1"),
        *dense(f"{_BLOCK}.mlp.fc2", "vision_model/layers/mlp/fc2"),
        *norm("vision_model.vision_tower.norm", "vision_model/post_layernorm"),
        *_projector("aligner", "aligner"),
        *embedding("gen_embed.weight", "generation_embeddings"),
        *_projector("gen_aligner", "generation_aligner"),
        *dense("gen_head.output_mlp_projector", "generation_head/proj_out"),
        *dense("gen_head.vision_head", "generation_head/vision_head"),
        *vq_half(
            "gen_vision_model.encoder",
            "vqmodel/encoder",
            "conv_blocks",
            "res",
            _MID,
            "downsample",
            "down",
        ),
        *vq_half(
            "gen_vision_model.decoder",
            "vqmodel/decoder",
            "conv_blocks",
            "res",
            _MID,
            "upsample",
            "up",
        ),
        *vq_codes("gen_vision_model", "vqmodel"),
    ),
    carried=(
        r"vision_model\.vision_tower\.attn_pool\..+",
        r"gen_vision_model\.quantize\.codebook_used",
    ),
    dropped=(r".*\.rotary_emb\.inv_freq",),
)
