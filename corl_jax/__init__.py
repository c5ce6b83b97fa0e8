"""CoRL in JAX: GRPO on image generation and image understanding together, for one model."""
