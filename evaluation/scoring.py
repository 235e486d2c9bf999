"""
How an answer is scored.

    closed   right if the answer decides for the true option
    open     right if the true answer stands in it; also its recall, as LLaVA-Med (arXiv 2306.00890, section 5) reports
    choice   right if the answer names the true option's letter, or else its text and no other's

Texts are compared as in the VQA benchmark (Antol et al. 2015): small letters, no punctuation, no articles. HealthGPT's authors
publish accuracies without their rules, therefore figures beside theirs are near them, not the same measure.
"""

import re
import string

YES_NO = ("yes", "no")
ARTICLES = ("a", "an", "the")


def words_of(text: str) -> list[str]:
    """The words of a text in small letters, without punctuation and articles."""
    text = re.sub(rf"[{re.escape(string.punctuation)}]", " ", text.lower())
    return [word for word in text.split() if word not in ARTICLES]


def contains(words: list[str], part: list[str]) -> bool:
    """Whether `part` stands in `words` as it is."""
    starts = range(len(words) - len(part) + 1)
    return bool(part) and any(words[start : start + len(part)] == part for start in starts)


def is_right(answer: str, truth: str) -> bool:
    """
    Whether an answer in words is right, closed or open.

    Yes or no counts where it stands first; any other truth must stand in the answer, word by word.
    """
    answered, expected = words_of(answer), words_of(truth)
    if len(expected) == 1 and expected[0] in YES_NO:
        decisions = [word for word in answered if word in YES_NO]
        return decisions[:1] == expected
    return contains(answered, expected)


def recall(answer: str, truth: str) -> float:
    """Share of the true answer's words that the answer has."""
    answered, expected = set(words_of(answer)), words_of(truth)
    return sum(word in answered for word in expected) / len(expected) if expected else 0.0


def chosen_option(answer: str, options: list[str]) -> int | None:
    """
    Index of the option that an answer chooses, or `None` if that cannot be told.

    A letter counts if it stands alone at the beginning, or in brackets, or after the word "answer"; else the text of exactly
    one option must stand in the answer.
    """
    letters = string.ascii_uppercase[: len(options)]
    for pattern in (
        rf"^\s*\(?([{letters}])(?:[).:,]|\s*$)",
        rf"\(([{letters}])\)",
        rf"(?i:answer)(?: is)?:? ([{letters}])\b",
    ):
        match = re.search(pattern, answer)
        if match:
            return letters.index(match[1])
    words = words_of(answer)
    found = [index for index, option in enumerate(options) if contains(words, words_of(option))]
    longest = [
        i for i in found if not any(i != j and contains(words_of(options[j]), words_of(options[i])) for j in found)
    ]
    return longest[0] if len(longest) == 1 else None
