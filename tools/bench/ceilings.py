"""Measures the rates of the device, in the same run as the results that are compared with them.

A rate comes from the difference of two times: of few calls and of many calls, dispatched one after
another without waiting. It does not include the cost of starting and waiting on the host.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from tools.bench.timing import Record, Timing, measure

FEW, MANY = 4, 24  # calls


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """Rates of the first device."""

    copy: float  # bytes a second read and written, the best of several programs
    matmul: float  # bfloat16 operations a second


@functools.partial(jax.jit, donate_argnums=0)
def _rewrite(x: jax.Array) -> jax.Array:
    """Reads and writes all of x in its place; values stay in [0, 1]."""
    return 1 - x


@jax.jit
def _copy(x: jax.Array) -> jax.Array:
    return jnp.copy(x)


@jax.jit
def _multiply(x: jax.Array, matrix: jax.Array) -> jax.Array:
    return matrix @ x


COPIES: dict[str, tuple[Callable[[jax.Array], jax.Array], Any]] = {
    "1 - x in place, float32": (_rewrite, jnp.float32),
    "1 - x in place, bfloat16": (_rewrite, jnp.bfloat16),
    "to another buffer": (_copy, jnp.float32),
}


def measure_ceilings(copied: int, product: int, repeats: int) -> tuple[Ceilings, list[Record]]:
    """Measures copies of `copied` bytes, and products of square matrices of `product` rows."""
    copies = [*_measure_copies(copied, repeats)]
    matmul = _measure_product(product, repeats)
    best = max(record.figures["tb_per_s"] for record in copies)
    rates = Ceilings(best * 1e12, matmul.figures["tflop_per_s"] * 1e12)
    return rates, [*copies, matmul]


def _measure_copies(copied: int, repeats: int) -> Iterator[Record]:
    for name, (program, dtype) in COPIES.items():
        x = jnp.zeros((copied // (1024 * jnp.dtype(dtype).itemsize), 1024), dtype)
        # Each byte is read and written.
        moved = 2 * x.nbytes
        timing, seconds = _time_calls(program, x, repeats)
        yield Record("ceiling", f"copy: {name}", timing, {"tb_per_s": moved / seconds / 1e12})


def _measure_product(side: int, repeats: int) -> Record:
    keys = jax.random.split(jax.random.key(0, impl="rbg"))
    # With this scale the entries of the products keep their size: a chain of calls stays finite.
    matrix = jax.random.normal(keys[0], (side, side), jnp.bfloat16) * side**-0.5
    x = jax.random.normal(keys[1], (side, side), jnp.bfloat16)
    timing, seconds = _time_calls(functools.partial(_multiply, matrix=matrix), x, repeats)
    # A product and a sum for each of side^3 terms.
    rate = 2 * side**3 / seconds / 1e12
    return Record("ceiling", f"bfloat16 product, {side}^3", timing, {"tflop_per_s": rate})


def _time_calls(
    program: Callable[[jax.Array], jax.Array], x: jax.Array, repeats: int
) -> tuple[Timing, float]:
    """Returns the timing of many calls, each on the last one's result, and seconds of one call."""

    def run(calls: int) -> Timing:
        def run_chain() -> jax.Array:
            nonlocal x
            for _ in range(calls):
                x = program(x)
            return x

        return measure(run_chain, repeats)

    few, many = run(FEW), run(MANY)
    seconds = (many.median - few.median) / (MANY - FEW)
    # If the work is smaller than the host's noise, the cost of a call counts too.
    return many, seconds if seconds > 0 else many.median / MANY
