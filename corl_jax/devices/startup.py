"""Prepares JAX for a command: its settings, the cache of compiled programs, its devices."""

from __future__ import annotations

import contextlib
import glob
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

import jax
from jax.extend.backend import register_backend_factory

from corl_jax.config.schema import Distributed
from corl_jax.devices import processes
from corl_jax.errors import InputError
from corl_jax.input_files import expand_path

PLATFORMS = "jax_platforms"
CACHE_DIR = "jax_compilation_cache_dir"
CACHE_ENABLED = "jax_enable_compilation_cache"
LEAST_SECONDS = "jax_persistent_cache_min_compile_time_secs"
JAX_DEFAULT_SECONDS = 1.0
TPU_DEVICE_FILES = ("/dev/accel*", "/dev/vfio/[0-9]*")
TPU_VARIABLES = (
    "TPU_NAME", "TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES", "TPU_ACCELERATOR_TYPE",
    "JAX_FORCE_TPU_INIT",
)  # fmt: skip
"""Environment variables that TPU machines and their users set."""
_GUARDS = (None, "allow", "log", "log_explicit")
ACCEPTED_SETTINGS: dict[str, tuple[tuple[Any, ...], str]] = {
    "jax_enable_x64": ((False,), "programs compute with 32 bits"),
    "jax_numpy_dtype_promotion": (("standard",), "float32 meets bfloat16 in every network"),
    "jax_numpy_rank_promotion": (("allow", "warn"), "biases and masks are broadcast"),
    "jax_debug_nans": ((False,), "NaN stands for a reward that does not apply"),
    "jax_debug_infs": ((False,), "masked logits are infinite"),
    "jax_error_checking_behavior_nan": (("ignore",), "it ends the samplers in an error of JAX"),
    "jax_error_checking_behavior_divide": (("ignore",), "it ends the samplers in an error of JAX"),
    "jax_error_checking_behavior_oob": (("ignore",), "it ends the samplers in an error of JAX"),
    "jax_disable_jit": ((False,), "a step without compilation takes hours"),
    "jax_default_prng_impl": (("threefry2x32",), "with others samples depend on the batch"),
    "jax_threefry_partitionable": ((True,), "samples would depend on the mesh"),
    "jax_legacy_prng_key": (("allow", "warn"), "keys travel between processes as plain arrays"),
    **{
        f"jax_transfer_guard_{way}": (_GUARDS, "batches and rewards are of the host")
        for way in ("host_to_device", "device_to_device", "device_to_host")  # or JAX_TRANSFER_GUARD
    },
}
"""Setting of JAX -> the values with which results are right, and the reason."""


def prepare_devices(distributed: Distributed | None = None) -> None:
    """Checks JAX's settings, keeps compiled programs, joins other processes and starts the devices.

    Every command calls it once, before its first use of a device.

    Raises:
        InputError: a setting of JAX with which results would be wrong, processes that cannot be
            joined, or devices that are asked for and not there.
    """
    check_jax_settings()
    enable_compilation_cache()
    start_devices(distributed)


def start_devices(distributed: Distributed | None = None) -> None:
    """Joins the other processes, where there are some, and lets JAX start its devices.

    Raises:
        InputError: processes that cannot be joined, or devices that are asked for and not there.
    """
    skip_missing_tpu()
    try:
        if distributed is not None:
            processes.initialize(distributed)
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # AssertionError: cuda without its plugin
        platforms = getattr(jax.config, PLATFORMS) or getattr(jax.config, "jax_platform_name", None)
        reason = str(error).partition(" (set JAX_PLATFORMS")[0].partition("\n")[0]
        raise InputError(
            f"JAX_PLATFORMS: found {platforms or 'nothing'}; JAX cannot start its devices "
            f"({reason or 'it does not know them'}); "
            "unset it to take what is there, or install the JAX of these devices, such as "
            "`pip install 'corl-jax[cuda]'`"
        ) from error


def skip_missing_tpu() -> None:
    """Keeps JAX from starting libtpu on a machine without a TPU, where libtpu prints errors.

    GPUs are still found. A TPU that the user names in JAX_PLATFORMS is always tried.
    """
    # JAX sets the platforms itself where it finds a TPU on the PCI bus.
    if getattr(jax.config, PLATFORMS) or has_tpu_signs():
        return
    with contextlib.suppress(RuntimeError):  # JAX has started its devices already
        # Under the same name, because lowering rules for TPUs need a platform of that name. JAX
        # ignores a platform that fails quietly.
        register_backend_factory("tpu", _refuse_missing_tpu, priority=300, fail_quietly=True)


def has_tpu_signs() -> bool:
    """Returns whether a device file or an environment variable of a TPU is there."""
    # Also VFIO files of other devices count: then JAX looks for itself.
    files = any(glob.glob(pattern) for pattern in TPU_DEVICE_FILES)
    return files or any(os.environ.get(name) for name in TPU_VARIABLES)


def _refuse_missing_tpu() -> NoReturn:
    raise RuntimeError(f"no TPU: none of {', '.join(TPU_DEVICE_FILES)} is there")


def check_jax_settings() -> None:
    """Raises InputError for settings of JAX that end a command, or with which results are wrong."""
    problems = [
        f"{name.upper()}: found {value}, which is refused: {reason}; unset it"
        for name, (accepted, reason) in ACCEPTED_SETTINGS.items()
        if (value := getattr(jax.config, name, accepted[0])) not in accepted
    ]
    if problems:
        raise InputError(problems)


def enable_compilation_cache() -> None:
    """Keeps compiled programs between runs, where the user says or in the usual place.

    Without a folder that can be written no program is kept, and a line on stderr says so.
    """
    # Small programs too, unless the user says otherwise: a start has a hundred of them.
    said = LEAST_SECONDS.upper() in os.environ
    if not said and getattr(jax.config, LEAST_SECONDS) == JAX_DEFAULT_SECONDS:
        jax.config.update(LEAST_SECONDS, 0.0)
    chosen = getattr(jax.config, CACHE_DIR)
    # Left to JAX: a cache that is switched off, or a URL.
    if chosen == "" or "://" in (chosen or "") or not getattr(jax.config, CACHE_ENABLED):
        return
    try:
        folder = Path(expand_path(chosen)) if chosen else _find_cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        if not chosen:  # the user's own may be there to be read only
            tempfile.TemporaryFile(dir=folder).close()
    except (OSError, RuntimeError, InputError) as error:
        # Otherwise JAX would warn about each program that it cannot write.
        jax.config.update(CACHE_DIR, None)
        reason = str(error).rstrip(".")
        print(
            f"note: compiled programs are not kept ({reason}); name a folder that can be written "
            f"in {CACHE_DIR.upper()}",
            file=sys.stderr,
        )
        return
    jax.config.update(CACHE_DIR, str(folder))


def _find_cache_folder() -> Path:
    """Returns the usual folder of the cache. Raises RuntimeError without a home directory."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(expand_path(home)) / "corl_jax" / "xla"
