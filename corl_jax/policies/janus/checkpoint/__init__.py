"""Checkpoints of Janus: two PyTorch layouts, our own, and the files beside the weights."""

from corl_jax.policies.janus.checkpoint.kind import KIND

__all__ = ["KIND"]
