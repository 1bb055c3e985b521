"""γ-PO's reading of a margin per pair: as the rate of label smoothing that gives the same loss."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def implied_label_smoothing(reward_gap: ArrayLike, margin: ArrayLike, target: float) -> np.ndarray:
    r"""The rate ε_i at which label smoothing with the shared margin γ0 has the loss of the pair's own margin γ_i:

    .. math::
        -\log\sigma(m_i - \gamma_i)
        = -\varepsilon_i \log\sigma(-m_i - \gamma_0) - (1 - \varepsilon_i) \log\sigma(m_i - \gamma_0)

    to first order in :math:`\delta_i = \gamma_i - \gamma_0`, which is

    .. math::
        \varepsilon_i \approx \frac{\delta_i\,[1 - \sigma(m_i - \gamma_0)]}
                                   {\log(1 + e^{m_i + \gamma_0}) - \log(1 + e^{\gamma_0 - m_i})}

    The losses are the same, not the gradients. The denominator has the sign of m. So ε is negative, and no rate, where
    a pair that is ranked rightly has less than γ0, or one that is ranked wrongly has more. It is only small where
    |δ| ≪ |m|, which the theorem asks for: near m = 0 it has no bound.

    Args:
        reward_gap: [N] m, β inside.
        margin: [N] γ_i in reward units, what is subtracted from m.
        target: γ0 in reward units.

    Returns:
        [N] ε. NaN where m is 0: there the two smoothed losses are equal.

    Source: γ-PO, Theorem 3.1 (eqs. 14 to 21).
    """
    m, gamma = np.asarray(reward_gap, float), np.asarray(margin, float)
    slope = np.exp(-np.logaddexp(0, m - target))  # 1 − σ(m − γ0), without overflow
    between = np.logaddexp(0, m + target) - np.logaddexp(0, target - m)
    return (gamma - target) * slope / np.where(m == 0, np.nan, between)
