"""
Writing a plan as safetensors, piece by piece, and reading back what was written.

The safetensors library writes a file from tensors that are all in memory; here a file is laid out from the plan and its
tensors follow one piece at a time, so that memory does not depend on the size of the model.
"""

import errno
import json
import math
import mmap
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from .atomic import write_json
from .checkpoint import plugin_file, task_of
from .confine import INDEX_NAME, CheckpointError
from .plan import Plan, Transfer
from .sources import read_file

MAX_SHARD_BYTES = 5 * 10**9
SAFETENSORS_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}

Advance = Callable[[int], None]  # told how many more bytes are done


def split_into_shards(plan: Plan, max_bytes: int) -> dict[str, list[Transfer]]:
    """
    The checkpoint's weight files by name: shards of limited size for what all tasks share and one file for each task, so
    that a task can be added or taken out without touching the rest.
    """
    shared, of_tasks = [[]], {}
    size = 0
    for transfer in plan.transfers:
        task = task_of(transfer.target, plan.config.tasks)
        if task is not None:
            of_tasks.setdefault(task, []).append(transfer)
            continue
        nbytes = plan.nbytes(transfer)
        if shared[-1] and size + nbytes > max_bytes:
            shared.append([])
            size = 0
        shared[-1].append(transfer)
        size += nbytes
    shards = {f"model-{index:05d}-of-{len(shared):05d}.safetensors": part for index, part in enumerate(shared, 1)}
    return shards | {plugin_file(task): part for task, part in of_tasks.items()}


def write_shard(plan: Plan, transfers: list[Transfer], path: Path, advance: Advance) -> None:
    """Writes one weight file; it has its name only once it is whole."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for transfer in transfers:
        end = offset + plan.nbytes(transfer)
        header[transfer.target] = {
            "dtype": SAFETENSORS_DTYPES[plan.config.dtype],
            "shape": list(transfer.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    unfinished = path.with_suffix(".unfinished")
    with BlockWriter(unfinished) as file:
        file.write(torch.frombuffer(bytearray(len(text).to_bytes(8, "little") + text), dtype=torch.uint8))
        for transfer in transfers:
            for piece in transfer.pieces(plan.config.dtype):
                file.write(piece.flatten().view(torch.uint8))
                advance(piece.nbytes)
    unfinished.rename(path)


class BlockWriter:
    """
    A new file, written in blocks past the page cache: of two buffers one is filled while the other goes to the disk.

    The page cache would first make room for every byte, and fill up with what nobody reads soon. File systems that know no
    direct writing are written in the ordinary way.

    Args:
        path (`Path`): The file.
    """

    BLOCK_BYTES = 2**24  # direct writing takes whole sectors, from memory that starts with a page

    def __init__(self, path: Path):
        self.file = open(path, "wb", buffering=0, opener=open_directly)  # noqa: SIM115, __exit__ closes it
        self.buffers = [torch.frombuffer(mmap.mmap(-1, self.BLOCK_BYTES), dtype=torch.uint8) for _ in range(2)]
        self.filled = self.size = 0
        self.pool = ThreadPoolExecutor(max_workers=1)
        self.pending = self.pool.submit(int)

    def write(self, data: torch.Tensor) -> None:
        """Appends bytes, `uint8` of shape `(count,)`."""
        self.size += len(data)
        while len(data):
            part = data[: self.BLOCK_BYTES - self.filled]
            self.buffers[0][self.filled : self.filled + len(part)].copy_(part)
            self.filled += len(part)
            data = data[len(part) :]
            if self.filled == self.BLOCK_BYTES:
                self._flush()

    def _flush(self):
        self.pending.result()
        self.pending = self.pool.submit(self._write_block, memoryview(self.buffers[0].numpy()))
        self.buffers.reverse()
        self.filled = 0

    def _write_block(self, block):
        if self.file.write(block) < len(block):
            raise OSError("the disk took only a part of it: it is full, or limits the size of files")

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        with self.file, self.pool:
            if error is None:
                self._flush()
                self.pending.result()
                self.file.truncate(self.size)


def open_directly(path: str, flags: int) -> int:
    try:
        return os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o666)


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Writes tensors that are in memory, readable for whom any new file is: safetensors itself writes private ones."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)


def write_index(folder: Path, files: list[str], renamed: dict[str, str] | None = None) -> None:
    """
    Writes the index of a checkpoint: the file of each tensor, and as `total_size` the bytes of all tensors, as transformers and
    huggingface_hub count them.

    Args:
        folder (`Path`): The checkpoint.
        files (`list[str]`): Names of its weight files.
        renamed (`dict[str, str]`, *optional*): Names that files have in the index, if they differ.
    """
    total, weight_map = 0, {}
    for name in files:
        tensors = read_file(folder / name)
        total += sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors.values())
        weight_map |= dict.fromkeys(tensors, (renamed or {}).get(name, name))
    write_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})


def verify_shard(plan: Plan, transfers: list[Transfer], path: Path, advance: Advance) -> None:
    """
    Compares every tensor of a written file with its source, bit for bit.

    Raises:
        CheckpointError: if they differ.
    """
    with safe_open(path, framework="pt") as file:
        if set(file.keys()) != {transfer.target for transfer in transfers}:
            raise CheckpointError(f"{path} does not hold the tensors that were written to it: is the disk in order?")
    for transfer in transfers:
        start = 0
        for piece in transfer.pieces(plan.config.dtype):
            with safe_open(path, framework="pt") as file:
                written = file.get_slice(transfer.target)[start : start + len(piece)]
            start += len(piece)
            if not torch.equal(written.view(torch.uint8), piece.contiguous().view(torch.uint8)):
                raise CheckpointError(
                    f"{transfer.target} in {path} differs from {transfer.origin}: the source was changed meanwhile, or "
                    "the disk is not in order."
                )
            advance(piece.nbytes)
