"""
What the files of an exported checkpoint say, without torch and without its weights: settings, tasks, headers, the record.

That a model can be built with the settings is checked where they are loaded, by [`HealthGPTConfig`].
"""

import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace

from safetensors import SafetensorError, safe_open

from .confine import INDEX_NAME, CheckpointError, inside, read_json, reading, require_confined, require_no_pointer

RECORD_NAME = "healthgpt_export.json"
SINGLE_NAME = "model.safetensors"


def plugin_file(task: str) -> str:
    """Name of the file with what a task owns; one that save_pretrained clears away when it shards anew."""
    return f"model-plugin_{task}-00001-of-00001.safetensors"


def task_of(name: str, tasks: dict) -> str | None:
    """The task that owns a tensor of the checkpoint, or None if it belongs to all or several."""
    match = re.search(r"\.plugins\.(\w+)\.|^model\.projectors\.(\w+)\.", name)
    if match:
        return match[1] or match[2]
    match = re.match(r"(?:model\.token_embeddings|token_heads)\.(\w+)\.", name)
    owners = [task for task, settings in tasks.items() if match and settings.token_tables == match[1]]
    return owners[0] if len(owners) == 1 else None


def list_plugins(checkpoint: Path) -> dict[str, dict[str, int]]:
    """
    Number and bytes of the tensors that each task of a checkpoint owns.

    Raises:
        CheckpointError: if it is not a checkpoint, or one of its files is missing, damaged or not in its folder.
    """
    tasks = read_tasks(read_settings(checkpoint), checkpoint)
    found = {task: {"tensors": 0, "bytes": 0} for task in tasks}
    for file in set(read_weight_map(checkpoint).values()):
        for name, header in read_headers(checkpoint / file).items():
            task = task_of(name, tasks)
            if task in found:
                found[task]["tensors"] += 1
                found[task]["bytes"] += header.nbytes
    return found


def read_settings(checkpoint: Path, origin: str | Path | None = None) -> dict:
    """
    The content of a checkpoint's `config.json`.

    Args:
        checkpoint (`Path`): Its folder.
        origin (`str` or `Path`, defaults to the folder): How it was named, for the message.

    Raises:
        CheckpointError: if it is no checkpoint, one of another model, or has links that leave its folder.
    """
    origin = origin or checkpoint
    require_confined(checkpoint)
    if not os.path.isfile(checkpoint / "config.json"):
        raise CheckpointError(f"{origin} is no HealthGPT checkpoint: it has no config.json.")
    settings = read_json(checkpoint / "config.json")
    model_type = settings.get("model_type")
    if model_type != "healthgpt":
        raise CheckpointError(f"{origin} is no HealthGPT checkpoint: its config.json is that of a {model_type} model.")
    return settings


def read_tasks(settings: dict, origin: str | Path) -> dict[str, SimpleNamespace]:
    """
    The tasks of a checkpoint's settings by name, with the fields of [`TaskConfig`] that they give, as they give them.

    Raises:
        CheckpointError: if there are none, or one lacks a field that has no default; the message names `origin`.
    """
    with reading(f"The config.json of {origin}"):
        tasks = {name: SimpleNamespace(**{"token_tables": None, **task}) for name, task in settings["tasks"].items()}
        for task in tasks.values():
            itemgetter("kind", "rank", "alpha", "num_experts", "vision_layer")(vars(task))
    return tasks


@dataclass(frozen=True)
class Header:
    """
    What a safetensors file says of a tensor.

    Args:
        shape (`tuple[int, ...]`): Its shape.
        dtype (`str`): Its dtype in the words of safetensors, such as `BF16`.
    """

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes that its values take."""
        bits = re.search(r"\d+", self.dtype)
        return math.prod(self.shape) * (int(bits[0]) if bits else 8) // 8  # BOOL names no number


def read_headers(path: Path) -> dict[str, Header]:
    """
    What a safetensors file says of its tensors.

    Raises:
        CheckpointError: if the file is missing or damaged.
    """
    require_weights(path)
    with opened(path, "np") as file:
        parts = {name: file.get_slice(name) for name in file.keys()}
        return {name: Header(tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}


@contextmanager
def opened(path: Path, framework: str) -> Iterator[safe_open]:
    """
    A safetensors file, whose tensors are read with NumPy (`"np"`) or torch (`"pt"`).

    Raises:
        CheckpointError: if it is damaged.
    """
    try:
        with safe_open(path, framework=framework) as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}.") from error


def require_weights(path: Path) -> None:
    """
    Raises:
        CheckpointError: if a file of weights is missing, is only git-lfs's pointer to it or is empty.
    """
    if not os.path.isfile(path):
        raise CheckpointError(f"{path} does not exist.")
    require_no_pointer(path)
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path} is empty: it has zero bytes.")


def read_weight_map(checkpoint: Path) -> dict[str, str]:
    """
    The file of every tensor of a checkpoint.

    Raises:
        CheckpointError: if there is neither an index nor a single file of all weights, or it cannot be used.
    """
    if (checkpoint / SINGLE_NAME).is_file():  # transformers too looks for it first
        return dict.fromkeys(read_headers(checkpoint / SINGLE_NAME), SINGLE_NAME)
    return read_index(checkpoint / INDEX_NAME)


def read_index(path: Path) -> dict[str, str]:
    """
    The file of every tensor, by an index of shards.

    Raises:
        CheckpointError: if the file is not an index, or names something that is not in its folder.
    """
    content = read_json(path)
    with reading(path):
        weight_map = dict(content["weight_map"])
    for name in weight_map.values():
        inside(path.parent, name, path)
    return weight_map


def read_record(folder: Path) -> dict:
    """
    What an export wrote about itself: the content of `healthgpt_export.json`.

    Raises:
        CheckpointError: if it is missing or no such record, or names files elsewhere than in the folder.
    """
    path = inside(folder, RECORD_NAME, folder)
    record = read_json(path)
    with reading(path):
        names = list(record["files"])
    for name in names:
        inside(folder, name, path)
    return record


def require_files(folder: Path, files: list[str]) -> None:
    """
    Raises:
        CheckpointError: if a finished checkpoint lacks one of its files, or a weight file is cut off.
    """
    missing = [name for name in files if not os.path.isfile(folder / name)]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {', '.join(missing)}, which the export wrote: remove it and export again."
        )
    for name in files:
        if name.endswith(".safetensors"):
            read_headers(folder / name)
