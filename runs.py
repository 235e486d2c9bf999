"""Folders of long runs: what a run was started with, so that a killed one can go on and no other goes on in its place."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors_healthgpt import HealthGPTError
from .hub_export.atomic import write_json
from .hub_export.confine import read_json
from .locks import alone
from .refusals import files

RUN_NAME = "run.json"


def state_of(path: str | Path) -> str | None:
    """A hash of the names, sizes and times of a file or of all files of a folder; `None` for what is not on this disk."""
    path = Path(path)
    if not os.path.exists(path):
        return None
    with files(path):
        return state_of_files(file for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())


def state_of_files(files: Iterable[str | Path]) -> str:
    """A hash of the names, sizes and times of files."""
    stats = [[str(file), Path(file).stat().st_size, Path(file).stat().st_mtime_ns] for file in sorted(files)]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()


def require_same(folder: Path, settings: dict) -> None:
    """
    Raises:
        HealthGPTError: if the run in the folder has other values of these settings, or what is known of it is damaged.
    """
    begun = read_json(folder / RUN_NAME)
    other = [
        describe(name, begun.get(name, "not set"), value)
        for name, value in settings.items()
        if name not in begun or begun[name] != value
    ]
    if other:
        raise HealthGPTError(
            f"{folder} holds a run with other settings: {'; '.join(other)}. Go on with those in its {RUN_NAME}, or choose "
            "another folder."
        )


def describe(name: str, before, now) -> str:
    """That a setting is another one; of a state, which is a hash, only that it is."""
    if name.endswith("_state"):
        return f"{name.removesuffix('_state')} has changed"
    return f"{name} was {json.dumps(before)} and is {json.dumps(now)}"


def begin(folder: Path, settings: dict) -> None:
    """
    Makes the folder of a run, or goes on in it.

    Args:
        folder (`Path`): Folder of the run; made if it does not exist.
        settings (`dict`): What makes this run differ from others; JSON.

    Raises:
        HealthGPTError: as [`require_same`], or if the folder is a file or cannot be made.
    """
    make_folder(folder)
    with files(folder, "used"):
        if (folder / RUN_NAME).exists():
            require_same(folder, dict.fromkeys(read_json(folder / RUN_NAME)) | settings)  # all of them
        else:
            write_json(folder / RUN_NAME, settings)


@contextmanager
def running(folder: Path, settings: dict) -> Iterator[None]:
    """
    A run from where it begins, as [`begin`], to its end, while no other command goes on in its folder.

    Raises:
        HealthGPTError: as `begin`, or if another command has the folder.
    """
    make_folder(folder)
    with alone(folder):
        begin(folder, settings)
        yield


def make_folder(folder: Path) -> None:
    """Makes the folder of a run if it is not there."""
    if os.path.isfile(folder):
        raise HealthGPTError(f"{folder} is a file: name a folder for the run.")
    with files(folder, "made a folder for the run"):
        folder.mkdir(parents=True, exist_ok=True)
