"""
How an answer is scored.

    closed   right if the answer decides for the true option
    open     right if the true answer stands in it; also its recall, as LLaVA-Med (arXiv 2306.00890, section 5) reports
    choice   right if the answer names the true option's letter, or else its text and no other's; see `chosen_option`

Texts are compared as in the VQA benchmark (Antol et al. 2015): small letters, no punctuation, no articles, unless a text is nothing
else. HealthGPT's authors publish accuracies without their rules, therefore figures beside theirs are near them, not the same measure.
"""

import re
import string

YES_NO = ("yes", "no")
ARTICLES = ("a", "an", "the")


def words_of(text: str) -> list[str]:
    """The words of a text in small letters; without punctuation and articles, unless it is nothing else."""
    words = text.lower().split()
    plain = re.sub(rf"[{re.escape(string.punctuation)}]", " ", text.lower()).split()
    return [word for word in plain if word not in ARTICLES] or plain or words


def contains(words: list[str], part: list[str]) -> bool:
    """Whether `part` stands in `words` as it is."""
    starts = range(len(words) - len(part) + 1)
    return bool(part) and any(words[start : start + len(part)] == part for start in starts)


def is_right(answer: str, truth: str) -> bool:
    """
    Whether an answer in words is right, closed or open.

    Yes or no counts as the first word, or else where only one of the two is said; any other truth must stand in the answer,
    word by word.
    """
    answered, expected = words_of(answer), words_of(truth)
    if not is_closed(truth):
        return contains(answered, expected)
    said = set(answered[:1]) & set(YES_NO) or set(answered) & set(YES_NO)
    return said == set(expected)


def is_closed(truth: str) -> bool:
    """Whether the true answer is yes or no and nothing else."""
    return words_of(truth) in ([word] for word in YES_NO)


def recall(answer: str, truth: str) -> float:
    """Share of the true answer's words that the answer has."""
    answered, expected = set(words_of(answer)), words_of(truth)
    return sum(word in answered for word in expected) / len(expected) if expected else 0.0


def chosen_option(answer: str, options: list[str]) -> int | None:
    """
    Index of the option that an answer chooses, or `None` if that cannot be told.

    A letter counts if it is the whole answer or its first line, or stands at its beginning with a bracket, dot, comma or colon, or
    as a capital other than A and I, which are words too; after "answer", "option" or "choice", but not before the text of another
    option, where it is the article; or else if the text of exactly one option stands in the answer; or at last if a single
    letter stands in brackets. Small letters count as capital ones, and marks of emphasis are passed over.
    """
    letters = string.ascii_uppercase[: len(options)]
    plain = answer.replace("*", "").strip()
    named = r"(?i:\b(?:answer|option|choice)(?: is)?)(?::\s*|\s+)"
    for pattern in (
        rf"^[(\[]?((?i:[{letters}]))(?:[)\].:,\n]|$)",
        rf"^((?![AI])[{letters}]) ",
        rf"{named}[(\[]?([{letters}])\b",
        rf"{named}[(\[]?([{letters.lower()}])(?:[)\].]|$)",  # not the article
    ):
        match = re.search(pattern, plain)
        if match:
            index = letters.index(match[1].upper())
            following = words_of(plain[match.end() :]) if match[0].endswith(("A", "I")) else []
            others = [words_of(option) for option in options if option != options[index]]
            if not any(other and following[: len(other)] == other for other in others):
                return index
    words = words_of(plain)
    found = [index for index, option in enumerate(options) if contains(words, words_of(option))]
    longest = [
        i for i in found if not any(i != j and contains(words_of(options[j]), words_of(options[i])) for j in found)
    ]
    if len(longest) == 1:
        return longest[0]
    bracketed = {letter.upper() for letter in re.findall(rf"\(([{letters}])\)", plain, re.IGNORECASE)}
    return letters.index(bracketed.pop()) if not longest and len(bracketed) == 1 else None
