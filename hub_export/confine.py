"""
Nothing outside its folder: the one place where a name that comes with a checkpoint, a plugin, an index or a record becomes a path.

Such a name is that of a file in the same folder. A symbolic link counts as what it leads to. Only in the Hub's cache, whose
snapshots are links to blobs, may it lead out of its folder; and no folder with links is written to.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors_healthgpt import HealthGPTError
from ..refusals import is_defect, reason_of

INDEX_NAME = "model.safetensors.index.json"
# What transformers reads of a checkpoint besides weights, code and chat templates.
SETTINGS = ("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json")
SETTINGS += ("tokenizer_config.json", "tokenizer.json", INDEX_NAME, "pytorch_model.bin.index.json")
TEMPLATES = "additional_chat_templates"
ADAPTER = "adapter_config.json"  # of PEFT
POINTER = b"version https://git-lfs"


class CheckpointError(HealthGPTError):
    """A checkpoint, a plugin or a source file that cannot be used; the message is one sentence that says why."""


@contextmanager
def reading(origin: str | Path):
    """
    Turns whatever is raised over the content of a file into one sentence that names the file, except what [`is_defect`] tells to
    be a mistake of programming. What does not depend on the content belongs outside, where every such mistake stays a traceback.

    Raises:
        CheckpointError: for any error.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # configuration classes, parsers and torch raise a dozen types
        if is_defect(error):
            raise
        reason = f"it lacks the entry {error}" if isinstance(error, KeyError) else reason_of(error)
        raise CheckpointError(f"{origin} cannot be used: {reason}.") from error


def inside(folder: Path, name: str, origin: str | Path) -> Path:
    """
    The path of a file in a folder, by a name that was read somewhere.

    Args:
        folder (`Path`): The folder.
        name (`str`): The name: letters, digits, dots, underscores and hyphens.
        origin (`str` or `Path`): Where it was read, for the message.

    Raises:
        CheckpointError: if it is not the name of a file in the folder, or is that of a symbolic link out of it.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name) or not name.strip("."):
        raise CheckpointError(
            f"{origin} cannot be used: it names the file {str(name)[:100]!r}, but may only name files in its own folder."
        )
    path = folder / name
    if os.path.islink(path) and not _stays(path):
        raise CheckpointError(
            f"{path} is a symbolic link that leaves its folder: put the file itself there, for example with cp -L."
        )
    return path


def require_confined(folder: Path) -> None:
    """
    Raises:
        CheckpointError: if an entry of a folder is a symbolic link that leaves it.
    """
    if not os.path.isdir(folder):
        raise CheckpointError(f"The folder {folder} does not exist.")
    for name in links(folder):
        inside(folder, name, folder)


def require_no_links(folder: Path) -> None:
    """
    Raises:
        CheckpointError: if an entry of a folder that is to be changed is a symbolic link.
    """
    for name in links(folder):
        raise CheckpointError(
            f"{folder / name} is a symbolic link, and a folder with links is not changed: make a copy, for example with cp -rL, "
            "and change that."
        )


def links(folder: Path) -> list[str]:
    """The names of symbolic links in a folder."""
    with reading(folder):
        return [entry.name for entry in os.scandir(folder) if entry.is_symlink()]


def require_loadable(folder: Path) -> None:
    """
    Checks a checkpoint before transformers opens it: every file that it leads to is in its folder, and is the file itself.

    Raises:
        CheckpointError: if a link, a name or an adapter's settings lead out of the folder, settings or templates cannot be read,
            or a file is only git-lfs's pointer to it.
    """
    require_confined(folder)
    if os.path.lexists(folder / ADAPTER):
        raise CheckpointError(
            f"{folder} has a file {ADAPTER}, for which transformers loads another model in its place: take it out."
        )
    if os.path.isdir(folder / TEMPLATES):
        require_confined(folder / TEMPLATES)
    with reading(folder):
        files = [*folder.glob("*.safetensors"), *folder.glob("*.jinja")]
    for path in files:
        require_no_pointer(path)
    for path in (*(folder / name for name in SETTINGS), *folder.glob("config.*.json")):
        for name in named_files(read_json(path)) if path.is_file() else ():
            inside(folder, name, path)
    for path in folder.glob("*.jinja"):
        with reading(path):
            path.read_text(encoding="utf-8")


def named_files(content: dict) -> Iterator[str]:
    """What an index or a file of settings gives as names of files; of spoilt ones anything."""
    for key, value in content.items():
        if key == "weight_map" and isinstance(value, dict):
            yield from value.values()
        elif key.endswith(("_file", "_files")) or key in ("weight_map", "transformers_weights"):
            yield from value if isinstance(value, list) else [] if value is None else [value]


def require_no_pointer(path: Path) -> None:
    """
    Raises:
        CheckpointError: if a file is only what git-lfs leaves of a large one.
    """
    with reading(path), open(path, "rb") as file:
        start = file.read(len(POINTER))
    if start == POINTER:
        raise CheckpointError(f"{path} is only git-lfs's pointer to the file: get the file itself with git lfs pull.")


def read_json(path: Path) -> dict:
    """
    Raises:
        CheckpointError: if the file is missing or is not a JSON object.
    """
    if not os.path.isfile(path):
        raise CheckpointError(f"{path} does not exist.")
    require_no_pointer(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # of brackets without end
        raise CheckpointError(f"{path} is no JSON: {error}.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object.")
    return content


def _stays(link):
    """Whether a link leads to something in its folder; from a snapshot of the Hub's cache, to a blob of it."""
    folder, target = Path(os.path.realpath(link.parent)), Path(os.path.realpath(link))
    if target.is_relative_to(folder):
        return True
    for snapshot in (folder, *folder.parents):
        repository = snapshot.parent.parent
        if snapshot.parent.name == "snapshots" and repository.name.startswith("models--"):
            # The repository's own blobs, or those that huggingface_hub 2 keeps for all repositories, in folders by their first digits.
            return repository / "blobs" == target.parent or repository.parent / "blobs" == target.parent.parent
    return False
