"""How a sampler is compiled: with the options of XLA that pay for the rows that it decodes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.core import Tracer

from corl_jax.models.attention import on_nvidia
from corl_jax.sharding import batch_ways

MANY_ROWS = 64
"""Rows a device from which the option below pays."""
WITHOUT_TRITON = {"xla_gpu_enable_triton_gemm": False}
"""Dense products by cuBLAS alone. XLA's autotuner times each by itself and mostly prefers its own
Triton kernels; in a whole step of many rows they are slower, of few rows faster."""


class Decoding:
    """A jitted sampler in two builds, of which a call takes the faster one."""

    def __init__(self, function: Callable, *, static_argnames: Sequence[str]):
        build: Any = functools.partial(jax.jit, function, static_argnames=static_argnames)
        self.usual = build()
        self.for_many_rows = build(compiler_options=WITHOUT_TRITON)

    def built_for(self, rows: int, *arguments: Any) -> Callable:
        """The build for `rows` rows, of all devices of the mesh together.

        `arguments`: arrays of the call. If one is traced the program becomes a part of another,
        and XLA takes options for whole programs only.
        """
        nested = any(isinstance(x, Tracer) for x in jax.tree.leaves(arguments))
        many = rows >= MANY_ROWS * batch_ways()
        return self.for_many_rows if many and not nested and on_nvidia() else self.usual
