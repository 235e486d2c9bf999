"""
Reading published tensor files, one tensor at a time and without ever running code from them.

safetensors hold no code. Pickles go through torch's `weights_only` unpickler, which builds tensors and plain containers and
nothing else; what a Lightning checkpoint names besides becomes an inert placeholder.
"""

import math
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open

from .checkpoint import opened, read_index, require_weights
from .confine import CheckpointError, inside, reading


@dataclass(frozen=True)
class LazyTensor:
    """
    A tensor of a file, read in pieces.

    Args:
        origin (`Path`): The file.
        shape, dtype: As in the file.
        rows (`Callable`): Reads the rows from its first argument up to its second. The file is mapped anew again and
            again, so that what was read before takes no memory.
    """

    origin: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: Callable[[int, int], torch.Tensor]

    def pieces(self, nbytes: int, stop: int | None = None) -> Iterator[torch.Tensor]:
        """The rows up to `stop` (by default all), in pieces of about `nbytes`."""
        stop = self.shape[0] if stop is None else stop
        step = max(1, nbytes // max(1, math.prod(self.shape[1:]) * self.dtype.itemsize))
        for start in range(0, stop, step):
            yield self.rows(start, min(start + step, stop))


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
        single, index = inside(path, name, path), inside(path, f"{name}.index.json", path)
        if single.is_file():
            return read_file(single)
        if index.is_file():
            shards = sorted(set(read_index(index).values()))
            return {key: tensor for shard in shards for key, tensor in read_file(path / shard).items()}
    raise CheckpointError(f"{path} holds no weights: neither model.safetensors nor pytorch_model.bin, nor an index.")


def read_file(path: str | Path) -> dict[str, LazyTensor]:
    """
    The tensors of one safetensors or PyTorch file; of a Lightning checkpoint those of its `state_dict`.

    Raises:
        CheckpointError: if the file is missing, damaged, no such file, or holds something else than tensors.
    """
    path = Path(path)
    require_weights(path)
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)


def _read_safetensors(path):
    def reader(key):
        def rows(start, stop):
            with safe_open(path, framework="pt") as file:
                return file.get_slice(key)[start:stop]

        return rows

    with opened(path, "pt") as file:
        tensors = {}
        for key in file.keys():
            part = file.get_slice(key)
            dtype = file.get_tensor(key).dtype if not part.get_shape() else part[:0].dtype
            tensors[key] = LazyTensor(path, tuple(part.get_shape()), dtype, reader(key))
        return tensors


def _read_pickle(path):
    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"{path} is no PyTorch file: it is not the zip archive that torch.save writes, or cut off."
        )
    try:
        file = _MappedPickle(path)
    except CheckpointError:
        raise
    except Exception as error:  # zipfile and torch raise a dozen types for damaged files, down to AssertionError
        lines = str(error).split("\n")
        reason = next((line for line in lines if "WeightsUnpickler error" in line or "GLOBAL" in line), lines[-1])
        reason = reason.split(" Please use")[0].strip().rstrip(".") or type(error).__name__
        raise CheckpointError(f"{path} cannot be read as a PyTorch checkpoint: {reason}.") from error
    if not isinstance(file.tensors, dict) or not all(map(_is_plain, file.tensors.values())):
        raise CheckpointError(f"{path} holds something else than tensors by name.")
    return {
        key: LazyTensor(path, tuple(tensor.shape), tensor.dtype, partial(file.rows, key))
        for key, tensor in file.tensors.items()
    }


class _MappedPickle:
    """A PyTorch file mapped into memory, and mapped anew from time to time to give back what was read."""

    MAX_BYTES = 64 * 2**20

    def __init__(self, path):
        self.path = path
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        self.placeholders = [(type("Placeholder", (Placeholder,), {}), name) for name in names]
        self.map()

    def map(self):
        with torch.serialization.safe_globals(self.placeholders):
            content = torch.load(self.path, map_location="cpu", mmap=True, weights_only=True)
        is_lightning = isinstance(content, dict) and isinstance(content.get("state_dict"), dict)
        self.tensors = content["state_dict"] if is_lightning else content
        beside = [name for name, value in content.items() if isinstance(value, torch.Tensor)] if is_lightning else []
        if beside:
            raise CheckpointError(f"{self.path} has tensors beside its state_dict: {', '.join(map(str, beside))}.")
        self.bytes_read = 0

    def rows(self, key, start, stop):
        if self.bytes_read > self.MAX_BYTES:
            self.map()
        rows = self.tensors[key][start:stop]
        self.bytes_read += rows.nbytes
        return rows


def _is_plain(value):
    return isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu"


def check_archive(path: Path) -> None:
    """
    Reads a PyTorch file whole and compares it with the checksums that lie in it; safetensors have none.

    Raises:
        CheckpointError: if a part is damaged.
    """
    if path.suffix == ".safetensors":
        return
    with reading(path), zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise CheckpointError(f"{path} is damaged: its part {damaged} does not have the checksum stored with it.")
