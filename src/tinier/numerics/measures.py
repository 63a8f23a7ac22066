"""How far an approximation is from the original."""

import math

from torch import Tensor


def snr_db(original: Tensor, approximation: Tensor) -> float:
    """Signal-to-noise ratio in decibels: 10·log10(‖original‖² / ‖original - approximation‖²).

    Infinite where both are equal; about 6 dB for each bit of a uniform grid.
    """
    signal = original.double().square().sum().item()
    noise = (original.double() - approximation.double()).square().sum().item()
    if noise == 0.0:
        return math.inf
    return 10.0 * math.log10(signal / noise) if signal > 0.0 else -math.inf
