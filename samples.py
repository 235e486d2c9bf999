"""
Samples to train on or to measure with: JSON lines of tasks, instructions, answers and pictures.

    {"task": "comprehension", "instruction": "What is this?", "response": "A chest X-ray.", "input_image": "a.png"}
    {"task": "generation", "instruction": "Reconstruct the image.", "input_image": "a.png", "target_image": "a.png"}

`input_image` is a path, a list of paths or absent; paths start at the folder of the JSON file. `target_codes`, a list of numbers,
may stand in place of `target_image`. `<image>` in a text is text: images are in their own fields. `group` names a part that
`healthgpt eval answers` reports on its own.
"""

import json
from collections.abc import Callable
from pathlib import Path

from datasets import Dataset, Features, List, Value, concatenate_datasets

from .errors_healthgpt import HealthGPTError
from .images_healthgpt import load_picture
from .medical import open_picture
from .processing_healthgpt import image_as_text, reserved_token

FIELDS = ("task", "instruction", "response", "input_image", "target_image", "target_codes", "group")
FEATURES = Features(
    {field: Value("string") for field in ("task", "instruction", "response", "target_image", "group")}
    | {"input_image": List(Value("string")), "target_codes": List(Value("int32"))}
)
PART = 1000  # rows that are Python objects at once, where codes take ten times the memory that they take in Arrow
ROWS = ("all", "closed", "open", "choice", "open recall")  # of the table of answers; no group can have these names


def read_samples(
    path: Path,
    config,
    processor,
    default_task: str | None = None,
    progress: Callable[[int], None] = lambda number: None,
) -> Dataset:
    """
    Reads a file of samples and checks all of them.

    Args:
        path (`Path`): JSON lines.
        config (`HealthGPTConfig`): Of the model that they are for: its tasks, and the codes of its pictures.
        processor (`HealthGPTProcessor`): Of the same model: its special tokens, which texts cannot have.
        default_task (`str`, *optional*): Task of the samples that name none.
        progress (`Callable`, *optional*): Called with the number of bytes that were read since the last call.

    Returns:
        `Dataset`: A row for each line, with the columns `task`, `instruction`, `response` (`None` where a picture is
        drawn), `input_image` (a list of paths), `target_image` (a path or `None`), `target_codes` (a list or `None`) and
        `group` (a name or `None`).

    Raises:
        HealthGPTError: if a line is no sample, or a picture is missing or none; the sentence names the line.
    """
    parts, rows, seen = [], [], set()
    tokenizer = processor.tokenizer.backend_tokenizer
    with open(path, "rb") as file:  # what is no UTF-8 belongs to a line too
        for number, line in enumerate(file, 1):
            try:
                row = check_sample(parse(line), path.parent, config, default_task)
                for field in ("instruction", "response"):
                    token = reserved_token(tokenizer, image_as_text(row[field] or ""))
                    if token is not None:
                        raise HealthGPTError(f"its {field} has {token}, a token that only the processor writes.")
                for picture in {*row["input_image"], row["target_image"]} - {None, *seen}:
                    load_picture(open_picture(picture), config.vision_config.image_size)
                    seen.add(picture)
            except HealthGPTError as error:
                raise HealthGPTError(f"Line {number} of {path} is no sample: {error}") from error
            rows.append(row)
            if len(rows) == PART:
                parts.append(Dataset.from_list(rows, features=FEATURES))
                rows = []
            progress(len(line))
    if rows:
        parts.append(Dataset.from_list(rows, features=FEATURES))
    if not parts:
        raise HealthGPTError(f"{path} has no samples.")
    return concatenate_datasets(parts)


def pictures_of(samples: Dataset) -> set[str]:
    """Paths of all pictures of samples."""
    inputs = (picture for pictures in samples["input_image"] for picture in pictures)
    return {*inputs, *filter(None, samples["target_image"])}


def parse(line: bytes):
    """The content of a line of UTF-8; half of a surrogate pair is no text."""
    if not line.strip():
        raise HealthGPTError("it is empty.")
    try:
        content = json.loads(line.decode("utf-8-sig"))
        json.dumps(content, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:  # of brackets without end
        raise HealthGPTError(f"it must be one JSON object, in UTF-8 and on a line of its own ({error}).") from error
    return content


def check_sample(row, folder: Path, config, default_task: str | None) -> dict:
    if not isinstance(row, dict):
        raise HealthGPTError(f"it must be a JSON object, but is {type(row).__name__}.")
    unknown = [field for field in row if field not in FIELDS]
    if unknown:
        raise HealthGPTError(f"it has the field {unknown[0]!r}; samples have fields of {', '.join(FIELDS)} alone.")
    row = {field: value for field, value in row.items() if value is not None}
    task = row.get("task", default_task)
    if task is None:
        raise HealthGPTError(
            f"it names no task, and none is named for such lines; the tasks are {', '.join(config.tasks)}."
        )
    if not isinstance(task, str) or task not in config.tasks:
        raise HealthGPTError(f"its task is {task!r}, but the tasks are {', '.join(config.tasks)}.")
    targets = ["response"] if config.tasks[task].kind == "text" else ["target_image", "target_codes"]
    given = [field for field in ("response", "target_image", "target_codes") if field in row]
    if len(given) != 1 or given[0] not in targets:
        raise HealthGPTError(f"task {task!r} needs a {' or a '.join(targets)} and nothing else to learn.")
    for field in ("instruction", "response", "target_image"):
        if field in ("instruction", *given) and not (isinstance(row.get(field), str) and row[field].strip()):
            raise HealthGPTError(f"task {task!r} needs a text as its {field}.")
    if "target_codes" in row:
        count, number = config.num_image_codes, config.vqgan_config.num_codes
        codes = row["target_codes"]
        if not (
            isinstance(codes, list)
            and len(codes) == count
            and all(type(code) is int and 0 <= code < number for code in codes)  # true is an int too
        ):
            raise HealthGPTError(f"target_codes must be a list of {count} whole numbers from 0 to {number - 1}.")
    pictures = row.get("input_image", [])
    pictures = [pictures] if isinstance(pictures, str) else pictures
    if not (isinstance(pictures, list) and all(isinstance(picture, str) and picture for picture in pictures)):
        raise HealthGPTError("input_image must be a path or a list of paths.")
    group = row.get("group")
    named = isinstance(group, str) and group.strip() and not set(group) & set("|\r\n")
    if group is not None and (not named or group.strip() in ROWS):
        raise HealthGPTError(
            f"group must be a name without | and line breaks, and none of {', '.join(ROWS)}, got {group!r}."
        )
    return {
        "task": task,
        "instruction": row["instruction"],
        "response": row.get("response"),
        "input_image": [str(folder / picture) for picture in pictures],
        "target_image": str(folder / row["target_image"]) if "target_image" in row else None,
        "target_codes": row.get("target_codes"),
        "group": group and group.strip(),
    }
