"""`corl-jax serve`: an OpenAI-compatible server of one model."""
