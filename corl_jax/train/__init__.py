"""Trainings. The package is a function as well: `corl_jax.train(config)`."""

from __future__ import annotations

import sys
import types
from typing import Any


class _CallablePackage(types.ModuleType):
    """A package that can be called."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls `from_python.train`."""
        from corl_jax.train.from_python import train

        return train(*args, **kwargs)


# An import of any module of this package sets the attribute `train` of `corl_jax` to the package,
# so the function of that name has to be the package itself.
sys.modules[__name__].__class__ = _CallablePackage
