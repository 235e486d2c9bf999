"""
Writing a plan as safetensors, piece by piece, and reading back what was written.

The safetensors library writes a file from tensors that are all in memory; here a file is laid out from the plan and its
tensors follow one piece at a time, so that memory does not depend on the size of the model.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from .plan import Plan, Transfer
from .sources import CheckpointError, read_file

MAX_SHARD_BYTES = 5 * 10**9
BLOCK_BYTES = 2**20  # one call of write with 64 MB was seen to take eight times as long on ext4
INDEX_NAME = "model.safetensors.index.json"
RECORD_NAME = "healthgpt_export.json"
SAFETENSORS_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}

Advance = Callable[[int], None]  # told how many more bytes are done


def split_into_shards(plan: Plan) -> dict[str, list[Transfer]]:
    """
    The checkpoint's weight files by name: shards of at most 5 GB for what all tasks share and one file for each task, so
    that a task can be added or taken out without touching the rest.
    """
    shared, of_tasks = [[]], {}
    size = 0
    for transfer in plan.transfers:
        task = task_of(transfer.target, plan.config)
        if task is not None:
            of_tasks.setdefault(task, []).append(transfer)
            continue
        nbytes = plan.nbytes(transfer)
        if shared[-1] and size + nbytes > MAX_SHARD_BYTES:
            shared.append([])
            size = 0
        shared[-1].append(transfer)
        size += nbytes
    shards = {f"model-{index:05d}-of-{len(shared):05d}.safetensors": part for index, part in enumerate(shared, 1)}
    return shards | {plugin_file(task): part for task, part in of_tasks.items()}


def plugin_file(task: str) -> str:
    """Name of the file with what a task owns; one that save_pretrained clears away when it shards anew."""
    return f"model-plugin_{task}-00001-of-00001.safetensors"


def task_of(name: str, config) -> str | None:
    """The task that owns a tensor of the checkpoint, or None if it belongs to all or several."""
    match = re.search(r"\.plugins\.(\w+)\.|^model\.projectors\.(\w+)\.", name)
    if match:
        return match[1] or match[2]
    match = re.match(r"(?:model\.token_embeddings|token_heads)\.(\w+)\.", name)
    owners = [task for task, settings in config.tasks.items() if match and settings.token_tables == match[1]]
    return owners[0] if len(owners) == 1 else None


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
    buffers = [torch.empty(0, dtype=torch.uint8)] * 2
    with open(unfinished, "wb") as file, ThreadPoolExecutor(max_workers=1) as pool:
        file.write(len(text).to_bytes(8, "little") + text)
        pending = pool.submit(write_blocks, file, buffers[0])
        for transfer in transfers:
            for piece in transfer.pieces(plan.config.dtype):
                # One buffer is written while the next is filled; pages that are always the same are written fastest.
                data = piece.flatten().view(torch.uint8)
                if len(buffers[0]) < len(data):
                    buffers[0] = torch.empty_like(data)
                filled = buffers[0][: len(data)].copy_(data)
                buffers.reverse()
                pending.result()
                pending = pool.submit(write_blocks, file, filled)
                advance(piece.nbytes)
        pending.result()
    unfinished.rename(path)


def write_blocks(file: BinaryIO, data: torch.Tensor) -> None:
    view = memoryview(data.numpy())
    for start in range(0, len(view), BLOCK_BYTES):
        file.write(view[start : start + BLOCK_BYTES])


def write_index(plan: Plan, shards: dict[str, list[Transfer]], folder: Path) -> None:
    weight_map = {transfer.target: name for name, transfers in shards.items() for transfer in transfers}
    index = {"metadata": {"total_size": plan.total_bytes}, "weight_map": weight_map}
    write_json(folder / INDEX_NAME, index)


def write_json(path: Path, content: dict) -> None:
    """Writes a file that is there whole or, after a kill, as it was."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    with writing(path, unfinished):
        unfinished.write_text(json.dumps(content, indent=2) + "\n")
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
        if partial is not None and partial.is_dir():
            shutil.rmtree(partial)
        elif partial is not None:
            partial.unlink(missing_ok=True)
        reason = " ".join(str(error).split()).rstrip(".")
        raise CheckpointError(f"{target} could not be written, and nothing was kept: {reason}.") from error


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


def require_files(folder: Path, files: list[str]) -> None:
    """
    Raises:
        CheckpointError: if a finished checkpoint lacks one of its files, or a weight file is cut off.
    """
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {', '.join(missing)}, which the export wrote: remove it and export again."
        )
    for name in files:
        if name.endswith(".safetensors"):
            read_file(folder / name)
