"""Smooth step: 0 to the left, 1 to the right, a cubic between, with exact zeros and ones and a continuous slope.

Hazimeh et al., "The Tree Ensemble Layer", ICML 2020 (arXiv:2002.07772, section 2.2).
"""

from __future__ import annotations

from torch import Tensor


def smooth_step(value: Tensor, gamma: float) -> Tensor:
    """S(t) = 0 for t <= -gamma/2, 1 for t >= gamma/2, else -2 (t/gamma)^3 + 3/2 (t/gamma) + 1/2; any shape."""
    # In terms of the distance from the left end there is no cancellation near 0; near 1 take 1 - S as S(-t).
    rise = (value / gamma + 0.5).clamp(0, 1)
    return rise.square() * (3 - 2 * rise)
