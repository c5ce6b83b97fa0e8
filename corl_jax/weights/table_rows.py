"""Builds the rows of a key table for one layer of PyTorch.

In: dense("fc1", "mlp/fc1")  Out: fc1.weight [out, in] -> mlp/fc1/kernel [in, out], and the bias
"""

from __future__ import annotations

from corl_jax.weights.table import CONV, DENSE, SAME, Row, Transform


def dense(key: str, path: str, bias: bool = True) -> list[Row]:
    """Returns the rows of a linear layer."""
    rows = [Row(f"{key}.weight", f"{path}/kernel", DENSE)]
    return [*rows, Row(f"{key}.bias", f"{path}/bias")] if bias else rows


def conv(key: str, path: str) -> list[Row]:
    """Returns the rows of a convolution."""
    return [Row(f"{key}.weight", f"{path}/kernel", CONV), Row(f"{key}.bias", f"{path}/bias")]


def norm(key: str, path: str, bias: bool = True) -> list[Row]:
    """Returns the rows of a normalisation layer, whose weight is the scale."""
    rows = [Row(f"{key}.weight", f"{path}/scale")]
    return [*rows, Row(f"{key}.bias", f"{path}/bias")] if bias else rows


def embedding(key: str, path: str, transform: Transform = SAME) -> list[Row]:
    """Returns the row of an embedding; `key` is the whole key of its tensor."""
    return [Row(key, f"{path}/embedding", transform)]
