"""Collects what a run is started with, for `provenance.json`: config, model, devices, versions."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import corl_jax
from corl_jax.params import partition
from corl_jax.train import check
from corl_jax.train.banner import describe_devices
from corl_jax.train.resolve import ResolvedRun

PACKAGES = ("jax", "jaxlib", "flax", "optax", "transformers", "numpy")
GIT_SECONDS = 5


def collect_provenance(plan: ResolvedRun) -> dict[str, Any]:
    """Returns what the run is made with, as JSON values."""
    shapes = plan.family.abstract(plan.sizes)
    trained, _ = partition(shapes, plan.trained)
    return {
        "given": plan.origin and dataclasses.asdict(plan.origin),
        "steps": plan.steps,
        "model": {
            "path": str(plan.model_dir),
            "family": plan.family.name,
            "parameters": check.count_parameters(shapes),
            "trained": check.count_parameters(trained),
        },
        "devices": describe_devices(plan),
        "versions": {
            "corl_jax": corl_jax.__version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
        "commit": find_commit(Path(corl_jax.__file__).parent),
    }


def find_commit(package: Path) -> str | None:
    """Returns the commit of a package's clone, with `-dirty` after changes; None outside of one."""

    def ask_git(*words: str) -> str | None:
        command = ["git", "-C", str(package), *words]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=GIT_SECONDS
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An environment may lie in the clone of another project, whose commit says nothing.
    if ask_git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    return ask_git("describe", "--always", "--dirty", "--exclude=*", "--abbrev=12") or None
