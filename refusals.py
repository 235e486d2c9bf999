"""
What users, their files, machines and networks do to the package, as sentences: each context manager turns what a library raises for
one such cause into a [`HealthGPTError`], and lets everything else, which is a mistake of programming, pass.
"""

import re
import tempfile
import traceback
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors_healthgpt import HealthGPTError

# Packages that only some parts need, and the extra that brings them.
EXTRA_OF = {"accelerate": "train", "datasets": "train", "pyarrow": "train", "tensorboard": "train"}
EXTRA_OF |= {
    "sentencepiece": "export",
    "scipy": "eval",
    "skimage": "eval",
    "torchmetrics": "eval",
    "pydicom": "dicom",
    "nibabel": "dicom",
}
EXTRA_OF |= {
    "matplotlib": "plot",
    "gradio": "ui",
    "bitsandbytes": "quantization",
    "openvino": "openvino",
    "torchao": "torchao",
}

# In errors that are no OSErrors: safetensors and torch.save on a full disk, and pathlib before Python 3.13.
REFUSED = ("I/O error", "PytorchStreamWriter", "inline_container", "Symlink loop")

HUB_FILE = re.compile(r"(_healthgpt|(^|\.)vqgan_decoder)$")  # modules that travel with checkpoints

TOO_LITTLE_MEMORY = (
    "The device has too little memory for this: give fewer images, a smaller batch, or load a quantised checkpoint."
)


def printable(text: str) -> str:
    """A text that a terminal shows and does not obey: control characters, marks of direction and bytes of no UTF-8 as escapes."""
    return "".join(character if character.isprintable() else escape(character) for character in text)


def escape(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a file's name that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return character if unicodedata.category(character) == "Zs" else character.encode("unicode_escape").decode()


def reason_of(error: BaseException) -> str:
    """What a library says of an error, on one line and without a full stop."""
    strerror = getattr(error, "strerror", None)  # of an OSError, without the number and the name
    return " ".join(str(strerror or error).split()).rstrip(".") or type(error).__name__


@contextmanager
def files(path: str | Path, done: str = "read") -> Iterator[None]:
    """
    The use of files or a folder: whatever is in its way (no permission, no space, a name too long, a file for a folder) is a sentence.

    Args:
        path (`str` or `Path`): What is used.
        done (`str`, defaults to `"read"`): What is done to it, a participle.

    Raises:
        HealthGPTError: if the operating system refuses.
    """
    from safetensors import SafetensorError

    try:
        yield
    except OSError as error:
        other = str(error.filename or path)  # of what is used with it, or lies in it
        within = "" if other in (str(path), f"{path}.unfinished") else f"{other}: "
        raise HealthGPTError(f"{path} cannot be {done}: {within}{reason_of(error)}.") from error
    except (SafetensorError, RuntimeError) as error:
        if not any(sign in str(error) for sign in REFUSED):
            raise
        raise HealthGPTError(f"{path} cannot be {done}: {reason_of(error)}.") from error


@contextmanager
def temporary_folder() -> Iterator[str]:
    """
    A folder that goes at the end.

    Raises:
        HealthGPTError: if none can be made.
    """
    with files("A temporary folder", "made"):
        folder = tempfile.TemporaryDirectory()
    with folder as path:
        yield path


def is_defect(error: BaseException) -> bool:
    """
    Whether an error comes out of the code that travels with checkpoints: that says of bad input what is wrong with it, so that
    whatever else it raises, and the operating system does not, is its own mistake. Of a checkpoint's damaged parts the libraries
    raise every type there is.
    """
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    travels = HUB_FILE.search(frame.f_globals.get("__name__", "")) is not None
    return travels and not isinstance(error, (HealthGPTError, OSError))


@contextmanager
def loading(checkpoint: str | Path) -> Iterator[None]:
    """
    The loading of a checkpoint by transformers, from a folder or the Hub.

    Raises:
        HealthGPTError: if a part is missing or damaged, or the Hub refuses or cannot be reached.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (HealthGPTError, ImportError):
        raise
    except SafetensorError as error:
        raise HealthGPTError(f"The weights of {checkpoint} are damaged: {reason_of(error)}.") from error
    except Exception as error:
        if is_defect(error):
            raise
        if type(error) is Exception:  # tokenizers raises no other type for a file that is damaged
            raise HealthGPTError(f"The tokenizer of {checkpoint} is damaged: {reason_of(error)}.") from error
        reason = f"it lacks the entry {error}" if isinstance(error, KeyError) else reason_of(error)
        raise HealthGPTError(f"{checkpoint} cannot be loaded: {reason}.") from error


@contextmanager
def memory() -> Iterator[None]:
    """
    Work that may take more memory than there is.

    Raises:
        HealthGPTError: if it did.
    """
    try:
        yield
    except MemoryError as error:
        raise HealthGPTError(TOO_LITTLE_MEMORY) from error
    except RuntimeError as error:
        from torch import OutOfMemoryError  # one of them; who runs out of memory without torch gets a MemoryError

        if not isinstance(error, OutOfMemoryError) and "DefaultCPUAllocator" not in str(
            error
        ):  # the CPU's has no type
            raise
        raise HealthGPTError(TOO_LITTLE_MEMORY) from error


@contextmanager
def compiling() -> Iterator[None]:
    """
    Passes of a model that transformers may compile.

    Raises:
        HealthGPTError: if torch cannot compile them here.
    """
    try:
        yield
    except RuntimeError as error:
        from torch._dynamo.exc import TorchDynamoException  # not at the head: this takes a second

        if not isinstance(error, TorchDynamoException):
            raise
        raise HealthGPTError(
            f"The model cannot be compiled here: {reason_of(getattr(error, 'inner_exception', error)):.300}. Compiling needs a C++ "
            "compiler, and on a GPU Triton."
        ) from error


@contextmanager
def extras() -> Iterator[None]:
    """
    Imports of packages that an extra brings.

    Raises:
        HealthGPTError: if one of them is not installed; what no extra brings is a mistake of programming.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRA_OF:
            raise
        raise HealthGPTError(f"This needs {package}: pip install healthgpt[{EXTRA_OF[package]}].") from error
