"""Reads and writes the Llama section of both PyTorch layouts, with LlamaConfig's defaults."""

from __future__ import annotations

from typing import Any

from corl_jax.models.llama import LlamaConfig
from corl_jax.weights.foreign_config import Fields


def parse_llama(fields: Fields) -> LlamaConfig:
    """Reads the sizes of a `text_config` or `language_config`."""
    # Defaults are those of transformers' LlamaConfig: the published 7B file omits most sizes.
    fields.expect("model_type", ("llama",), "Janus decodes with a Llama")
    fields.expect("hidden_act", ("silu",), "the only activation implemented")
    for name in ("attention_bias", "mlp_bias", "tie_word_embeddings"):
        fields.expect(name, (False,), "no released Janus has it")
    hidden = fields.size("hidden_size", 4096)
    heads = fields.size("num_attention_heads", 32)
    return LlamaConfig(
        vocab_size=fields.size("vocab_size", 32000),
        hidden_size=hidden,
        intermediate_size=fields.size("intermediate_size", 11008),
        num_layers=fields.size("num_hidden_layers", 32, limit=10_000),
        num_heads=heads,
        num_kv_heads=fields.size("num_key_value_heads", heads),
        head_dim=fields.size("head_dim", max(1, hidden // heads)),
        rope_theta=_parse_rope_theta(fields),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        max_position_embeddings=fields.size("max_position_embeddings", 2048),
    )


def _parse_rope_theta(fields: Fields) -> float:
    """Reads `rope_theta` from the section itself or from `rope_parameters`."""
    # transformers 4 writes the first, 5 the second.
    theta = fields.number("rope_theta", 10000.0)
    for name in ("rope_scaling", "rope_parameters"):
        section = fields.section(name)
        kind = "rope_type" if section.has("rope_type") else "type"
        section.expect(kind, ("default",), "scaled RoPE is not implemented")
        theta = section.number("rope_theta", theta)
    return theta


def write_llama(llama: LlamaConfig) -> dict[str, Any]:
    """Returns all sizes as JSON."""
    # All, because readers differ in their defaults.
    fields: dict[str, Any] = {
        "model_type": "llama",
        "vocab_size": llama.vocab_size,
        "hidden_size": llama.hidden_size,
        "intermediate_size": llama.intermediate_size,
        "num_hidden_layers": llama.num_layers,
        "num_attention_heads": llama.num_heads,
        "num_key_value_heads": llama.num_kv_heads,
        "max_position_embeddings": llama.max_position_embeddings,
        "rms_norm_eps": llama.rms_norm_eps,
        "rope_theta": llama.rope_theta,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }
    if llama.head_dim * llama.num_heads != llama.hidden_size:
        fields["head_dim"] = llama.head_dim
    return fields
