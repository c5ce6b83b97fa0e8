"""Makes the starting point of the mini Janus, of under four million parameters, and measures it.

See `python -m tools.mini_janus --help`.
"""
