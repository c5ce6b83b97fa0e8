"""Converts PyTorch checkpoints into our own layout and back."""
