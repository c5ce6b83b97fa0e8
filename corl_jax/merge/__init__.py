"""Merges models that were trained from one base into one model."""
