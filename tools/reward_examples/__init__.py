"""The scored examples of docs/rewards.md: their cases, their scores, their table and figure."""
