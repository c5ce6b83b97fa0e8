"""GenEval: rules on detected objects, colours by CLIP, and the official summary.

Source: Ghosh et al. 2023 (arXiv 2310.11513).
"""
