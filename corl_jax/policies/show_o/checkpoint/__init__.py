"""Checkpoints of Show-o: the original files, the layout of corl_jax, and the small files."""

from corl_jax.policies.show_o.checkpoint.files import describe_missing_tower, find_tokenizer
from corl_jax.policies.show_o.checkpoint.kind import KIND

__all__ = ["KIND", "describe_missing_tower", "find_tokenizer"]
