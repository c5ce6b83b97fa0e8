"""Converts weights: `corl-jax convert` under its first name."""

from corl_jax.convert.__main__ import main

if __name__ == "__main__":
    main()
