"""Turns JAX's error of a device without memory into one with a remedy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax

from corl_jax.errors import InputError


@contextlib.contextmanager
def explain_memory(problem: str) -> Iterator[None]:
    """Raises an InputError of `problem` if the block uses up the memory of a device."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise InputError(problem) from error
