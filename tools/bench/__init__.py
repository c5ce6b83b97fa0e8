"""Measures how fast the functions of the project are, at full size with random weights.

See `python -m tools.bench --help`.
"""
