"""Comprehension: a model answers the questions of a benchmark, and its answers are scored."""

from collections import Counter
from collections.abc import Callable
from statistics import fmean

import torch
from scipy.stats import binomtest

from ..conversations import answer_batch
from ..errors_healthgpt import HealthGPTError
from ..images_healthgpt import load_picture
from .benchmarks import Item
from .records import Records
from .scoring import chosen_option, is_right, recall


def answer_items(
    model,
    processor,
    items: list[Item],
    records: Records,
    task: str = "comprehension",
    batch_size: int = 8,
    max_new_tokens: int = 64,
    progress: Callable[[int], None] = lambda number: None,
) -> list[dict]:
    """
    Answers questions greedily, those first that have no record yet.

    Args:
        model, processor: As `from_pretrained` loads them.
        items (`list[Item]`): The questions.
        records (`Records`): Answers of an earlier run; new ones are added batch by batch.
        task (`str`, defaults to `"comprehension"`): Task of the items that name none; it answers in words.
        batch_size (`int`, defaults to 8): Questions answered at once.
        max_new_tokens (`int`, defaults to 64): Longest answer.
        progress (`Callable`, *optional*): Called with the number of questions that were answered since the last call.

    Returns:
        `list[dict]`: For every item its `name`, `kind`, `group`, `question`, `truth`, `answer`, `right` and `recall`.

    Raises:
        HealthGPTError: if there are no questions, or two of one name.
    """
    if not items:
        raise HealthGPTError("There are no questions to answer.")
    names = Counter(item.name for item in items)
    if len(names) < len(items):
        raise HealthGPTError(f"Several questions have the name {names.most_common(1)[0][0]!r}.")
    progress(sum(name in records.done for name in names))
    left = [item for item in items if item.name not in records.done]
    for start in range(0, len(left), batch_size):
        batch = left[start : start + batch_size]
        questions = [(open_pictures(item, processor), item.question) for item in batch]
        answers = answer_batch(model, processor, questions, [item.task or task for item in batch], max_new_tokens)
        records.add([score(item, answer) for item, answer in zip(batch, answers, strict=True)])
        progress(len(batch))
    return [records.done[item.name] for item in items]


def open_pictures(item: Item, processor) -> list:
    try:
        return [load_picture(picture, processor.image_size) for picture in item.pictures()]
    except HealthGPTError as error:
        raise HealthGPTError(f"Question {item.name}: {error}") from error


def score(item: Item, answer: str) -> dict:
    if item.kind == "choice":
        chosen = chosen_option(answer, item.options)
        right = chosen is not None and item.options[chosen] == item.truth
    else:
        right = is_right(answer, item.truth)
    record = {"name": item.name, "kind": item.kind, "group": item.group, "question": item.question}
    return record | {"truth": item.truth, "answer": answer, "right": right, "recall": recall(answer, item.truth)}


def summarise_answers(records: list[dict]) -> dict[str, dict]:
    """
    Accuracy in percent over all questions, by kind and by group, with its 95 % interval (Wilson 1927), and the mean recall of open
    answers.
    """
    parts = {"all": records}
    for field in ("kind", "group"):
        for value in dict.fromkeys(record[field] for record in records):
            if value:
                parts[value] = [record for record in records if record[field] == value]
    summary = {}
    for name, part in parts.items():
        right = sum(record["right"] for record in part)
        interval = binomtest(right, len(part)).proportion_ci(method="wilson")
        summary[name] = {
            "value": 100 * right / len(part),
            "low": 100 * interval.low,
            "high": 100 * interval.high,
            "count": len(part),
        }
    if "open" in parts:
        summary["open recall"] = mean_of([100 * record["recall"] for record in parts["open"]])
    return summary


def mean_of(values: list[float]) -> dict:
    """A mean with its 95 % interval, from a thousand resamples (percentile bootstrap, Efron 1979) of a fixed seed."""
    data = torch.tensor(values, dtype=torch.float64)
    rows = torch.randint(len(values), (1000, len(values)), generator=torch.Generator().manual_seed(0))
    low, high = data[rows].mean(dim=1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"value": fmean(values), "low": low, "high": high, "count": len(values)}
