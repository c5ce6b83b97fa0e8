"""The key tables, one module per checkpoint layout: rows only, data."""

from corl_jax.weights.table import Table
from corl_jax.weights.tables.janus_original import TABLE as _ORIGINAL
from corl_jax.weights.tables.janus_transformers import TABLE as _TRANSFORMERS

TABLES: dict[str, Table] = {"original": _ORIGINAL, "transformers": _TRANSFORMERS}
