"""Builds the rows that both PyTorch layouts share: the Llama decoder and the VQ autoencoder."""

from __future__ import annotations

from corl_jax.weights.table import Row
from corl_jax.weights.table_rows import conv, dense, embedding, norm


def make_llama_rows(key: str, path: str) -> list[Row]:
    """Makes the rows of a Llama decoder without its head."""
    # RoPE is rotate-half in both layouts, so q and k need no permutation.
    torch, leaf = f"{key}.layers.{{layer}}", f"{path}/layers"
    return [
        *embedding(f"{key}.embed_tokens.weight", f"{path}/embed_tokens"),
        *norm(f"{torch}.input_layernorm", f"{leaf}/input_layernorm", bias=False),
        *norm(f"{torch}.post_attention_layernorm", f"{leaf}/post_attention_layernorm", bias=False),
        *(
            row
            for name in ("q_proj", "k_proj", "v_proj", "o_proj")
            for row in dense(f"{torch}.self_attn.{name}", f"{leaf}/attn/{name}", bias=False)
        ),
        *(
            row
            for name in ("gate_proj", "up_proj", "down_proj")
            for row in dense(f"{torch}.mlp.{name}", f"{leaf}/mlp/{name}", bias=False)
        ),
        *norm(f"{key}.norm", f"{path}/norm", bias=False),
    ]


def make_vq_code_rows(key: str, path: str) -> list[Row]:
    """Makes the rows of the codebook and of the 1x1 convolutions before and after it."""
    return [
        *embedding(f"{key}.quantize.embedding.weight", f"{path}/quantize"),
        *conv(f"{key}.quant_conv", f"{path}/quant_conv"),
        *conv(f"{key}.post_quant_conv", f"{path}/post_quant_conv"),
    ]
