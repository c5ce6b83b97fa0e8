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


def make_res_block_rows(key: str, path: str) -> list[Row]:
    """Returns the rows of a residual block."""
    # Not every block has a shortcut: it exists only where the width changes.
    return [
        *norm(f"{key}.norm1", f"{path}/norm1"),
        *conv(f"{key}.conv1", f"{path}/conv1"),
        *norm(f"{key}.norm2", f"{path}/norm2"),
        *conv(f"{key}.conv2", f"{path}/conv2"),
        *conv(f"{key}.nin_shortcut", f"{path}/nin_shortcut"),
    ]


def make_attn_block_rows(key: str, path: str) -> list[Row]:
    """Returns the rows of an attention block."""
    rows = norm(f"{key}.norm", f"{path}/norm")
    for name in ("q", "k", "v", "proj_out"):
        rows += conv(f"{key}.{name}", f"{path}/{name}")
    return rows


def make_vq_half_rows(
    key: str,
    path: str,
    level: str,
    block: str,
    mid: tuple[str, str, str],
    resample: str,
    leaf_level: str,
) -> list[Row]:
    """Makes the rows of the encoder or the decoder; `level`, `block`, `mid` are torch names."""
    # {i} is the level and {j} the block of a level. Both layouts and ours number the decoder's
    # levels in the order in which they run, so that the numbers stay.
    torch, leaf = f"{key}.{level}.{{i}}", f"{path}/{leaf_level}/{{i}}"
    return [
        *conv(f"{key}.conv_in", f"{path}/conv_in"),
        *make_res_block_rows(f"{torch}.{block}.{{j}}", f"{leaf}/block/{{j}}"),
        *make_attn_block_rows(f"{torch}.attn.{{j}}", f"{leaf}/attn/{{j}}"),
        *conv(f"{torch}.{resample}.conv", f"{leaf}/{resample}/conv"),
        *make_res_block_rows(f"{key}.mid.{mid[0]}", f"{path}/mid/block_1"),
        *make_attn_block_rows(f"{key}.mid.{mid[1]}", f"{path}/mid/attn_1"),
        *make_res_block_rows(f"{key}.mid.{mid[2]}", f"{path}/mid/block_2"),
        *norm(f"{key}.norm_out", f"{path}/norm_out"),
        *conv(f"{key}.conv_out", f"{path}/conv_out"),
    ]


def make_vq_code_rows(key: str, path: str) -> list[Row]:
    """Makes the rows of the codebook and of the 1x1 convolutions before and after it."""
    return [
        *embedding(f"{key}.quantize.embedding.weight", f"{path}/quantize"),
        *conv(f"{key}.quant_conv", f"{path}/quant_conv"),
        *conv(f"{key}.post_quant_conv", f"{path}/post_quant_conv"),
    ]
