"""Reinforcement learning for models that understand and generate images, in JAX.

    model = corl_jax.load("mini")
    images = model.generate_images("a red circle", n=4)
    text = model.answer(images[0], "How many circles are there?")
    result = corl_jax.train("minimal", output_dir="runs/mine")

docs/how_to/use_from_python.md explains these calls.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from corl_jax.api import load as load
    from corl_jax.train.from_python import train as train

try:
    __version__ = importlib.metadata.version("corl-jax")
except importlib.metadata.PackageNotFoundError:  # a clone that is not installed
    __version__ = "0+unknown"

__all__ = ["__version__", "load", "train"]


def __getattr__(name: str) -> Any:
    """Imports `load` and `train` when they are first used, so that `import corl_jax` is quick.

    Raises:
        AttributeError: another name.
    """
    if name == "load":
        return importlib.import_module("corl_jax.api").load
    if name == "train":
        return importlib.import_module("corl_jax.train")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Lists the names of the module, also those that are not imported yet."""
    return sorted({*globals(), *__all__})
