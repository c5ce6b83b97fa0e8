"""Reads choices, yes or no, and values out of answers, by the rules of benchmark harnesses."""
