"""Compiles some programs with XLA options, reads XLA's flags, and measures compilation."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from corl_jax.devices.mesh import context_batch_shards

logger = logging.getLogger(__name__)

# In a CUDA graph a kernel waits only for the kernels whose results it takes. The same kernels run,
# but not one after the other: a decode step has many that are too small to fill the device.
CONCURRENT = ("xla_gpu_command_buffer_scheduling_mode", "CONCURRENT")
# Dense products by cuBLAS alone. XLA's autotuner measures each product by itself and mostly
# prefers its own Triton kernels. In a whole step they are slower for many rows, faster for few.
WITHOUT_TRITON = ("xla_gpu_enable_triton_gemm", False)
MANY_ROWS = 64
"""From this many rows per device on, cuBLAS alone is faster."""
BUILDS = ("default", "for_few_rows", "for_many_rows")


def is_nvidia(device: Any = None) -> bool:
    """Returns whether a device (default: the first one) is an NVIDIA GPU."""
    device = device or jax.devices()[0]
    return device.platform == "gpu" and "cuda" in device.client.platform_version


def has_deterministic_flag() -> bool:
    """Returns whether XLA_FLAGS asks for the same bits in each call.

    XLA also accepts a file name in XLA_FLAGS. Such a file is not read.
    """
    flags = os.environ.get("XLA_FLAGS", "").split()
    name = "--xla_gpu_deterministic_ops"
    settings = [flag.removeprefix(name).lower() for flag in flags if flag.partition("=")[0] == name]
    # XLA takes the last of several; the flag alone, without a value, means true.
    return bool(settings) and settings[-1] in ("", "=true", "=1")


class _Program:
    """A function that is jitted with several sets of XLA options."""

    def __init__(self, function: Callable, *, static_argnames: Sequence[str]):
        self._build: Any = functools.partial(jax.jit, function, static_argnames=static_argnames)

    @functools.cached_property
    def default(self) -> Any:
        """The build with the default options of XLA."""
        return self._build()


class SamplerProgram(_Program):
    """A sampler compiled with several sets of XLA options; see `choose_build`."""

    @functools.cached_property
    def for_few_rows(self) -> Any:
        """The build for NVIDIA GPUs."""
        return self._build(compiler_options=list_accepted_options(CONCURRENT))

    @functools.cached_property
    def for_many_rows(self) -> Any:
        """The build for NVIDIA GPUs and at least MANY_ROWS rows per device."""
        return self._build(compiler_options=list_accepted_options(CONCURRENT, WITHOUT_TRITON))

    def choose_build(self, rows: int, *arguments: Any) -> Callable:
        """Returns the fastest build for `rows` rows of all devices of the mesh together.

        `rows` are those of a dense product in a pass: the tokens that it reads. `arguments` are
        arrays of the call. With shapes among them the build is compiled; see `compile_ahead`.
        """
        build = self._choose_build(rows, arguments)
        shapes = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(arguments))
        return functools.partial(compile_ahead, build) if shapes else build

    def _choose_build(self, rows: int, arguments: Any) -> Callable:
        if not _takes_options(arguments):
            return self.default
        return (
            self.for_many_rows if rows >= MANY_ROWS * context_batch_shards() else self.for_few_rows
        )

    def clear_cache(self) -> None:
        """Removes everything that was traced and compiled."""
        for name in BUILDS:
            if name in vars(self):
                getattr(self, name).clear_cache()


class ExactProgram(_Program):
    """A jitted function of exact float32 products, compiled without Triton on NVIDIA GPUs.

    With Triton's kernels to choose from, such networks compile for longer than a sampler of many
    times their size (docs/measured/performance.md, compile times).
    """

    @functools.cached_property
    def without_triton(self) -> Any:
        """The build for NVIDIA GPUs."""
        return self._build(compiler_options=list_accepted_options(WITHOUT_TRITON))

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        build = self.without_triton if _takes_options(arguments) else self.default
        return build(*arguments, **options)


def _takes_options(arguments: Any) -> bool:
    """Returns whether a program of these arguments is one that XLA's options for GPUs are for."""
    # With a traced argument it becomes a part of another program, and XLA takes options for whole
    # programs only.
    nested = any(isinstance(x, Tracer) for x in jax.tree.leaves(arguments))
    return not nested and is_nvidia()


def compile_ahead(function: Any, *arguments: Any, **options: Any) -> Any:
    """Compiles a jitted function and returns zeros in the place of its results.

    `arguments` are arrays or `jax.ShapeDtypeStruct`s with shardings. A later call with arrays of
    the same shapes, types and shardings finds the program traced and compiled.
    """
    lowered = function.lower(*arguments, **options)
    shardings = lowered.compile().output_shardings
    return jax.tree.map(
        lambda x, sharding: jax.device_put(np.zeros(x.shape, x.dtype), sharding),
        lowered.out_info, shardings,
    )  # fmt: skip


def list_accepted_options(*options: tuple[str, Any]) -> dict[str, Any]:
    """Returns the options that this version of XLA knows; an unknown one fails the program."""
    return {name: value for name, value in options if _is_accepted(name, value)}


@functools.cache
def _is_accepted(name: str, value: Any) -> bool:
    try:
        # XLA has no list of its options, so an empty program is compiled with the option as a test.
        jax.jit(lambda x: x, compiler_options={name: value}).lower(0).compile()
    except jax.errors.JaxRuntimeError as error:
        logger.warning("programs do without XLA's %s=%s: %s", name, value, error)
        return False
    return True


class _CompileSeconds:
    """Adds up the seconds that this process spends on tracing and compiling."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def add(self, event: str, duration_secs: float, **_: object) -> None:
        # Tracing, lowering and compiling each send an event with this prefix.
        if event.startswith("/jax/core/compile/"):
            self.seconds += duration_secs


@functools.cache  # one per process: jax keeps a listener until the process ends
def _get_counter() -> _CompileSeconds:
    counter = _CompileSeconds()
    jax.monitoring.register_event_duration_secs_listener(counter.add)
    return counter


def take_compile_seconds() -> float:
    """Returns the seconds of tracing and compiling since the last call (first call: 0)."""
    counter = _get_counter()
    seconds, counter.seconds = counter.seconds, 0.0
    return seconds
