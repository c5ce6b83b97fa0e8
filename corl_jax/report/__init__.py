"""Makes a page of a run: what was trained, how it went, and images before and after."""
