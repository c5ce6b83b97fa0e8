"""Makes the starting points of the mini and nano models of each family, and measures them.

See `python -m tools.small_models --help`.
"""
