"""The aesthetic head: linear layers with dropout, which has no weights, between the first four.

Source: christophschuhmann/improved-aesthetic-predictor.
"""

from __future__ import annotations

from corl_jax.weights.table import Table
from corl_jax.weights.tables.rows import dense

PLACES = (0, 2, 4, 6, 7)
"""Of the linear layers."""

TABLES: dict[str, Table] = {
    "published": Table(
        name="published",
        rows=tuple(
            row for i, place in enumerate(PLACES) for row in dense(f"layers.{place}", f"layers/{i}")
        ),
    )
}
