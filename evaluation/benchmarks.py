"""
The benchmarks of comprehension, read from local copies in the form in which the Hub distributes them.

| name | on the Hub | form |
|---|---|---|
| vqa_rad | flaviagiammarino/vqa-rad | Parquet: image, question, answer |
| path_vqa | flaviagiammarino/path-vqa | Parquet: image, question, answer |
| slake | BoKelvin/SLAKE | `test.json` and the unpacked folder `imgs` |
| mmmu_med | MMMU/MMMU | a folder of Parquet files for each subject |
| omnimedvqa | foreverbeliever/OmniMedVQA | `QA_information/Open-access/*.json` and the pictures |

Questions of one's own are samples (`healthgpt.samples`).
"""

import ast
import json
import os
import re
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, Image, load_dataset

from ..errors_healthgpt import HealthGPTError
from ..hub_export.confine import reading
from ..medical import open_picture
from ..refusals import reason_of
from .scoring import is_closed

MMMU_MED = (
    "Basic_Medical_Science",
    "Clinical_Medicine",
    "Diagnostics_and_Laboratory_Medicine",
    "Pharmacy",
    "Public_Health",
)

KINDS = ("closed", "open", "choice")
DEFAULT_SPLITS = {"mmmu_med": "validation"}  # of all others "test"


@dataclass
class Item:
    """
    One question of a benchmark.

    Args:
        name (`str`): Unique in the benchmark.
        question (`str`): As the model is asked, options included.
        truth (`str`): The true answer; of a choice, the text of the option.
        kind (`str`): `"closed"`, `"open"` or `"choice"`.
        pictures (`Callable[[], list]`): Reads its PIL pictures; a benchmark's pictures are too many to be held at once.
        options (`list[str]`): Texts of the options of a choice.
        group (`str`): Part of the benchmark that is reported on its own.
        task (`str`): Task that answers it; by default that of the run.
    """

    name: str
    question: str
    truth: str
    kind: str
    pictures: Callable[[], list[Any]]
    options: list[str] = field(default_factory=list)
    group: str = ""
    task: str = ""

    def __post_init__(self):
        if self.kind not in KINDS or not all(isinstance(text, str) for text in (self.question, self.truth)):
            raise HealthGPTError(
                f"Question {self.name} needs a text as its question and as its answer, and the kind {' or '.join(KINDS)}, got "
                f"{self.question!r}, {self.truth!r} and {self.kind!r}."
            )


def read_benchmark(name: str, path: Path, split: str | None = None) -> Iterator[Item]:
    """
    Questions of a benchmark, in the order of its files.

    Args:
        name (`str`): A key of `BENCHMARKS`.
        path (`Path`): The local copy.
        split (`str`, *optional*): For the benchmarks that have splits; by default the one with public answers,
            `"validation"` of MMMU and `"test"` of the others.

    Raises:
        HealthGPTError: if there is no such benchmark or the copy has another form.
    """
    if name not in BENCHMARKS:
        raise HealthGPTError(
            f"There is no benchmark {name!r}; choose one of {', '.join(BENCHMARKS)}, or samples of your own."
        )
    if not os.path.exists(path):
        raise HealthGPTError(f"{path} does not exist.")
    try:
        yield from BENCHMARKS[name](path, split or DEFAULT_SPLITS.get(name, "test"))
    except HealthGPTError:
        raise
    except KeyError as error:
        raise HealthGPTError(
            f"{path} does not have the form of {name}: a question lacks the entry {error}."
        ) from error
    except FileNotFoundError as error:
        raise HealthGPTError(f"{path} does not have the form of {name}: {error} is missing.") from error
    except OSError as error:
        raise HealthGPTError(f"{error.filename or path} cannot be read: {reason_of(error)}.") from error
    except (AttributeError, IndexError, SyntaxError, TypeError, ValueError) as error:  # an entry of another type
        raise HealthGPTError(f"{path} does not have the form of {name}: {reason_of(error)}.") from error


def closed_or_open(answer: str) -> str:
    return "closed" if is_closed(answer) else "open"


def parquet(folder: Path, split: str) -> Dataset:
    files = sorted(map(str, folder.rglob(f"{split}-*.parquet")))
    if not files:
        raise FileNotFoundError(f"{folder.name}/{split}-*.parquet")
    with reading(folder):
        rows = load_dataset("parquet", data_files=files, split="train")
    for column, feature in rows.features.items():
        if re.fullmatch(r"image(_\d)?", column) and not isinstance(feature, Image):
            raise HealthGPTError(f"The column {column} of {folder} holds no pictures.")
    return rows


def read_parquet(path: Path, split: str) -> Iterator[Item]:
    """VQA-RAD and PathVQA: yes and no are closed, all else is open."""
    rows = parquet(path, split)
    for number, row in enumerate(rows.select_columns(["question", "answer"])):
        kind = closed_or_open(row["answer"])
        yield Item(str(number), row["question"], row["answer"], kind, partial(pictures_of, rows, number, ["image"]))


def pictures_of(rows: Dataset, number: int, columns: list[str]) -> list:
    with reading(f"The image of row {number}"):
        row = rows[number]
    return [row[column] for column in columns if row[column] is not None]


def open_all(paths: list[Path]) -> list:
    return [open_picture(path) for path in paths]


def existing(path: Path, name: str) -> Path:
    """The path of a question's picture, which is opened much later."""
    if not path.is_file():
        raise HealthGPTError(f"{path}, the picture of question {name}, does not exist.")
    return path


def objects(file: Path) -> list[dict]:
    """The content of a JSON file."""
    if not file.is_file():
        raise FileNotFoundError(file.name)
    try:
        rows = json.loads(file.read_bytes())
    except ValueError as error:
        raise HealthGPTError(f"{file} is no JSON: {error}.") from error
    if not (isinstance(rows, list) and all(isinstance(row, dict) for row in rows)):
        raise HealthGPTError(f"{file} is no list of objects.")
    return rows


def read_slake(path: Path, split: str) -> Iterator[Item]:
    """The English questions; the file says which are closed."""
    for row in objects(path / f"{split}.json"):
        if row["q_lang"] == "en":
            picture = existing(path / "imgs" / row["img_name"], row["qid"])
            kind = row["answer_type"].lower()
            yield Item(str(row["qid"]), row["question"], row["answer"], kind, partial(open_all, [picture]))


def read_mmmu(path: Path, split: str) -> Iterator[Item]:
    """The medical subjects. Open questions are scored as open."""
    for subject in MMMU_MED:
        rows = parquet(path / subject, split)
        columns = [f"image_{number}" for number in range(1, 8) if f"image_{number}" in rows.column_names]
        for number, row in enumerate(rows.select_columns(["id", "question", "options", "answer"])):
            if row["answer"] == "?":
                raise HealthGPTError(
                    f"The answers of MMMU's split {split!r} are not public: take the split validation."
                )
            pictures = partial(pictures_of, rows, number, columns)
            question, *options = (
                re.sub(r"<image (\d)>", r"(picture \1)", text)
                for text in (row["question"], *ast.literal_eval(row["options"]))
            )
            if options:
                truth = string.ascii_uppercase.index(row["answer"])
                yield choice(row["id"], question, options, truth, pictures, subject)
            else:
                yield Item(row["id"], question, row["answer"], "open", pictures, group=subject)


def read_omnimedvqa(path: Path, split: str) -> Iterator[Item]:
    """The open-access part, reported by modality."""
    files = sorted((path / "QA_information/Open-access").glob("*.json"))
    if not files:
        raise FileNotFoundError("QA_information/Open-access/*.json")
    for file in files:
        for row in objects(file):
            options = [row[f"option_{letter}"] for letter in "ABCD" if row.get(f"option_{letter}")]
            if row["gt_answer"] not in options:
                raise HealthGPTError(f"{row['question_id']} in {file} has an answer that is none of its options.")
            picture = existing(path / row["image_path"], row["question_id"])
            truth, pictures = options.index(row["gt_answer"]), partial(open_all, [picture])
            name = f"{file.stem} {row['question_id']}"
            yield choice(name, row["question"], options, truth, pictures, row["modality_type"])


def items_of(samples: Dataset) -> list[Item]:
    """
    Questions from samples, those with a `response`; their names are the numbers of their lines.

    Args:
        samples (`Dataset`): As `healthgpt.samples.read_samples` reads them.
    """
    return [
        Item(
            str(number),
            sample["instruction"],
            sample["response"],
            closed_or_open(sample["response"]),
            partial(open_all, sample["input_image"]),
            group=sample["group"] or "",
            task=sample["task"],
        )
        for number, sample in enumerate(samples, 1)
        if sample["response"] is not None
    ]


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
}
