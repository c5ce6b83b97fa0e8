"""How far float32 results may lie apart that are equal but for rounding, on any machine.

One operation is off by at most half of EPS of its result. Another CPU, or another program for the
same mathematics, adds in another order, with other products fused: a sum of n terms is then off
by up to n * EPS of the sum of its terms' sizes. Mistakes that these tests look for, as a wrong
mask, position, order or layer, change results by a hundredth and more.
"""

from __future__ import annotations

EPS = 2.0**-23


def rounding(terms: int, magnitude: float = 1.0) -> float:
    """What sums over `terms` numbers in all may differ by, of results of this magnitude."""
    return terms * EPS * magnitude


NETWORK = rounding(500)
"""6e-5 of results: a tiny network has about ten sums one behind the other, of 8 to 64 terms."""

LOGPROBS = rounding(500, 8)
"""5e-4: log-probs of tiny networks are -8 to 0, and their logits as large."""
