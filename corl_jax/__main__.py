"""`python -m corl_jax`, the same as the command `corl-jax`."""

from corl_jax.cli import main

if __name__ == "__main__":
    main()
