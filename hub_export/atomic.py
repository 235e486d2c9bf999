"""Small files that are there whole or, after a kill, as they were; and what is left of a write that failed."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from .confine import CheckpointError


def write_json(path: Path, content: dict) -> None:
    """Writes a file that is there whole or, after a kill, as it was."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, content: str) -> None:
    """Writes a file that is there whole or, after a kill, as it was."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    with writing(path, unfinished):
        unfinished.write_text(content, encoding="utf-8")
        unfinished.rename(path)


@contextmanager
def writing(target: Path, partial: Path | None = None) -> Iterator[None]:
    """
    Turns what the libraries make of a full or read-only disk into one sentence, and takes the partial file or folder away.

    Raises:
        CheckpointError: if something could not be written.
    """
    try:
        yield
    except CheckpointError:
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        if partial is not None:
            discard(partial)
        reason = " ".join(str(error).split()).rstrip(".")
        raise CheckpointError(f"{target} could not be written, and nothing was kept: {reason}.") from error


def discard(path: Path) -> None:
    """Removes a file, or a folder with all that it holds, if there is one; of a link the link alone."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()
