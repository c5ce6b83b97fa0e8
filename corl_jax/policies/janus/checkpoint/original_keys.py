"""The layout of the original Janus package (`model_type: multi_modality`).

Source: deepseek-ai/Janus, `janus/models`.
"""

from __future__ import annotations

from corl_jax.policies.janus.checkpoint.key_rows import (
    make_llama_rows,
    make_siglip_rows,
    make_vq_code_rows,
)
from corl_jax.weights.autoencoder_rows import make_vq_half_rows
from corl_jax.weights.table import Row, Table
from corl_jax.weights.table_rows import dense, embedding

_MID = ("0", "1", "2")
_MAX_PROJECTOR_DEPTH = 8


def _make_projector_rows(key: str, path: str) -> list[Row]:
    # Linear layers have the even places of a Sequential, activations the odd ones.
    rows = dense(f"{key}.layers.0", f"{path}/fc1")
    for i in range(_MAX_PROJECTOR_DEPTH - 1):
        rows += dense(f"{key}.layers.{2 * i + 2}", f"{path}/hidden_layers/{i}")
    return rows


TABLE = Table(
    name="original",
    rows=(
        *make_llama_rows("language_model.model", "language_model"),
        *dense("language_model.lm_head", "lm_head", bias=False),
        *make_siglip_rows("vision_model.vision_tower", "vision_model"),
        *_make_projector_rows("aligner", "aligner"),
        *embedding("gen_embed.weight", "generation_embeddings"),
        *_make_projector_rows("gen_aligner", "generation_aligner"),
        *dense("gen_head.output_mlp_projector", "generation_head/proj_out"),
        *dense("gen_head.vision_head", "generation_head/vision_head"),
        *make_vq_half_rows(
            "gen_vision_model.encoder",
            "vqmodel/encoder",
            "conv_blocks",
            "res",
            _MID,
            "downsample",
            "down",
        ),
        *make_vq_half_rows(
            "gen_vision_model.decoder",
            "vqmodel/decoder",
            "conv_blocks",
            "res",
            _MID,
            "upsample",
            "up",
        ),
        *make_vq_code_rows("gen_vision_model", "vqmodel"),
    ),
    # In the files, but no forward pass of Janus reads them: the attention-pool head and the usage
    # buffer of the codebook. They are carried, so that an export is complete again.
    carried=(
        r"vision_model\.vision_tower\.attn_pool\..+",
        r"gen_vision_model\.quantize\.codebook_used",
    ),
    # Computed from the config; old versions of transformers stored it.
    dropped=(r".*\.rotary_emb\.inv_freq",),
)
