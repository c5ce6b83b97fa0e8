"""Builds the rows that several layouts share: the Llama decoder, SigLIP and the VQ autoencoder."""

from __future__ import annotations

from corl_jax.weights.table import DENSE, DROP_LEADING, SAME, Row
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


def make_siglip_rows(key: str, path: str) -> list[Row]:
    """Makes the rows of SigLIP as timm names them."""
    torch, leaf = f"{key}.blocks.{{layer}}", f"{path}/layers"
    # One fused tensor [3 * 1024, 1024]: part i of 3 along axis 0 is q, k, v in this order.
    fused = [
        Row(f"{torch}.attn.qkv.{name}", f"{leaf}/attn/{projection}/{field}", how, (i, 3))
        for name, field, how in (("weight", "kernel", DENSE), ("bias", "bias", SAME))
        for i, projection in enumerate(("q_proj", "k_proj", "v_proj"))
    ]
    return [
        *conv(f"{key}.patch_embed.proj", f"{path}/patch_embedding"),
        *embedding(f"{key}.pos_embed", f"{path}/position_embedding", DROP_LEADING),
        *norm(f"{torch}.norm1", f"{leaf}/layer_norm1"),
        *norm(f"{torch}.norm2", f"{leaf}/layer_norm2"),
        *fused,
        *dense(f"{torch}.attn.proj", f"{leaf}/attn/out_proj"),
        *dense(f"{torch}.mlp.fc1", f"{leaf}/mlp/fc1"),
        *dense(f"{torch}.mlp.fc2", f"{leaf}/mlp/fc2"),
        *norm(f"{key}.norm", f"{path}/post_layernorm"),
    ]


def make_vq_code_rows(key: str, path: str) -> list[Row]:
    """Makes the rows of the codebook and of the 1x1 convolutions before and after it."""
    return [
        *embedding(f"{key}.quantize.embedding.weight", f"{path}/quantize"),
        *conv(f"{key}.quant_conv", f"{path}/quant_conv"),
        *conv(f"{key}.post_quant_conv", f"{path}/post_quant_conv"),
    ]
