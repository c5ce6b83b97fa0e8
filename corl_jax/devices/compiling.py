"""How a sampler is compiled: with the options of XLA that pay on the device at hand."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.core import Tracer

from corl_jax.devices.mesh import context_batch_shards
from corl_jax.models.attention import on_nvidia

logger = logging.getLogger(__name__)

CONCURRENT = ("xla_gpu_command_buffer_scheduling_mode", "CONCURRENT")
"""In a CUDA graph a kernel waits for those alone whose results it takes. The same kernels run, but
not in single file: a decode step has many that are too small to fill the device."""
WITHOUT_TRITON = ("xla_gpu_enable_triton_gemm", False)
"""Dense products by cuBLAS alone. XLA's autotuner times each by itself and mostly prefers its own
Triton kernels; in a whole step of many rows they are slower, of few rows faster."""
MANY_ROWS = 64
"""Rows a device from which the latter pays."""
BUILDS = ("usual", "for_few_rows", "for_many_rows")


class SamplerProgram:
    """A jitted sampler in BUILDS with other options each, of which a call takes the fastest."""

    def __init__(self, function: Callable, *, static_argnames: Sequence[str]):
        self._build: Any = functools.partial(jax.jit, function, static_argnames=static_argnames)

    @functools.cached_property
    def usual(self) -> Any:
        """With XLA's own options."""
        return self._build()

    @functools.cached_property
    def for_few_rows(self) -> Any:
        """On NVIDIA GPUs."""
        return self._build(compiler_options=accepted(CONCURRENT))

    @functools.cached_property
    def for_many_rows(self) -> Any:
        """On NVIDIA GPUs, from MANY_ROWS a device."""
        return self._build(compiler_options=accepted(CONCURRENT, WITHOUT_TRITON))

    def built_for(self, rows: int, *arguments: Any) -> Callable:
        """The build for `rows` rows, of all devices of the mesh together.

        `arguments`: arrays of the call. If one is traced the program becomes a part of another,
        and XLA takes options for whole programs only.
        """
        nested = any(isinstance(x, Tracer) for x in jax.tree.leaves(arguments))
        if nested or not on_nvidia():
            return self.usual
        return (
            self.for_many_rows if rows >= MANY_ROWS * context_batch_shards() else self.for_few_rows
        )

    def clear_cache(self) -> None:
        """Forgets what was traced and compiled."""
        for name in BUILDS:
            if name in vars(self):
                getattr(self, name).clear_cache()


def accepted(*options: tuple[str, Any]) -> dict[str, Any]:
    """Those options that this XLA knows: they come and go, and an unknown one fails a program."""
    return {name: value for name, value in options if _known(name, value)}


@functools.cache
def _known(name: str, value: Any) -> bool:
    try:
        jax.jit(lambda x: x, compiler_options={name: value}).lower(0).compile()
    except jax.errors.JaxRuntimeError as error:
        logger.warning("samplers do without XLA's %s=%s: %s", name, value, error)
        return False
    return True


class _CompileSeconds:
    """Adds up what this process spends on tracing and compiling."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def add(self, event: str, duration_secs: float, **_: object) -> None:
        if event.startswith("/jax/core/compile/"):
            self.seconds += duration_secs


@functools.cache
def _counter() -> _CompileSeconds:
    """The counter of the process: jax keeps a listener until its end."""
    counter = _CompileSeconds()
    jax.monitoring.register_event_duration_secs_listener(counter.add)
    return counter


def take_compile_seconds() -> float:
    """Returns the seconds of tracing and compiling since the last call, or the first one's 0."""
    counter = _counter()
    seconds, counter.seconds = counter.seconds, 0.0
    return seconds
