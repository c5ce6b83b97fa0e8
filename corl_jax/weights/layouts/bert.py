"""BERT's layouts: inside a model with heads, old and new, and as a bare encoder.

Source: transformers `models/bert`; google-bert/bert-base-uncased, sentence-transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from corl_jax.errors import Problems
from corl_jax.models.bert import Bert, BertConfig
from corl_jax.weights.foreign_config import Fields, check_divisible
from corl_jax.weights.kinds import COLUMN, OUTER, ROW, WHOLE, NetworkKind, Rules
from corl_jax.weights.storage import read_json
from corl_jax.weights.table import Row, Shape, Table
from corl_jax.weights.table_rows import dense, embedding, norm

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


def _make_legacy_norm_rows(key: str, path: str) -> list[Row]:
    # Names of files from before 2020, such as that of bert-base-uncased.
    return [Row(f"{key}.gamma", f"{path}/scale"), Row(f"{key}.beta", f"{path}/bias")]


def _make_table(name: str, prefix: str, *, legacy: bool = False) -> Table:
    rows = [
        row
        for kind in _EMBEDDINGS
        for row in embedding(f"{prefix}embeddings.{kind}.weight", f"embeddings/{kind}")
    ]
    for key, path in _LINEAR:
        rows += dense(f"{prefix}encoder.layer.{{layer}}.{key}", f"layers/{path}")
    for key, path in _NORMS:
        rows += (_make_legacy_norm_rows if legacy else norm)(f"{prefix}{key}", path)
    start = prefix.replace(".", r"\.")
    return Table(
        name=name,
        rows=tuple(rows),
        # Scores need the hidden states only: no pooler, and no head of the pre-training.
        dropped=(
            rf"{start}embeddings\.(position_ids|token_type_ids)",
            rf"{start}pooler\.dense\.(weight|bias)",
            r"cls\.(predictions|seq_relationship)\..+",
        ),
    )


TABLES: dict[str, Table] = {
    "bert": _make_table("bert", "bert."),
    "bert_legacy": _make_table("bert_legacy", "bert.", legacy=True),
    "encoder": _make_table("encoder", ""),
}


FEWEST_POSITIONS = 3  # [CLS], a token, [SEP]


def check(config: BertConfig, where: str) -> list[str]:
    """Lists sizes that do not fit each other."""
    heads = ("hidden_size", config.hidden_size, "num_heads", config.num_heads)
    problems = check_divisible(where, heads)
    if config.max_position_embeddings < FEWEST_POSITIONS:
        problems.append(
            f"{where}.max_position_embeddings is {config.max_position_embeddings}, expected at "
            f"least {FEWEST_POSITIONS}: a text stands between two special tokens"
        )
    return problems


def parse(folder: Path, layout: str, shapes: Mapping[str, Shape], problems: Problems) -> BertConfig:
    """Returns the sizes of config.json; adds unsupported settings to `problems`.

    Raises: InputError for a config.json that is absent or cannot be read.
    """
    # The file is necessary: q, k and v have the same shape for any number of heads.
    file = folder / "config.json"
    fields = Fields(str(file), read_json(file), problems)
    fields.expect("model_type", ("bert",), "the only text encoder implemented")
    fields.expect("hidden_act", ("gelu",), "the only activation implemented")
    fields.expect("position_embedding_type", ("absolute",), "the only kind implemented")
    for name in ("is_decoder", "add_cross_attention"):
        fields.expect(name, (False,), "a decoder is not implemented")
    hidden, heads = fields.size("hidden_size", 768), fields.size("num_attention_heads", 12)
    if hidden % heads:
        problems.add(
            f"{file}: num_attention_heads is {heads}, expected a divisor of hidden_size {hidden}"
        )
    return BertConfig(
        vocab_size=fields.size("vocab_size", 30522),
        hidden_size=hidden,
        intermediate_size=fields.size("intermediate_size", 3072),
        num_layers=fields.size("num_hidden_layers", 12, limit=10_000),
        num_heads=heads,
        max_position_embeddings=fields.size("max_position_embeddings", 512),
        type_vocab_size=fields.size("type_vocab_size", 2),
        layer_norm_eps=fields.number("layer_norm_eps", 1e-12),
    )


RULES: Rules = (
    (r"layers/attn/[qkv]_proj/kernel", COLUMN),
    (r"layers/attn/out_proj/kernel", ROW),
    (r"layers/mlp/fc1/kernel", COLUMN),
    (r"layers/mlp/fc2/kernel", ROW),
    (r"embeddings/word_embeddings/embedding", OUTER),
    (r"embeddings/(position|token_type)_embeddings/embedding", WHOLE),
    (r".*layernorm/scale", WHOLE),
    (r".*/bias", WHOLE),
)

KIND = NetworkKind(
    name="bert",
    module=Bert,
    config=BertConfig,
    tables=TABLES,
    parse=parse,
    check=check,
    rules=RULES,
    model_types={"bert": None},
)
