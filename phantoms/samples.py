"""
Training samples of phantoms: questions with true answers, and true pairs for the five drawing tasks.

A sample follows from its split and its number alone. Splits have generators of their own, so that no picture is in two of them.
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from .anatomy import FINDINGS, MODALITIES, ORGANS, Case, draw_brain_pair, draw_case

SPLITS = ("train", "validation", "test")
QUESTIONS = {
    "modality": ("What imaging modality is this?", "Which modality was used to take this picture?"),
    "organ": ("Which organ does this show?", "What part of the body is this?"),
    "closed": ("Is there {finding} in this picture?", "Does this picture show {finding}?"),
    "side": ("On which side is the {finding}?", "Where is the {finding}, left or right?"),
    "open": ("What is abnormal in this picture?", "Which finding do you see?"),
    "report": ("Describe this picture.", "Write a short report."),
}
# Reconstruction is asked of all modalities, the others of one or two.
DRAWING_SHARES = {
    "ct_to_mri": 0.17,
    "mri_to_ct": 0.17,
    "reconstruction": 0.32,
    "super_resolution": 0.17,
    "report_to_xray": 0.17,
}
INSTRUCTIONS = {
    "ct_to_mri": "Turn this CT into an MRI.",
    "mri_to_ct": "Turn this MRI into a CT.",
    "reconstruction": "Reconstruct the image.",
    "super_resolution": "Make this image four times as sharp.",
    "report_to_xray": "Draw a chest X-ray. Report: {report}",
}


def seed_of(split: str, number: int, subject: str) -> list[int]:
    """Seed of one sample: of its split, its number and what it is about."""
    return [SPLITS.index(split), number, sum(ord(letter) * 7**place for place, letter in enumerate(subject))]


def name_finding(case: Case) -> str:
    if case.finding is None:
        return "no finding"
    return case.finding if case.side is None else f"{case.side} {case.finding}"


def report_of(case: Case) -> str:
    """All that can be said of a picture, in two sentences."""
    article = "an" if case.build == "average" else "a"
    build = f" of {article} {case.build} patient" if case.build is not None else ""
    finding = name_finding(case)
    return f"{case.modality} of the {ORGANS[case.modality]}{build}. {finding[0].upper()}{finding[1:]}."


def comprehension_sample(split: str, number: int, question: str | None = None) -> dict:
    """
    A question about a picture, with its true answer.

    Args:
        split (`str`): One of `SPLITS`.
        number (`int`): Number of the sample in its split.
        question (`str`, *optional*): Kind of question, a key of `QUESTIONS`; by default any.

    Returns:
        `dict`: `question` (its kind), `instruction`, `response`, `input_image` (a PIL picture).
    """
    rng = np.random.default_rng(seed_of(split, number, question or "comprehension"))
    kind = question or str(rng.choice(tuple(QUESTIONS), p=(0.15, 0.05, 0.35, 0.15, 0.15, 0.15)))
    case = draw_case(rng)
    while kind == "side" and case.side is None:
        case = draw_case(rng)
    while kind == "closed" and case.finding is None and rng.random() < 0.6:
        case = draw_case(rng)
    text = str(rng.choice(QUESTIONS[kind]))
    asked = case.finding
    if kind == "closed" and (asked is None or rng.random() < 0.4):
        near = (case.modality,) if rng.random() < 0.5 else MODALITIES
        names = {name for modality in near for name in FINDINGS[modality]}
        asked = str(rng.choice(sorted(name for name in names if name.rstrip("s") != str(case.finding).rstrip("s"))))
    answers = {
        "modality": case.modality,
        "organ": ORGANS[case.modality],
        "closed": "yes" if asked == case.finding else "no",
        "side": case.side,
        "open": name_finding(case),
        "report": report_of(case),
    }
    instruction = text.format(finding=asked)
    return {
        "question": kind,
        "instruction": instruction,
        "response": answers[kind],
        "report": report_of(case),
        "input_image": case.picture,
    }


def drawing_sample(split: str, number: int, task: str | None = None) -> dict:
    """
    An instruction to draw, with the true picture.

    Args:
        split (`str`): One of `SPLITS`.
        number (`int`): Number of the sample in its split.
        task (`str`, *optional*): A key of `INSTRUCTIONS`; by default any.

    Returns:
        `dict`: `drawing` (its kind), `instruction`, `input_image` (a PIL picture or `None`), `target_image` and its `finding`.
    """
    rng = np.random.default_rng(seed_of(split, number, task or "drawing"))
    kind = task or str(rng.choice(tuple(DRAWING_SHARES), p=tuple(DRAWING_SHARES.values())))
    report, source = "", None
    if kind in ("ct_to_mri", "mri_to_ct"):
        pair = draw_brain_pair(rng)
        case, other = reversed(pair) if kind == "ct_to_mri" else pair
        source = other.picture
    elif kind == "reconstruction":
        case = draw_case(rng)
        source = case.picture
    elif kind == "super_resolution":
        case = draw_brain_pair(rng)[int(rng.integers(2))]
        small = case.picture.resize((case.picture.width // 4, case.picture.height // 4), Image.Resampling.BOX)
        source = small.resize(case.picture.size, Image.Resampling.BICUBIC)
    else:
        case = draw_case(rng, "X-ray")
        report = report_of(case)
    return {
        "drawing": kind,
        "instruction": INSTRUCTIONS[kind].format(report=report),
        "input_image": source,
        "target_image": case.picture,
        "finding": name_finding(case),
    }


def write_samples(folder: Path, split: str, comprehension: int, drawing: int) -> None:
    """Writes `comprehension.jsonl` and `generation.jsonl` with so many samples, and their pictures, for `healthgpt train`."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for task, make, count in (
        ("comprehension", comprehension_sample, comprehension),
        ("generation", drawing_sample, drawing),
    ):
        with open(folder / f"{task}.jsonl", "w") as file:
            for number in range(count):
                sample = make(split, number)
                row = {"task": task, "instruction": sample["instruction"]}
                if "response" in sample:
                    row["response"] = sample["response"]
                for field in ("input_image", "target_image"):
                    if sample.get(field) is not None:
                        row[field] = f"pictures/{task}-{number}-{field}.png"
                        sample[field].save(folder / row[field], compress_level=1)
                file.write(json.dumps(row) + "\n")
