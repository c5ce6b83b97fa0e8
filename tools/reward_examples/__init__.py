"""Scored examples of docs/reference/rewards.md: cases, scores, table and figure."""
