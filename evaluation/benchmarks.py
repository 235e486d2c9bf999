"""
The benchmarks of comprehension, read from local copies in the form in which the Hub distributes them.

| name | on the Hub | form |
|---|---|---|
| vqa_rad | flaviagiammarino/vqa-rad | Parquet: image, question, answer |
| path_vqa | flaviagiammarino/path-vqa | Parquet: image, question, answer |
| slake | BoKelvin/SLAKE | `test.json` and the unpacked folder `imgs` |
| mmmu_med | MMMU/MMMU | a folder of Parquet files for each subject |
| omnimedvqa | foreverbeliever/OmniMedVQA | `QA_information/Open-access/*.json` and the pictures |

and `samples`, JSON lines as for `healthgpt train`.
"""

import ast
import json
import string
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import load_dataset

from .scoring import YES_NO, words_of

MMMU_MED = (
    "Basic_Medical_Science",
    "Clinical_Medicine",
    "Diagnostics_and_Laboratory_Medicine",
    "Pharmacy",
    "Public_Health",
)


@dataclass
class Item:
    """
    One question of a benchmark.

    Args:
        name (`str`): Unique in the benchmark.
        question (`str`): As the model is asked, options included.
        truth (`str`): The true answer; of a choice, the text of the option.
        kind (`str`): `"closed"`, `"open"` or `"choice"`.
        pictures (`list`): PIL pictures or paths.
        options (`list[str]`): Texts of the options of a choice.
        group (`str`): Part of the benchmark that is reported on its own.
    """

    name: str
    question: str
    truth: str
    kind: str
    pictures: list[Any]
    options: list[str] = field(default_factory=list)
    group: str = ""


def read_benchmark(name: str, path: Path, split: str = "test") -> Iterator[Item]:
    """
    Questions of a benchmark, in the order of its files.

    Args:
        name (`str`): A key of `BENCHMARKS`.
        path (`Path`): The local copy.
        split (`str`, defaults to `"test"`): For the benchmarks that have splits.

    Raises:
        ValueError: if there is no such benchmark or the copy has another form.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"There is no benchmark {name!r}; choose one of {', '.join(BENCHMARKS)}.")
    if not path.exists():
        raise ValueError(f"{path} does not exist.")
    try:
        yield from BENCHMARKS[name](path, split)
    except (KeyError, FileNotFoundError) as error:
        raise ValueError(f"{path} does not have the form of {name}: {error} is missing.") from error


def closed_or_open(answer: str) -> str:
    return "closed" if words_of(answer) and words_of(answer)[0] in YES_NO else "open"


def read_parquet(path: Path, split: str) -> Iterator[Item]:
    """VQA-RAD and PathVQA: yes and no are closed, all else is open."""
    files = sorted(map(str, path.rglob(f"{split}-*.parquet")))
    if not files:
        raise FileNotFoundError(f"{split}-*.parquet")
    for number, row in enumerate(load_dataset("parquet", data_files=files, split="train")):
        yield Item(str(number), row["question"], row["answer"], closed_or_open(row["answer"]), [row["image"]])


def read_slake(path: Path, split: str) -> Iterator[Item]:
    """The English questions; the file says which are closed."""
    for row in json.loads((path / f"{split}.json").read_text(encoding="utf-8")):
        if row["q_lang"] == "en":
            kind = row["answer_type"].lower()
            yield Item(str(row["qid"]), row["question"], row["answer"], kind, [path / "imgs" / row["img_name"]])


def read_mmmu(path: Path, split: str) -> Iterator[Item]:
    """The medical subjects; its answers are public for the split `validation`. Open questions are scored as open."""
    for subject in MMMU_MED:
        files = sorted(map(str, (path / subject).glob(f"{split}-*.parquet")))
        if not files:
            raise FileNotFoundError(f"{subject}/{split}-*.parquet")
        for row in load_dataset("parquet", data_files=files, split="train"):
            pictures = [row[f"image_{n}"] for n in range(1, 8) if row.get(f"image_{n}") is not None]
            question = row["question"]
            for number in range(1, 8):
                question = question.replace(f"<image {number}>", f"(picture {number})")
            options = ast.literal_eval(row["options"])
            if options:
                yield choice(
                    row["id"], question, options, string.ascii_uppercase.index(row["answer"]), pictures, subject
                )
            else:
                yield Item(row["id"], question, row["answer"], "open", pictures, group=subject)


def read_omnimedvqa(path: Path, split: str) -> Iterator[Item]:
    """The open-access part, reported by modality."""
    files = sorted((path / "QA_information/Open-access").glob("*.json"))
    if not files:
        raise FileNotFoundError("QA_information/Open-access/*.json")
    for file in files:
        for row in json.loads(file.read_text(encoding="utf-8")):
            options = [row[f"option_{letter}"] for letter in "ABCD" if row.get(f"option_{letter}")]
            truth = options.index(row["gt_answer"])
            pictures = [path / row["image_path"]]
            yield choice(row["question_id"], row["question"], options, truth, pictures, row["modality_type"])


def read_samples(path: Path, split: str) -> Iterator[Item]:
    """JSON lines with `instruction`, `response` and `input_image`."""
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file):
            row = json.loads(line)
            pictures = row.get("input_image") or []
            pictures = [pictures] if isinstance(pictures, str) else pictures
            pictures = [path.parent / picture for picture in pictures]
            kind = closed_or_open(row["response"])
            yield Item(str(number), row["instruction"], row["response"], kind, pictures, group=row.get("group", ""))


def choice(name, question, options, truth, pictures, group) -> Item:
    """A multiple choice, its options on lines of their own and an instruction to answer with the letter."""
    lines = [f"({letter}) {option}" for letter, option in zip(string.ascii_uppercase, options, strict=False)]
    text = "\n".join([question, *lines, "Answer with the letter of the right option."])
    return Item(name, text, options[truth], "choice", pictures, options, group)


BENCHMARKS = {
    "vqa_rad": read_parquet,
    "path_vqa": read_parquet,
    "slake": read_slake,
    "mmmu_med": read_mmmu,
    "omnimedvqa": read_omnimedvqa,
    "samples": read_samples,
}
