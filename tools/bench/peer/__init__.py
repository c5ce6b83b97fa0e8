"""The same work in PyTorch: transformers' Janus, and loops and steps as the reference writes them.

A process of its own, `python -m tools.bench.peer`, which `python -m tools.bench --peer` starts
before JAX takes the device's memory. Nothing else imports torch.
"""
