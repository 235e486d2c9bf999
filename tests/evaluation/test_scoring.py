"""The scoring rules, case by case."""

import pytest

from healthgpt.evaluation.scoring import chosen_option, is_right, recall


@pytest.mark.parametrize(
    "answer, truth, right",
    [
        ("Yes.", "yes", True),
        ("Yes, there is no doubt.", "Yes", True),
        ("No, but yesterday there was.", "no", True),
        ("There is a mass.", "yes", False),
        ("no", "yes", False),
        ("The left lung.", "Left lung", True),
        ("left", "left lung", False),
        ("It is the lung, on the left.", "left lung", False),
        ("An X-ray!", "x ray", True),
        ("Pneumothoraces", "pneumothorax", False),
        ("There is no doubt, yes.", "yes", False),  # says both, and neither first
        ("Of course, yes.", "yes", True),
        ("No pneumothorax is seen.", "No pneumothorax", True),
        ("There is no effusion and no pneumothorax.", "no pneumothorax", True),
        ("", "yes", False),
        ("", "lung", False),
        ("The", "the", True),  # nothing but an article, or punctuation
        ("The lung.", "the", False),
        ("+", "+", True),
        ("-", "+", False),
        ("a", "A.", True),
    ],
)
def test_answers_in_words(answer, truth, right):
    assert is_right(answer, truth) is right


@pytest.mark.parametrize(
    "answer, truth, share",
    [
        ("left upper lobe", "the upper lobe", 1.0),
        ("upper", "upper lobe", 0.5),
        ("", "lobe", 0.0),
        ("a b c d", "e", 0.0),
        ("++", "++", 1.0),
    ],
)
def test_recall(answer, truth, share):
    assert recall(answer, truth) == share


@pytest.mark.parametrize(
    "answer, index",
    [
        ("B", 1),
        ("(b) MRI", 1),  # by its text
        ("(C)", 2),
        ("B. MRI", 1),
        ("The answer is A", 0),
        ("Answer: D", 3),
        ("It is an MRI.", 1),
        ("CT angiography", 2),  # holds the text of the option CT as well, as a part
        ("CT or MRI", None),
        ("Both are possible.", None),
        ("E", None),
        ("", None),
        ("A picture of a CT", 0),
        ("b", 1),
        ("d.", 3),
        ("Option B", 1),
        ("The correct option is B", 1),
        ("The best choice is (b).", 1),
        ("The answer is a CT angiography", 2),  # an article, not a letter
        ("**B**", 1),
        ("It is MRI (not (A) CT).", None),
        ("I choose (D) here.", 3),
        ("B\nBecause of the contrast.", 1),
        ("B because of the contrast.", 1),
        ("A CT angiography is shown.", 2),
        ("Answer:B", 1),
        ("Answer:\nB", 1),
        ("The answer is: [b].", 1),
        ("[B]", 1),
        ("Answer: A CT", 0),
        ("Answer: A CT angiography", 2),  # an article, not a letter
        ("Answer: A because of the contrast.", 0),
        ("Answer: C CT angiography", 2),
    ],
)
def test_chosen_options(answer, index):
    assert chosen_option(answer, ["CT", "MRI", "CT angiography", "X-ray"]) == index
