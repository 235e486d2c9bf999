"""Values of any range as 8-bit greys, a strip at a time, as the numbers between take eight times the memory and more."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from ..errors_healthgpt import HealthGPTError

STRIP = 2**18  # values


def strips(values: np.ndarray) -> Iterator[np.ndarray]:
    """The values of a contiguous array, a strip after the other."""
    flat = values.reshape(-1)
    return (flat[start : start + STRIP] for start in range(0, flat.size, STRIP))


def in_strips(convert: Callable[[np.ndarray], np.ndarray], values: np.ndarray) -> np.ndarray:
    """What `convert` makes of each strip, as one array of 8 bits in the shape of `values`."""
    return np.concatenate([convert(strip) for strip in strips(values)], dtype=np.uint8).reshape(values.shape)


def value_range(parts: Iterable[np.ndarray]) -> tuple[float, float]:
    """
    The lowest and the highest finite value of all parts.

    Raises:
        HealthGPTError: if no value is finite.
    """
    low, high = np.inf, -np.inf
    for part in parts:
        finite = part[np.isfinite(part)] if part.dtype.kind == "f" else part
        if finite.size:
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
    if low > high:
        raise HealthGPTError("none of its values is a finite number.")
    return low, high


def to_greys(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Greys of 8 bits, `low` black and `high` white, rounded; what is not a number, and all of a single value, is black."""
    if low == high:
        return np.zeros(values.shape, np.uint8)
    greys = (values.astype(np.float64) - low) / (high - low) * 255
    return np.nan_to_num(greys, nan=0, posinf=255, neginf=0).clip(0, 255).round().astype(np.uint8)
