"""One command at a time on a file or folder: the lock of everything that is changed in more than one step."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from .errors_healthgpt import HealthGPTError
from .refusals import files


def lock_of(path: str | Path) -> Path:
    """The file that is locked for a file or folder: a hidden one next to it, whatever links lead to it."""
    path = Path(os.path.realpath(path))
    return path.with_name(f".{path.name}.lock")


@contextmanager
def alone(path: str | Path) -> Iterator[None]:
    """
    Keeps other commands, of any user, away from a file or folder while this one changes it.

    The operating system holds the lock, and takes it away with the process: what a killed one leaves is an empty file that stops
    nobody.

    Args:
        path (`str` or `Path`): What is changed, there or not, in a folder that exists.

    Raises:
        HealthGPTError: if another command has it, the folder around it does not exist, or it cannot be locked.
    """
    with files(path, "locked"):
        file = lock_of(path)
        if not file.parent.is_dir():  # which the library would make
            raise HealthGPTError(f"The folder {Path(path).parent} does not exist.")
        # For all users, who else could not lock the file that a killed command of one of them left.
        lock = FileLock(file, mode=0o666, blocking=False, fallback_to_soft=False)
        try:
            held = lock.acquire()
        except Timeout as error:
            if not os.path.lexists(file):  # what the library says too where no file can be made
                raise HealthGPTError(f"{path} could not be written: {file} cannot be made.") from error
            raise HealthGPTError(f"Another command is changing {path}: wait until it has ended.") from error
    with held:
        try:
            yield
        finally:
            with suppress(PermissionError):  # on Windows, where the library removes the file once it is released
                file.unlink(missing_ok=True)
