"""transformers' layouts of BlipForConditionalGeneration (`model_type: blip`).

Vision attention has one fused qkv (rows q, k, v along axis 0). The head's bias has two names
that transformers ties: `predictions.bias`, which it saves, and `predictions.decoder.bias`, which
computes. The published .bin file holds both, so that one goes first: a layout is chosen by the
tensors that it knows, and the first among equals. `decoder.weight` may be there or not in
either; see `tie_word_embeddings`.

Source: transformers 5.23 `models/blip`.
"""

from __future__ import annotations

from corl_jax.weights.table import DENSE, DROP_LEADING, SAME, Row, Table
from corl_jax.weights.tables.rows import conv, dense, embedding, norm

_VISION, _SEEN = "vision_model.encoder.layers.{layer}", "vision_model/layers"
_TEXT, _WRITTEN = "text_decoder.bert.encoder.layer.{layer}", "text_decoder/layers"
_EMBEDDINGS, _HEAD = "text_decoder.bert.embeddings", "text_decoder.cls.predictions"


def _fused_qkv() -> list[Row]:
    return [
        Row(f"{_VISION}.self_attn.qkv.{leaf}", f"{_SEEN}/attn/{name}/{field}", how, (i, 3))
        for leaf, field, how in (("weight", "kernel", DENSE), ("bias", "bias", SAME))
        for i, name in enumerate(("q_proj", "k_proj", "v_proj"))
    ]


def _attention(key: str, path: str) -> list[Row]:
    """One of a decoder layer's two attentions, with the norm behind it."""
    return [
        *dense(f"{_TEXT}.{key}.self.query", f"{_WRITTEN}/{path}/q_proj"),
        *dense(f"{_TEXT}.{key}.self.key", f"{_WRITTEN}/{path}/k_proj"),
        *dense(f"{_TEXT}.{key}.self.value", f"{_WRITTEN}/{path}/v_proj"),
        *dense(f"{_TEXT}.{key}.output.dense", f"{_WRITTEN}/{path}/out_proj"),
        *norm(f"{_TEXT}.{key}.output.LayerNorm", f"{_WRITTEN}/{path}_layernorm"),
    ]


_ROWS = (
    *conv("vision_model.embeddings.patch_embedding", "vision_model/patch_embedding"),
    *embedding(
        "vision_model.embeddings.class_embedding", "vision_model/class_embedding", DROP_LEADING
    ),
    *embedding(
        "vision_model.embeddings.position_embedding",
        "vision_model/position_embedding",
        DROP_LEADING,
    ),
    *norm(f"{_VISION}.layer_norm1", f"{_SEEN}/layer_norm1"),
    *_fused_qkv(),
    *dense(f"{_VISION}.self_attn.projection", f"{_SEEN}/attn/out_proj"),
    *norm(f"{_VISION}.layer_norm2", f"{_SEEN}/layer_norm2"),
    *dense(f"{_VISION}.mlp.fc1", f"{_SEEN}/mlp/fc1"),
    *dense(f"{_VISION}.mlp.fc2", f"{_SEEN}/mlp/fc2"),
    *norm("vision_model.post_layernorm", "vision_model/post_layernorm"),
    *embedding(f"{_EMBEDDINGS}.word_embeddings.weight", "text_decoder/word_embeddings"),
    *embedding(f"{_EMBEDDINGS}.position_embeddings.weight", "text_decoder/position_embeddings"),
    *norm(f"{_EMBEDDINGS}.LayerNorm", "text_decoder/embed_layernorm"),
    *_attention("attention", "attn"),
    *_attention("crossattention", "cross_attn"),
    *dense(f"{_TEXT}.intermediate.dense", f"{_WRITTEN}/mlp/fc1"),
    *dense(f"{_TEXT}.output.dense", f"{_WRITTEN}/mlp/fc2"),
    *norm(f"{_TEXT}.output.LayerNorm", f"{_WRITTEN}/mlp_layernorm"),
    *dense(f"{_HEAD}.transform.dense", "text_decoder/head/dense"),
    *norm(f"{_HEAD}.transform.LayerNorm", "text_decoder/head/layernorm"),
    *dense(f"{_HEAD}.decoder", "text_decoder/head", bias=False),
)
_POSITION_IDS = r"text_decoder\.bert\.embeddings\.position_ids"

TABLES: dict[str, Table] = {
    "published": Table(
        name="published",
        rows=(*_ROWS, Row(f"{_HEAD}.decoder.bias", "text_decoder/head/bias")),
        dropped=(_POSITION_IDS, r"text_decoder\.cls\.predictions\.bias"),
    ),
    "transformers": Table(
        name="transformers",
        rows=(*_ROWS, Row(f"{_HEAD}.bias", "text_decoder/head/bias")),
        dropped=(_POSITION_IDS,),
    ),
}
