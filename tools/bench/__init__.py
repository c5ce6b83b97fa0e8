"""How fast the project's own functions are on this machine, at full size with random weights.

See `python -m tools.bench --help`.
"""
