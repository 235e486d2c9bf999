"""
Reading published tensor files, one tensor at a time and without ever running code from them.

safetensors hold no code. Pickles go through torch's `weights_only` unpickler, which builds tensors and plain containers and
nothing else; what a Lightning checkpoint names besides becomes an inert placeholder.
"""

import json
import zipfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open


class CheckpointError(ValueError):
    """A source file that cannot be used; the message is one sentence that says why."""


@contextmanager
def reading(origin: str | Path):
    """Turns whatever a library raises over the content of a file into one sentence that names the file."""
    try:
        yield
    except CheckpointError:
        raise
    except KeyError as error:
        raise CheckpointError(f"{origin} cannot be used: it lacks the entry {error}.") from error
    except Exception as error:  # configuration classes, parsers and torch raise a dozen types
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise CheckpointError(f"{origin} cannot be used: {reason}.") from error


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read when `load` is called. `origin` is the file it lies in."""

    origin: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]


class Placeholder:
    """Stands for every object of a Lightning checkpoint that is no tensor; takes any arguments and does nothing."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


def read_directory(path: str | Path) -> dict[str, LazyTensor]:
    """
    The tensors of a model directory as the Hub has it, sharded or not, safetensors before `.bin`.

    Raises:
        CheckpointError: if there is no such file, a shard is missing or a file cannot be read.
    """
    path = Path(path)
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = path / f"{name}.index.json"
        if (path / name).is_file():
            return read_file(path / name)
        if index.is_file():
            try:
                shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise CheckpointError(f"{index} is no index of shards: {error!r}.") from error
            return {key: tensor for shard in shards for key, tensor in read_file(path / shard).items()}
    raise CheckpointError(f"{path} holds no weights: neither model.safetensors nor pytorch_model.bin, nor an index.")


def read_file(path: str | Path) -> dict[str, LazyTensor]:
    """
    The tensors of one safetensors or PyTorch file; of a Lightning checkpoint those of its `state_dict`.

    Raises:
        CheckpointError: if the file is missing, damaged, no such file, or holds something else than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist.")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path} is empty: it has zero bytes.")
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)


def _read_safetensors(path):
    def loader(key):
        def load():
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(key)

        return load

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {}
            for key in file.keys():
                part = file.get_slice(key)
                dtype = file.get_tensor(key).dtype if not part.get_shape() else part[:0].dtype
                tensors[key] = LazyTensor(path, tuple(part.get_shape()), dtype, loader(key))
            return tensors
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}.") from error


def _read_pickle(path):
    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"{path} is no PyTorch file: it is not the zip archive that torch.save writes, or cut off."
        )
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"its part {damaged} does not have the checksum that was stored with it")
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        placeholders = [(type("Placeholder", (Placeholder,), {}), name) for name in names]
        with torch.serialization.safe_globals(placeholders):
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # zipfile and torch raise a dozen types for damaged files, down to AssertionError
        lines = str(error).split("\n")
        reason = next((line for line in lines if "WeightsUnpickler error" in line or "GLOBAL" in line), lines[-1])
        reason = reason.split(" Please use")[0].strip() or type(error).__name__
        raise CheckpointError(f"{path} cannot be read as a PyTorch checkpoint: {reason}") from error
    state_dict = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(state_dict, dict) or not all(isinstance(value, torch.Tensor) for value in state_dict.values()):
        raise CheckpointError(f"{path} holds something else than tensors by name.")
    return {
        key: LazyTensor(path, tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor)
        for key, tensor in state_dict.items()
    }
