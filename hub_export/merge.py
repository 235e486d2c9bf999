"""
Published HealthGPT files -> one merged checkpoint that `from_pretrained` loads.

    plan --write--> .NAME.partial/ --verify, forward--> --rename--> NAME/

Everything happens in a partial folder beside the output, which gets its name at the very end: a kill leaves nothing or the
finished folder. The same export started again goes on from the weight files that were finished.
"""

import functools
import hashlib
import json
import logging
import math
import os
import platform
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import psutil
import torch
import transformers
from PIL import Image

from .. import __version__
from ..conversations import conversation, prepare
from ..locks import alone
from ..modeling_healthgpt import HealthGPTForConditionalGeneration
from .atomic import discard, write_json, writing
from .card import CARD_NAME, build_card
from .checkpoint import RECORD_NAME, read_record, require_files, task_of
from .confine import CheckpointError, read_json, reading, require_no_links
from .hub import fetch
from .plan import ExportSources, Plan, build_plan
from .presets import require_preset
from .quantize import (
    MAX_QUANTIZED_SHARD_BYTES,
    quantization_config,
    require_bitsandbytes,
    stored_bytes,
    verify_quantized_shard,
    write_quantized_shard,
)
from .sources import check_archive
from .write import MAX_SHARD_BYTES, Advance, split_into_shards, verify_shard, write_index, write_shard

logger = logging.getLogger(__name__)

ROOT = Path(__file__).parent.parent
HUB_FILES = (
    "configuration_healthgpt.py",
    "drafting_healthgpt.py",
    "errors_healthgpt.py",
    "generation_healthgpt.py",
    "images_healthgpt.py",
    "modeling_healthgpt.py",
    "pipeline_healthgpt.py",
    "precision_healthgpt.py",
    "processing_healthgpt.py",
    "quantization_healthgpt.py",
    "vqgan_decoder.py",
)
SPACE_BESIDE_WEIGHTS = 50 * 10**6  # tokenizer, configuration, code


class NotEnoughSpace(CheckpointError):
    """The disk is too small for an export; what an earlier run finished is kept."""


def no_progress(stage: str, total: int) -> Advance:
    return lambda nbytes: None


def export(
    sources: ExportSources,
    output: str | Path,
    dtype: str | None = None,
    quantize: str | None = None,
    skip_forward: bool = False,
    preset: str | None = None,
    progress: Callable[[str, int], Advance] = no_progress,
) -> Plan:
    """
    Writes one merged checkpoint, reads it back and compares every tensor with its source.

    Args:
        sources (`ExportSources`): The published files.
        output (`str` or `Path`): Folder to make, in a folder that exists. It may exist if it is empty, or if it is the
            result of this very export.
        dtype (`str`, *optional*, defaults to the base's): `"float32"`, `"bfloat16"` or `"float16"`.
        quantize (`str`, *optional*): `"4bit"` or `"8bit"` to write a bitsandbytes checkpoint.
        skip_forward (`bool`, defaults to `False`): Whether to leave out the forward pass of every task that ends the
            checks. It takes as much memory as the model, and is left out too where there is not so much.
        preset (`str`, *optional*): Which published model this is (a key of `PRESETS`), for the model card.
        progress (`Callable`, *optional*): Called with a stage's name and its number of bytes; returns what is called
            with the number of bytes that were done since the last call.

    Returns:
        `Plan`: What was written.

    Raises:
        HealthGPTError: if the folder around the output does not exist, or another command writes or changes the output.
        CheckpointError: if a source cannot be used, or the output folder has something else in it; then nothing is left behind.
            If the disk is too small, the weight files that an earlier run finished are kept.
    """
    if quantize is not None:
        require_bitsandbytes(quantize)
    with writing(output):
        output = Path(output).resolve()
    with alone(output):
        return write_export(sources, output, dtype, quantize, skip_forward, preset, progress)


def write_export(sources: ExportSources, output: Path, dtype, quantize, skip_forward, preset, progress) -> Plan:
    """An export to a folder that nobody else writes to; see [`export`]."""
    with writing(output):
        is_full = output.exists() and (not output.is_dir() or any(output.iterdir()))
    if is_full and not (output / RECORD_NAME).is_file():
        raise CheckpointError(f"{output} exists and is not an empty folder.")
    local = fetch(sources)
    plan = build_plan(local, dtype)
    if preset is not None:
        require_preset(plan.config, preset)
    fingerprint = fingerprint_of(plan, local, quantize, preset)
    if is_full:
        record = read_record(output)
        if record.get("fingerprint") != fingerprint:
            raise CheckpointError(f"{output} exists and is not an empty folder: it holds another export.")
        require_files(output, record["files"])
        return plan

    partial = make_partial(output)
    try:
        with writing(output):
            record = fill(partial, plan, fingerprint, quantize, progress)
            is_local = Path(sources.base).exists()
            record["base_model"] = None if is_local else str(sources.base).removeprefix("hf://").split("@")[0]
            record |= {"name": output.name, "preset": preset}
            (partial / CARD_NAME).write_text(build_card(plan.config, record), encoding="utf-8")
            record["files"] = sorted(path.name for path in partial.iterdir())
            write_json(partial / RECORD_NAME, record)  # `push` uploads these files and no others
        if not skip_forward:
            check_forward(plan, partial, progress)
        with writing(output):
            if output.exists():
                output.rmdir()
            partial.rename(output)
    except NotEnoughSpace:
        if not any(partial.rglob("*.safetensors")):
            shutil.rmtree(partial)
        raise
    except Exception:  # raised again below
        # Nothing is swallowed: the error goes on as it came, once the half-written folder is gone. KeyboardInterrupt and
        # SystemExit are no Exception, hence an interrupted export keeps its folder and can go on from there.
        shutil.rmtree(partial)
        raise
    return plan


def make_partial(output: Path) -> Path:
    """
    The partial folder of an output, made if it is not there.

    Raises:
        CheckpointError: if it cannot be made, or it or one of its entries is a symbolic link.
    """
    partial = output.with_name(f".{output.name}.partial")
    with writing(output):
        if partial.is_symlink():
            raise CheckpointError(f"{partial}, in which the export is to be made, is a symbolic link: remove it.")
        partial.mkdir(exist_ok=True)
        require_no_links(partial)
    return partial


def fill(partial, plan, fingerprint, quantize, progress) -> dict:
    """Makes the checkpoint in the partial folder, from whatever an earlier run left there, and returns its record."""
    record = partial / RECORD_NAME
    if not record.is_file() or read_json(record).get("fingerprint") != fingerprint:
        for path in partial.iterdir():
            discard(path)
        write_json(partial / RECORD_NAME, {"fingerprint": fingerprint})
    require_space(plan, partial, quantize)
    checksums = check_sources(plan, progress)
    if quantize is None:
        stage, max_bytes, write, verify = "Writing", MAX_SHARD_BYTES, write_shard, verify_shard
    else:
        stage, max_bytes = "Quantising", MAX_QUANTIZED_SHARD_BYTES
        write = functools.partial(write_quantized_shard, quantize=quantize)
        verify = functools.partial(verify_quantized_shard, quantize=quantize)
        plan.config.quantization_config = quantization_config(quantize, plan.config.dtype)
    shards = split_into_shards(plan, max_bytes)
    advance = progress(stage, plan.total_bytes)
    for shard, transfers in shards.items():
        if (partial / shard).exists():
            advance(sum(map(plan.nbytes, transfers)))
        else:
            write(plan, transfers, partial / shard, advance)
    write_index(partial, list(shards))
    advance = progress("Verifying", plan.total_bytes)
    for shard, transfers in shards.items():
        verify(plan, transfers, partial / shard, advance)
    write_files(plan, partial)
    return {"fingerprint": fingerprint, "quantize": quantize, "sources": checksums, "versions": versions()}


def fingerprint_of(plan: Plan, sources: ExportSources, *options: str | None) -> str:
    """A hash that two exports share if they write the same from the same files."""
    files = {str(path): [path.stat().st_size, path.stat().st_mtime_ns] for path in plan.origins}
    tokenizer = plan.processor.tokenizer
    content = {
        "version": __version__,
        "files": files,
        "names": {name: str(value) for name, value in asdict(sources).items()},
        "config": plan.config.to_dict(),
        "generation_config": plan.generation_config.to_dict(),
        "processor": plan.processor.to_dict(),
        "tokenizer": [tokenizer.backend_tokenizer.to_str(), tokenizer.init_kwargs, plan.processor.chat_template],
        "code": [(ROOT / name).read_text(encoding="utf-8") for name in HUB_FILES],
        "transfers": [(transfer.target, transfer.origin, transfer.rows) for transfer in plan.transfers],
        "options": options,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def require_space(plan: Plan, folder: Path, quantize: str | None) -> None:
    """
    Raises:
        NotEnoughSpace: if the disk cannot take what is still to be written.
    """
    for path in folder.glob("*.unfinished"):
        path.unlink()
    there = sum(path.stat().st_size for path in folder.glob("model-*.safetensors"))
    needed = stored_bytes(plan, quantize) - there + SPACE_BESIDE_WEIGHTS
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise NotEnoughSpace(f"The disk has {free / 1e9:.2f} GB free, but the export needs {needed / 1e9:.2f} GB.")


def check_sources(plan: Plan, progress: Callable[[str, int], Advance]) -> list[dict]:
    """
    Reads every source file whole: the checksums inside PyTorch files, and its SHA-256 for the record, which also says to which tasks'
    plugins it belongs.
    """
    advance = progress("Checking", sum(path.stat().st_size for path in plan.origins))
    owners = {(transfer.tensor.origin, task_of(transfer.target, plan.config.tasks)) for transfer in plan.transfers}
    records = []
    for path in plan.origins:
        check_archive(path)
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(2**22):
                digest.update(block)
                advance(len(block))
        sha256 = digest.hexdigest()
        promised = name_of_blob(path)
        if len(promised) == 64 and promised != sha256:
            raise CheckpointError(f"{path} is damaged: its SHA-256 is {sha256}, but the Hub has {promised}.")
        tasks = sorted(task for origin, task in owners if origin == path and task is not None)
        records.append({"file": name_of(path), "bytes": path.stat().st_size, "sha256": sha256, "tasks": tasks})
    return records


def name_of_blob(path: Path) -> str:
    """
    Name of the blob that a file of the Hub's cache is a link to, for large files their SHA-256; else an empty string.

    huggingface_hub 2 has blobs that are links in turn, to what repositories share: these have other hashes as names.
    """
    while path.is_symlink():
        path = path.parent / os.readlink(path)
        if path.parent.name == "blobs":
            return path.name
    return ""


def name_of(path: Path) -> str:
    """Repository, revision and name of a file in the Hub's cache; of any other its name and that of its folder."""
    cached = re.search(r"models--([\w.-]+?)--([\w.-]+)/snapshots/(\w+)/(.+)$", path.as_posix())
    if cached:
        return f"{cached[1]}/{cached[2]}@{cached[3]}/{cached[4]}"
    return f"{path.absolute().parent.name}/{path.name}"


def versions() -> dict[str, str]:
    return {
        "healthgpt": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def write_files(plan: Plan, folder: Path) -> None:
    """Writes configuration, processor, generation settings and the custom code."""
    plan.config.save_pretrained(folder)
    plan.processor.save_pretrained(folder)
    plan.generation_config.save_pretrained(folder)
    for name in HUB_FILES:
        shutil.copyfile(ROOT / name, folder / name)


def check_forward(plan: Plan, folder: Path, progress: Callable[[str, int], Advance]) -> None:
    """
    Loads the checkpoint and runs every task once on a picture and a word, if memory allows; else a warning says so.

    Raises:
        CheckpointError: if a task cannot run here, or a logit is not finite.
    """
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    needed = 1.2 * stored
    available = psutil.virtual_memory().available
    if available < needed:
        logger.warning(
            "No task was tried: that takes %.1f GB of memory and %.1f GB are free.", needed / 1e9, available / 1e9
        )
        return
    advance = progress("Trying", stored * (1 + len(plan.config.tasks)))  # all weights for loading, and for each task
    with reading("The finished checkpoint"):
        model = HealthGPTForConditionalGeneration.from_pretrained(folder)
    advance(stored)
    picture = Image.new("RGB", (64, 48), (90, 120, 150))
    messages = conversation([picture], "What is this?")
    for task in plan.config.tasks:
        inputs = prepare(plan.processor, messages, task)
        with torch.no_grad(), reading(f"Task {task!r} of the finished checkpoint"):
            logits = model(**inputs.to(model.device), task=task).logits
        if not math.isfinite(logits.abs().max()):
            raise CheckpointError(f"The logits of task {task!r} are not finite in {plan.config.dtype}.")
        advance(stored)
