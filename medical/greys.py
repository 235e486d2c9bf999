"""Values of any range as 8-bit greys."""

import numpy as np

from ..errors_healthgpt import HealthGPTError


def value_range(values: np.ndarray) -> tuple[float, float]:
    """
    The lowest and the highest finite value.

    Raises:
        HealthGPTError: if no value is finite.
    """
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        raise HealthGPTError("none of its values is a finite number.")
    return float(finite.min()), float(finite.max())


def to_greys(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Greys of 8 bits, `low` black and `high` white, rounded; what is not a number, and all of a single value, is black."""
    if low == high:
        return np.zeros(values.shape, np.uint8)
    greys = (values.astype(np.float64) - low) / (high - low) * 255
    return np.nan_to_num(greys, nan=0, posinf=255, neginf=0).clip(0, 255).round().astype(np.uint8)
