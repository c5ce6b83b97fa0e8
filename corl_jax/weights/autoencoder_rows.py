"""Builds the rows of a key table for the halves of a convolutional autoencoder of VQGAN's kind."""

from __future__ import annotations

from corl_jax.weights.table import Row
from corl_jax.weights.table_rows import conv, norm


def make_res_block_rows(key: str, path: str, shortcut: str = "nin_shortcut") -> list[Row]:
    """Returns the rows of a residual block; `shortcut` is a torch name."""
    # Not every block has a shortcut: it exists only where the width changes.
    return [
        *norm(f"{key}.norm1", f"{path}/norm1"),
        *conv(f"{key}.conv1", f"{path}/conv1"),
        *norm(f"{key}.norm2", f"{path}/norm2"),
        *conv(f"{key}.conv2", f"{path}/conv2"),
        *conv(f"{key}.{shortcut}", f"{path}/nin_shortcut"),
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
    # {i} is the level and {j} the block of a level. Our networks number the levels as their files
    # do, so that the numbers stay.
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
