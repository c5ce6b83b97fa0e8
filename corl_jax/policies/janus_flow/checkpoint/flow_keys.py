"""The layout of the original JanusFlow package (`model_type: multi_modality`).

Source: deepseek-ai/Janus, `janus/janusflow/models`.
"""

from __future__ import annotations

from corl_jax.policies.janus.checkpoint.key_rows import make_llama_rows, make_siglip_rows
from corl_jax.policies.janus_flow.checkpoint.vae_files import ROWS
from corl_jax.weights.table import SAME, Row, Table
from corl_jax.weights.table_rows import conv, dense, norm

_ENCODER, _DECODER = "vision_gen_enc_model", "vision_gen_dec_model"
_TIME, _TIME_LEAF = f"{_ENCODER}.time_embed", "generation_encoder/time_embedding"
_OUTPUT = f"{_DECODER}.out_convs.0"


def _make_block_rows(key: str, path: str) -> list[Row]:
    torch, leaf = f"{key}.mid_block.res_blocks.{{layer}}", f"{path}/layers"
    return [
        *conv(f"{torch}.depthwise", f"{leaf}/depthwise"),
        *norm(f"{torch}.norm", f"{leaf}/norm", bias=False),
        *dense(f"{torch}.channelwise_linear_1", f"{leaf}/fc1"),
        *norm(f"{torch}.channelwise_norm", f"{leaf}/response_norm"),
        *dense(f"{torch}.channelwise_linear_2", f"{leaf}/fc2"),
        *dense(f"{torch}.cond_embeds_mapper", f"{leaf}/film"),
    ]


TABLE = Table(
    name="original",
    rows=(
        *make_llama_rows("language_model.model", "language_model"),
        *dense("language_model.lm_head", "lm_head", bias=False),
        *make_siglip_rows("vision_und_enc_model.vision_tower", "vision_model"),
        *dense("vision_und_enc_aligner", "aligner"),
        Row("beg_of_und_embed", "begin_embedding", SAME),
        *dense(f"{_TIME}.linear_1", f"{_TIME_LEAF}/fc1"),
        *dense(f"{_TIME}.linear_2", f"{_TIME_LEAF}/fc2"),
        *conv(f"{_ENCODER}.in_conv", "generation_encoder/patch_embedding"),
        *_make_block_rows(_ENCODER, "generation_encoder"),
        *dense("vision_gen_enc_aligner", "generation_aligner"),
        *norm("vision_gen_dec_aligner_norm", "generation_norm", bias=False),
        *dense("vision_gen_dec_aligner", "generation_projection"),
        *norm(f"{_DECODER}.input_norm", "generation_decoder/input_norm", bias=False),
        *_make_block_rows(_DECODER, "generation_decoder"),
        *norm(f"{_OUTPUT}.norm", "generation_decoder/output_norm", bias=False),
        *conv(f"{_OUTPUT}.unpatch_conv", "generation_decoder/output"),
        *ROWS,
    ),
    # In the files, but no forward pass reads it: the attention-pool head. It is carried, so that an
    # export is complete again.
    carried=(r"vision_und_enc_model\.vision_tower\.attn_pool\..+",),
    # Computed from the config; old versions of transformers stored it.
    dropped=(r".*\.rotary_emb\.inv_freq",),
)
