"""CoRL in JAX: one GRPO for a model that both sees and draws."""
