"""
Drawn stand-ins for medical pictures, with known anatomy and findings, true answers and true pairs.

They show that training, evaluation and drawing work; they are worthless for medicine.
"""

from .anatomy import FINDINGS, MODALITIES, Case, draw_brain_pair, draw_case
from .samples import SPLITS, comprehension_sample, drawing_sample, seed_of, write_samples

__all__ = [
    "FINDINGS",
    "MODALITIES",
    "SPLITS",
    "Case",
    "comprehension_sample",
    "draw_brain_pair",
    "draw_case",
    "drawing_sample",
    "seed_of",
    "write_samples",
]
