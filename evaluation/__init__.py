"""Evaluation of HealthGPT: accuracy of its answers, likeness of its pictures."""

from .answers import answer_items, summarise_answers
from .benchmarks import BENCHMARKS, Item, read_benchmark
from .pictures import compare_pictures, draw_samples, load_lpips, pair_folders, summarise_pictures
from .records import Records, state_of
from .report import write_report

__all__ = [
    "BENCHMARKS",
    "Item",
    "Records",
    "answer_items",
    "compare_pictures",
    "draw_samples",
    "load_lpips",
    "pair_folders",
    "read_benchmark",
    "state_of",
    "summarise_answers",
    "summarise_pictures",
    "write_report",
]
