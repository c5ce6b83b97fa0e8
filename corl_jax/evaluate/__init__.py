"""The command `corl-jax evaluate`; each of its suites is a row of `suites.COMMAND_SUITES`."""
