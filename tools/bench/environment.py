"""Says on what a measurement was made."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
from typing import Any

import jax

PACKAGES = ("jax", "jaxlib", "flax", "optax", "transformers", "numpy")


def describe_environment() -> dict[str, Any]:
    """Returns the date, the devices and the versions of a measurement."""
    device = jax.local_devices()[0]
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device.device_kind,
        "platform": device.platform,
        "devices": jax.local_device_count(),
        "versions": {"python": platform.python_version(), **versions},
    }
