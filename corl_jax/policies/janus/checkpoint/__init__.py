"""Checkpoints of Janus: two PyTorch layouts, the layout of corl_jax, and the small files."""

from corl_jax.policies.janus.checkpoint.kind import KIND

__all__ = ["KIND"]
