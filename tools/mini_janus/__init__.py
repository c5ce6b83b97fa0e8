"""Makes the starting point of the mini Janus: a Janus of under four million parameters.

See `python -m tools.mini_janus --help`.
"""
