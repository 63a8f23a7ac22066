"""How far an approximation is from the original."""

import math

from torch import Tensor


def snr_db(original: Tensor, approximation: Tensor) -> float | None:
    """Signal-to-noise ratio in decibels: 10·log10(‖original‖² / ‖original - approximation‖²).

    None where both are equal; about 6 dB for each bit of a uniform grid.
    """
    signal = original.double().square().sum().item()
    noise = (original.double() - approximation.double()).square().sum().item()
    return power_db(signal, noise)


def power_db(signal: float, noise: float) -> float | None:
    """10·log10(signal / noise), rounded to thousandths; None where there is no signal or no noise, or they
    are no numbers."""
    if not (0.0 < noise < math.inf and 0.0 < signal < math.inf):
        return None
    return round(10.0 * math.log10(signal / noise), 3)
