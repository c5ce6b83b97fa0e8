"""The aesthetic head's layout: linear layers with dropout between the first four.

Source: christophschuhmann/improved-aesthetic-predictor.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from corl_jax.errors import Problems
from corl_jax.models.aesthetic import AestheticConfig, AestheticHead
from corl_jax.weights.foreign_config import check_count
from corl_jax.weights.kinds import WHOLE, NetworkKind, Rules
from corl_jax.weights.table import Shape, Table
from corl_jax.weights.table_rows import dense

# Dropout has no weights, but a number: linear 0, dropout 1, linear 2, .., linear 6, linear 7.
PLACES = (0, 2, 4, 6, 7)
"""Numbers of the linear layers."""

TABLES: dict[str, Table] = {
    "published": Table(
        name="published",
        rows=tuple(
            row for i, place in enumerate(PLACES) for row in dense(f"layers.{place}", f"layers/{i}")
        ),
    )
}


def check(config: AestheticConfig, where: str) -> list[str]:
    """Lists sizes with which the head cannot be built."""
    problems = check_count(where, "sizes", config.sizes, len(PLACES) + 1)
    if not problems and config.sizes[-1] != 1:
        problems.append(f"{where}.sizes ends with {config.sizes[-1]}, expected 1, the one score")
    return problems


def parse(
    folder: Path, layout: str, shapes: Mapping[str, Shape], problems: Problems
) -> AestheticConfig:
    """Returns the number of inputs of each layer, and 1 for the score."""
    # The file has no settings, so the shapes [out, in] of the kernels are the only source.
    usual = AestheticConfig().sizes
    kernels = [shapes.get(f"layers.{place}.weight", ()) for place in PLACES]
    inputs = [shape[1] if len(shape) == 2 else usual[i] for i, shape in enumerate(kernels)]
    return AestheticConfig(sizes=(*inputs, 1))


RULES: Rules = (
    (r"layers/.*/(kernel|bias)", WHOLE),  # 4 MB
)

KIND = NetworkKind(
    name="aesthetic",
    module=AestheticHead,
    config=AestheticConfig,
    tables=TABLES,
    parse=parse,
    check=check,
    rules=RULES,
)
