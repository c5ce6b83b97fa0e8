"""The layouts of BERT: inside a model with heads, old and new, and as a bare encoder.

Files from before 2020 call a norm's parameters gamma and beta; bert-base-uncased still does.
Source: transformers `models/bert`; google-bert/bert-base-uncased, sentence-transformers.
"""

from __future__ import annotations

from corl_jax.weights.table import Row, Table
from corl_jax.weights.tables.rows import dense, embedding, norm

_LINEAR = (
    ("attention.self.query", "attn/q_proj"),
    ("attention.self.key", "attn/k_proj"),
    ("attention.self.value", "attn/v_proj"),
    ("attention.output.dense", "attn/out_proj"),
    ("intermediate.dense", "mlp/fc1"),
    ("output.dense", "mlp/fc2"),
)
_NORMS = (
    ("embeddings.LayerNorm", "embeddings/layernorm"),
    ("encoder.layer.{layer}.attention.output.LayerNorm", "layers/attn_layernorm"),
    ("encoder.layer.{layer}.output.LayerNorm", "layers/mlp_layernorm"),
)
_EMBEDDINGS = ("word_embeddings", "position_embeddings", "token_type_embeddings")


def _legacy_norm(key: str, path: str) -> list[Row]:
    return [Row(f"{key}.gamma", f"{path}/scale"), Row(f"{key}.beta", f"{path}/bias")]


def _table(name: str, prefix: str, *, legacy: bool = False) -> Table:
    rows = [
        row
        for kind in _EMBEDDINGS
        for row in embedding(f"{prefix}embeddings.{kind}.weight", f"embeddings/{kind}")
    ]
    for key, path in _LINEAR:
        rows += dense(f"{prefix}encoder.layer.{{layer}}.{key}", f"layers/{path}")
    for key, path in _NORMS:
        rows += (_legacy_norm if legacy else norm)(f"{prefix}{key}", path)
    start = prefix.replace(".", r"\.")
    return Table(
        name=name,
        rows=tuple(rows),
        dropped=(
            rf"{start}embeddings\.(position_ids|token_type_ids)",
            rf"{start}pooler\.dense\.(weight|bias)",
            r"cls\.(predictions|seq_relationship)\..+",
        ),
    )


TABLES: dict[str, Table] = {
    "bert": _table("bert", "bert."),
    "bert_legacy": _table("bert_legacy", "bert.", legacy=True),
    "encoder": _table("encoder", ""),
}
