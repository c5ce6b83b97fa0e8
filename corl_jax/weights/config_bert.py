"""transformers' config.json for BERT, read with BertConfig's defaults."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from corl_jax.models.bert import BertConfig
from corl_jax.weights.foreign_config import Fields, indivisible
from corl_jax.weights.storage import read_json
from corl_jax.weights.table import Shape

FEWEST_POSITIONS = 3  # [CLS], a token, [SEP]


def check(config: BertConfig, where: str) -> list[str]:
    """Sizes that do not fit each other."""
    heads = ("hidden_size", config.hidden_size, "num_heads", config.num_heads)
    problems = indivisible(where, heads)
    if config.max_position_embeddings < FEWEST_POSITIONS:
        problems.append(
            f"{where}.max_position_embeddings is {config.max_position_embeddings}, expected at "
            f"least {FEWEST_POSITIONS}: a text stands between two special tokens"
        )
    return problems


def parse(
    folder: Path, layout: str, shapes: Mapping[str, Shape], problems: list[str]
) -> BertConfig:
    """The sizes that a folder's config.json means; unsupported settings are added to `problems`.

    There is no doing without the file: no tensor's shape tells the number of heads.

    Raises: InputError for a config.json that is absent or cannot be read.
    """
    file = folder / "config.json"
    fields = Fields(str(file), read_json(file), problems)
    fields.expect("model_type", ("bert",), "the only text encoder implemented")
    fields.expect("hidden_act", ("gelu",), "the only activation implemented")
    fields.expect("position_embedding_type", ("absolute",), "the only kind implemented")
    for name in ("is_decoder", "add_cross_attention"):
        fields.expect(name, (False,), "a decoder is not implemented")
    hidden, heads = fields.size("hidden_size", 768), fields.size("num_attention_heads", 12)
    if hidden % heads:
        problems.append(
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
