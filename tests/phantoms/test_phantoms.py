"""Phantoms: true answers, true pairs, findings where they are said to be, and splits that share nothing."""

import collections
import re

import numpy as np
import pytest
from PIL import Image

from healthgpt.phantoms import (
    FINDINGS,
    MODALITIES,
    SPLITS,
    comprehension_sample,
    draw_brain_pair,
    draw_case,
    drawing_sample,
    write_samples,
)
from healthgpt.phantoms.anatomy import SIDED, brain, chest, liver
from healthgpt.phantoms.samples import INSTRUCTIONS, QUESTIONS
from healthgpt.samples import read_samples


def test_a_sample_follows_from_its_split_and_number():
    for make in (comprehension_sample, drawing_sample):
        assert make("train", 7) == make("train", 7)
    seen = collections.defaultdict(set)
    for split in SPLITS:
        for number in range(60):
            seen[split].add(comprehension_sample(split, number)["input_image"].tobytes())
            seen[split].add(drawing_sample(split, number)["target_image"].tobytes())
    assert not seen["train"] & seen["test"] and not seen["train"] & seen["validation"]
    assert not seen["validation"] & seen["test"]


def test_answers_are_true_and_closed_questions_balanced():
    closed = collections.Counter()
    for number in range(600):
        sample = comprehension_sample("test", number)
        report, question = sample["report"].lower(), sample["question"]
        assert re.match(r"x-ray of the chest of (an average|a (small|large)) patient\. |(?!x-ray)", report)
        if question == "closed":
            [asked] = {
                f for findings in FINDINGS.values() for f in findings if f" {f} in" in sample["instruction"]
            } or {
                f for findings in FINDINGS.values() for f in findings if sample["instruction"].endswith(f"show {f}?")
            }
            assert sample["response"] == ("yes" if asked in report else "no")
            closed[sample["response"]] += 1
        elif question == "side":
            assert f"{sample['response']} " in report and sample["response"] in ("left", "right")
        elif question in ("open", "modality", "organ"):
            assert sample["response"].lower() in report
        else:
            assert sample["response"].lower() == report
    assert 0.4 < closed["yes"] / closed.total() < 0.6
    for kind in QUESTIONS:
        assert comprehension_sample("test", 0, kind)["question"] == kind


@pytest.mark.parametrize("finding", SIDED)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_finding_lies_on_its_side(finding, side):
    """The picture with the finding differs from the one without, of the same generator, on that side."""

    def draw(finding, side):
        rng = np.random.default_rng(5)
        if finding in FINDINGS["CT"] or (finding is None and kind == "brain"):
            return brain(rng, finding, side)[0]
        if kind == "chest":
            return chest(rng, finding, side, "average")
        return liver(rng, finding, side)

    kind = "brain" if finding in FINDINGS["CT"] else "chest" if finding in FINDINGS["X-ray"] else "liver"
    change = np.abs(draw(finding, side) - draw(None, side))
    right, left = change[:, :32].sum(), change[:, 32:].sum()  # of the patient
    assert (left > 5 * right) if side == "left" else (right > 5 * left)


def test_ct_and_mri_are_of_one_head():
    for number in range(10):
        ct, mri = (
            np.asarray(case.picture.convert("L")).astype(float)
            for case in draw_brain_pair(np.random.default_rng(number))
        )
        both = (ct > 25) | (mri > 25)
        assert ((ct > 25) & (mri > 25)).sum() > 0.8 * both.sum()
        assert np.corrcoef(ct.flatten(), mri.flatten())[0, 1] < 0.9


def test_drawing_pairs():
    small = drawing_sample("test", 3, "super_resolution")
    target = small["target_image"].resize((16, 16), Image.Resampling.BOX)
    assert small["input_image"] == target.resize((64, 64), Image.Resampling.BICUBIC)
    same = drawing_sample("test", 3, "reconstruction")
    assert same["input_image"] == same["target_image"]
    report = drawing_sample("test", 3, "report_to_xray")
    assert report["input_image"] is None and "X-ray of the chest of a" in report["instruction"]
    turned = drawing_sample("test", 3, "ct_to_mri")
    assert turned["input_image"] != turned["target_image"]
    assert {drawing_sample("train", number)["drawing"] for number in range(40)} == set(INSTRUCTIONS)


def test_every_modality_and_finding_is_drawn():
    found = collections.Counter()
    for number in range(500):
        case = draw_case(np.random.default_rng(number))
        assert case.picture.size == (64, 64) and case.picture.mode == "RGB"
        found[case.modality, case.finding] += 1
    assert set(found) == {(name, finding) for name in MODALITIES for finding in (None, *FINDINGS[name])}


def test_samples_on_disk_are_those_that_training_reads(tmp_path, m3):
    write_samples(tmp_path, "train", 3, 4)
    _, model, processor = m3
    rows = read_samples(tmp_path / "comprehension.jsonl", model.config, processor)
    assert rows["response"][1] == comprehension_sample("train", 1)["response"]
    rows = read_samples(tmp_path / "generation.jsonl", model.config, processor)
    written = Image.open(rows["target_image"][2]).convert("RGB")
    assert written.tobytes() == drawing_sample("train", 2)["target_image"].tobytes()
