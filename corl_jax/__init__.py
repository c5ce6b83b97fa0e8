"""Reinforcement learning for models that understand and generate images, in JAX."""

from __future__ import annotations

import importlib.metadata

try:
    __version__ = importlib.metadata.version("corl-jax")
except importlib.metadata.PackageNotFoundError:  # a clone that is not installed
    __version__ = "0+unknown"
