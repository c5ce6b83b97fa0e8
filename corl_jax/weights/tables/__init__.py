"""The key tables, one module per checkpoint layout: rows only, data."""

from corl_jax.policies.janus.checkpoint.original_keys import TABLE as _ORIGINAL
from corl_jax.policies.janus.checkpoint.transformers_keys import TABLE as _TRANSFORMERS
from corl_jax.weights.table import Table

TABLES: dict[str, Table] = {"original": _ORIGINAL, "transformers": _TRANSFORMERS}
