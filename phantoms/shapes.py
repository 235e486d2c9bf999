"""Soft shapes on a square from -1 to 1, as arrays (size, size) between 0 and 1; x grows to the right, y downwards."""

import numpy as np
from PIL import Image

SIZE = 64  # pixels per side of a picture


def grid(size: int = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates x and y of every pixel's centre."""
    axis = (np.arange(size) + 0.5) / size * 2 - 1
    return np.meshgrid(axis, axis)


X, Y = grid()


def step(values: np.ndarray, width: float = 0.03) -> np.ndarray:
    """0 where values are negative, 1 where they are positive, with an edge of about `width`."""
    return 1 / (1 + np.exp(-np.clip(values / width * 2, -30, 30)))


def ellipse(x: float, y: float, width: float, height: float, angle: float = 0.0, edge: float = 0.03) -> np.ndarray:
    """A filled ellipse with half axes `width` and `height`, turned by `angle` radians."""
    cos, sin = np.cos(angle), np.sin(angle)
    u, v = (X - x) * cos + (Y - y) * sin, (Y - y) * cos - (X - x) * sin
    radius = np.sqrt((u / width) ** 2 + (v / height) ** 2)
    return step((1 - radius) * min(width, height), edge)


def curve(height: np.ndarray, width: float, edge: float = 0.02) -> np.ndarray:
    """A line of half width `width` along y = `height` (one value per pixel)."""
    return step(width - np.abs(Y - height), edge)


def noise(rng: np.random.Generator, cells: int) -> np.ndarray:
    """Smooth noise of mean 0 and deviation about 1, with `cells` bumps along a side."""
    coarse = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize((SIZE, SIZE), Image.Resampling.BICUBIC)) * 1.4


def over(picture: np.ndarray, mask: np.ndarray, value) -> np.ndarray:
    """The picture with `value` (a number, an array or a colour) where the mask is 1."""
    mask = mask if picture.ndim == 2 else mask[..., None]
    return picture * (1 - mask) + mask * value


def to_picture(values: np.ndarray) -> Image.Image:
    """An RGB picture of values from 0 to 1, grey or of three channels."""
    levels = np.clip(np.rint(values * 255), 0, 255).astype(np.uint8)
    return Image.fromarray(levels if levels.ndim == 3 else np.repeat(levels[..., None], 3, axis=2))
