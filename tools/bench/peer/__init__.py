"""Does the same work in PyTorch: transformers' Janus or Phi, with loops and steps of the reference.

`python -m tools.bench --peer` starts `python -m tools.bench.peer` as another process, before JAX
takes the memory of the device. Nothing else imports torch.
"""
