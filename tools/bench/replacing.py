"""Replaces a function inside of a jitted program while something is measured."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import ModuleType
from unittest import mock

from corl_jax.devices.compiling import SamplerProgram


@contextlib.contextmanager
def replace_inside(
    program: SamplerProgram, module: ModuleType, name: str, function: Callable
) -> Iterator[None]:
    """Replaces `module.name`, which `program` calls, in the block."""
    program.clear_cache()  # jit does not notice the replaced function
    try:
        with mock.patch.object(module, name, function):
            yield
    finally:
        program.clear_cache()
