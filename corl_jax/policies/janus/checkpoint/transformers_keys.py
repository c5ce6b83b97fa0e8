"""The layout of transformers' JanusForConditionalGeneration (`model_type: janus`).

Source: transformers 5.23 `models/janus`.
"""

from __future__ import annotations

from corl_jax.policies.janus.checkpoint.key_rows import (
    make_llama_rows,
    make_vq_code_rows,
)
from corl_jax.weights.autoencoder_rows import make_vq_half_rows
from corl_jax.weights.table import Row, Table
from corl_jax.weights.table_rows import conv, dense, embedding, norm

_LAYER = "model.vision_model.encoder.layers.{layer}"
_MID = ("block_1", "attn_1", "block_2")


def _make_projector_rows(key: str, path: str) -> list[Row]:
    return [
        *dense(f"{key}.fc1", f"{path}/fc1"),
        *dense(f"{key}.hidden_layers.{{i}}", f"{path}/hidden_layers/{{i}}"),
    ]


TABLE = Table(
    name="transformers",
    rows=(
        *make_llama_rows("model.language_model", "language_model"),
        *dense("lm_head", "lm_head", bias=False),
        *conv("model.vision_model.embeddings.patch_embedding", "vision_model/patch_embedding"),
        *embedding(
            "model.vision_model.embeddings.position_embedding.weight",
            "vision_model/position_embedding",
        ),
        *norm(f"{_LAYER}.layer_norm1", "vision_model/layers/layer_norm1"),
        *norm(f"{_LAYER}.layer_norm2", "vision_model/layers/layer_norm2"),
        *dense(f"{_LAYER}.self_attn.q_proj", "vision_model/layers/attn/q_proj"),
        *dense(f"{_LAYER}.self_attn.k_proj", "vision_model/layers/attn/k_proj"),
        *dense(f"{_LAYER}.self_attn.v_proj", "vision_model/layers/attn/v_proj"),
        *dense(f"{_LAYER}.self_attn.projection_layer", "vision_model/layers/attn/out_proj"),
        *dense(f"{_LAYER}.mlp.fc1", "vision_model/layers/mlp/fc1"),
        *dense(f"{_LAYER}.mlp.fc2", "vision_model/layers/mlp/fc2"),
        *norm("model.vision_model.post_layernorm", "vision_model/post_layernorm"),
        *_make_projector_rows("model.aligner", "aligner"),
        *embedding("model.generation_embeddings.weight", "generation_embeddings"),
        *_make_projector_rows("model.generation_aligner", "generation_aligner"),
        *dense("model.generation_head.proj_out", "generation_head/proj_out"),
        *dense("model.generation_head.vision_head", "generation_head/vision_head"),
        *make_vq_half_rows(
            "model.vqmodel.encoder", "vqmodel/encoder", "down", "block", _MID, "downsample", "down"
        ),
        *make_vq_half_rows(
            "model.vqmodel.decoder", "vqmodel/decoder", "up", "block", _MID, "upsample", "up"
        ),
        *make_vq_code_rows("model.vqmodel", "vqmodel"),
    ),
    # Buffers that a reader computes from the config.
    dropped=(r"model\.vision_model\.embeddings\.position_ids", r".*\.rotary_emb\.inv_freq"),
)
