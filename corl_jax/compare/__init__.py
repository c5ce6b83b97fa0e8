"""Compares two evaluations of the same prompts or questions."""
