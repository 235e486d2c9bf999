"""Evaluation of HealthGPT: accuracy of its answers, likeness of its pictures."""

from .answers import answer_items, summarise_answers
from .average import average_runs
from .benchmarks import BENCHMARKS, Item, items_of, read_benchmark
from .pictures import compare_pictures, draw_samples, load_lpips, pair_folders, summarise_pictures
from .records import Records
from .report import write_report

__all__ = [
    "BENCHMARKS",
    "Item",
    "Records",
    "answer_items",
    "average_runs",
    "compare_pictures",
    "draw_samples",
    "items_of",
    "load_lpips",
    "pair_folders",
    "read_benchmark",
    "summarise_answers",
    "summarise_pictures",
    "write_report",
]
