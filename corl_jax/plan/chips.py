"""Lists accelerators with their makers' figures, and describes TPU slices."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
from typing import Any

import jax

from corl_jax.errors import InputError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator, which `jax` sees as one device.

    `hbm` is the memory that XLA may use. For TPUs that is a little less than the makers state.
    """

    name: str
    hbm: float | None  # bytes; None: not known
    bandwidth: float | None = None  # of its memory, bytes/s
    peak: float | None = None  # bfloat16 operations/s, dense
    links: float | None = None  # bytes/s out of the chip over all its links to others
    source: str = ""


_CLOUD = "cloud.google.com/tpu/docs"
_NVIDIA = "nvidia.com/en-us/data-center"
CHIPS = {
    "v4": Chip("TPU v4", 30.75 * GIB, 1.2e12, 275e12, 300e9, f"{_CLOUD}/v4"),
    "v5e": Chip("TPU v5e", 15.75 * GIB, 819e9, 197e12, 200e9, f"{_CLOUD}/v5e"),
    "v5p": Chip("TPU v5p", 95.74 * GIB, 2765e9, 459e12, 600e9, f"{_CLOUD}/v5p"),
    "v6e": Chip("TPU v6e", 31.25 * GIB, 1600e9, 918e12, 400e9, f"{_CLOUD}/v6e"),
    "h100": Chip("H100 SXM", 80e9, 3.35e12, 989e12, 450e9, f"{_NVIDIA}/h100"),
    "h200": Chip("H200 SXM", 141e9, 4.8e12, 989e12, 450e9, f"{_NVIDIA}/h200"),
}
"""The figures of the pages in `source`, as of 2026-11; `hbm` of TPUs as libtpu 0.0.42 reports it.

The pages give the links of both directions together, or in bits. Here it is one direction in
bytes.
"""

_KINDS = {
    "tpu v4": "v4", "tpu v5 lite": "v5e", "tpu v5e": "v5e", "tpu v5": "v5p", "tpu v5p": "v5p",
    "tpu v6 lite": "v6e", "tpu v6e": "v6e",
}  # fmt: skip

_NO_MACHINE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # it locks out others, though it holds no chip
}
"""Environment for libtpu, which would otherwise look for a TPU on this machine."""


def find_local_chip() -> tuple[list[Any], Chip]:
    """Returns the devices of this machine and their chip; an unknown chip has no figures."""
    devices = jax.devices()
    kind = devices[0].device_kind.lower()
    gpu = next((name for name in ("h100", "h200") if name in kind), "")
    chip = CHIPS.get(_KINDS.get(kind, gpu)) or Chip(devices[0].device_kind, None)
    stats = devices[0].memory_stats() if devices[0].platform != "cpu" else None
    if stats and stats.get("bytes_limit"):
        chip = dataclasses.replace(chip, hbm=float(stats["bytes_limit"]))
    return devices, chip


def describe_slice(name: str) -> tuple[list[Any], Chip]:
    """Returns the devices of a TPU slice such as `v5e:4x4`, which need not exist, and their chip.

    Raises:
        InputError: no such topology, or libtpu, whose compiler describes it, is not installed.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+){1,2})", name)
    tpus = [key for key, chip in CHIPS.items() if chip.name.startswith("TPU")]
    if not match or match[1] not in tpus:
        raise InputError(
            f"--topology: found {name!r}; expected local, or one of {', '.join(tpus)} with the "
            "slice's shape in chips, such as v5e:4x4 or v5p:2x2x2"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            f"--topology {name}: needs libtpu, whose compiler describes TPUs that are not there; "
            "pip install 'corl-jax[tpu]'"
        )
    from jax.experimental import topologies

    # Before libtpu is loaded, and without a change of variables that the user has set.
    for variable, value in _NO_MACHINE.items():
        os.environ.setdefault(variable, value)
    # A v4 chip's two cores work as one device, as they do by default where there are chips.
    options: dict[str, Any] = {"chip_config_name": "megacore"} if match[1] == "v4" else {}
    if set(match[2]) <= {"1", "x"}:  # one chip, 1x1, which is smaller than a host
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        devices = topologies.get_topology_desc(name, platform="tpu", **options).devices
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--topology {name}: libtpu knows no such slice ({reason})") from None
    return list(devices), CHIPS[match[1]]
