"""Checkpoints of JanusFlow: the original layout, the layout of corl_jax, and the small files."""

from corl_jax.policies.janus_flow.checkpoint.kind import KIND

__all__ = ["KIND"]
