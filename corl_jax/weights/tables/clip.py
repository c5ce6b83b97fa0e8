"""CLIP in the layouts of transformers and of open_clip.

open_clip fuses q, k and v, multiplies its projections from the right, and PickScore's and HPS
v2's checkpoints are of the one and the other layout.
Sources: transformers 5.23 `models/clip`; open_clip 3.3 `model.py`, `transformer.py`.
"""

from __future__ import annotations

from corl_jax.weights.table import CONV, DENSE, SAME, Row, Table
from corl_jax.weights.tables.rows import dense, embedding, norm

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def _transformers_layer(key: str, path: str) -> list[Row]:
    torch, leaf = f"{key}.encoder.layers.{{layer}}", f"{path}/layers"
    return [
        *norm(f"{torch}.layer_norm1", f"{leaf}/layer_norm1"),
        *norm(f"{torch}.layer_norm2", f"{leaf}/layer_norm2"),
        *(
            row
            for name in (*_PROJECTIONS, "out_proj")
            for row in dense(f"{torch}.self_attn.{name}", f"{leaf}/attn/{name}")
        ),
        *dense(f"{torch}.mlp.fc1", f"{leaf}/mlp/fc1"),
        *dense(f"{torch}.mlp.fc2", f"{leaf}/mlp/fc2"),
    ]


def _open_clip_layer(key: str, path: str) -> list[Row]:
    torch, leaf = f"{key}.resblocks.{{layer}}", f"{path}/layers"
    return [
        *norm(f"{torch}.ln_1", f"{leaf}/layer_norm1"),
        *norm(f"{torch}.ln_2", f"{leaf}/layer_norm2"),
        *(
            Row(f"{torch}.attn.in_proj_{name}", f"{leaf}/attn/{part}/{field}", how, (i, 3))
            for name, field, how in (("weight", "kernel", DENSE), ("bias", "bias", SAME))
            for i, part in enumerate(_PROJECTIONS)
        ),
        *dense(f"{torch}.attn.out_proj", f"{leaf}/attn/out_proj"),
        *dense(f"{torch}.mlp.c_fc", f"{leaf}/mlp/fc1"),
        *dense(f"{torch}.mlp.c_proj", f"{leaf}/mlp/fc2"),
    ]


_TRANSFORMERS = Table(
    name="transformers",
    rows=(
        Row("vision_model.embeddings.class_embedding", "vision_model/class_embedding"),
        Row(
            "vision_model.embeddings.patch_embedding.weight",
            "vision_model/patch_embedding/kernel",
            CONV,
        ),
        *embedding(
            "vision_model.embeddings.position_embedding.weight", "vision_model/position_embedding"
        ),
        *norm("vision_model.pre_layrnorm", "vision_model/pre_layernorm"),
        *_transformers_layer("vision_model", "vision_model"),
        *norm("vision_model.post_layernorm", "vision_model/post_layernorm"),
        *dense("visual_projection", "visual_projection", bias=False),
        *embedding("text_model.embeddings.token_embedding.weight", "text_model/token_embedding"),
        *embedding(
            "text_model.embeddings.position_embedding.weight", "text_model/position_embedding"
        ),
        *_transformers_layer("text_model", "text_model"),
        *norm("text_model.final_layer_norm", "text_model/final_layernorm"),
        *dense("text_projection", "text_projection", bias=False),
        Row("logit_scale", "logit_scale"),
    ),
    dropped=(r"(vision|text)_model\.embeddings\.position_ids",),
)

_OPEN_CLIP = Table(
    name="open_clip",
    rows=(
        Row("visual.class_embedding", "vision_model/class_embedding"),
        Row("visual.conv1.weight", "vision_model/patch_embedding/kernel", CONV),
        *embedding("visual.positional_embedding", "vision_model/position_embedding"),
        *norm("visual.ln_pre", "vision_model/pre_layernorm"),
        *_open_clip_layer("visual.transformer", "vision_model"),
        *norm("visual.ln_post", "vision_model/post_layernorm"),
        Row("visual.proj", "visual_projection/kernel"),
        *embedding("token_embedding.weight", "text_model/token_embedding"),
        *embedding("positional_embedding", "text_model/position_embedding"),
        *_open_clip_layer("transformer", "text_model"),
        *norm("ln_final", "text_model/final_layernorm"),
        Row("text_projection", "text_projection/kernel"),
        Row("logit_scale", "logit_scale"),
    ),
    dropped=(r"attn_mask",),
)

TABLES: dict[str, Table] = {"transformers": _TRANSFORMERS, "open_clip": _OPEN_CLIP}
