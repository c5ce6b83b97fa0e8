"""Studies: a base config with named variants and several seeds, and one table of their results."""
