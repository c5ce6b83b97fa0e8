"""The conversion command: PyTorch checkpoints in, PyTorch checkpoints out."""
