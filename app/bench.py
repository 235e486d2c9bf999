"""`healthgpt bench`: what each precision of a checkpoint costs, as a table."""

import importlib
import re
from pathlib import Path
from typing import Annotated

import typer

from ..errors_healthgpt import HealthGPTError
from ..refusals import loading, printable
from .common import NANO, AsJson, Checkpoint, print_json, print_line, require_checkpoint, starting, stoppable, working


def bench(
    checkpoint: Checkpoint = NANO,
    precisions: Annotated[
        str, typer.Option(help="Which, with commas between them; the first is what the others are compared with.")
    ] = "float32,bfloat16,float16,8bit,4bit,4bit-double",
    tokens: Annotated[int, typer.Option(min=2, help="Length of the answer in tokens.")] = 32,
    true_codes: Annotated[
        bool,
        typer.Option("--true-codes", help="Choose every code of the picture after the true ones, in a single pass."),
    ] = False,
    cpu_memory: Annotated[
        str | None,
        typer.Option(help="Memory for weights that are not quantised, for example 12GB; the rest lies on the disk."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """
    Measures what each precision of a checkpoint costs on the CPU: memory, speed, and how near it stays to the first.

    Memory (file, resident, peak) is in gigabytes; load and first token, after a prompt with a picture, in seconds.

    KL is the divergence of the next token, top-1 how often the likeliest one is the same.

    Codes is the share of a drawn picture's codes that are the same, PSNR is in decibels.

    Example: healthgpt bench -c HealthGPT-M3 --true-codes

    Example: healthgpt bench -c HealthGPT-M3 --precisions float32,4bit --cpu-memory 12GB --json
    """
    if cpu_memory is not None and not re.fullmatch(r"\d+(\.\d+)?(GB|MB)", cpu_memory):
        raise HealthGPTError(f"--cpu-memory is a size such as 12GB or 500MB, not {cpu_memory!r}.")
    require_checkpoint(checkpoint)
    shown = "nano" if checkpoint == NANO else checkpoint
    with starting("Reading the checkpoint"), loading(checkpoint):
        from huggingface_hub import snapshot_download
        from transformers.utils import logging

        from ..benchmarks.memory import (
            BITS,
            COLUMNS,
            PRECISIONS,
            compare,
            expected_gigabytes,
            measure,
            require_memory_figures,
        )
        from ..configuration_healthgpt import HealthGPTConfig

        logging.disable_progress_bar()
        require_memory_figures()
        names = precisions.split(",")
        for name in names:
            if name not in PRECISIONS:
                raise HealthGPTError(f"There is no precision {name!r}; choose from {', '.join(PRECISIONS)}.")
        folder = checkpoint if Path(checkpoint).is_dir() else snapshot_download(checkpoint)
        config = HealthGPTConfig.from_pretrained(folder)
        kinds = {task.kind for task in config.tasks.values()}
        if "text" not in kinds:
            raise HealthGPTError(f"{checkpoint} has no task that answers in words, by which precisions are compared.")
        if getattr(config, "quantization_config", None) is not None:
            raise HealthGPTError(f"{checkpoint} is quantised already: name the checkpoint that it was made from.")
        # What is missing is said now, not when its turn comes.
        for needed, module in (
            ("image" in kinds, "healthgpt.evaluation"),
            (BITS.keys() & names, "bitsandbytes"),
            (BITS.keys() & names or cpu_memory, "accelerate"),
        ):
            if needed:
                importlib.import_module(module)
        expected = {name: gigabytes for name, gigabytes in expected_gigabytes(config).items() if name in names}
    if not as_json:
        sizes = ", ".join(f"{name} {gigabytes:.3g}" for name, gigabytes in expected.items())
        print_line(f"Expected gigabytes of weights of {printable(shown)}: {sizes}.\n")
        print_line(f"| precision | {' | '.join(COLUMNS)} |\n{'|---' * (len(COLUMNS) + 1)}|")
    first, rows = None, []
    for name in names:
        kept = stoppable(lambda: "Nothing is kept; the same command starts again, or with fewer --precisions.")
        with kept, working(f"Measuring {name}"):
            found = measure(folder, name, first, tokens, true_codes, cpu_memory)
        row = found.costs | ({} if first is None else compare(first, found))
        first = first or found
        rows.append({"precision": name, "expected": expected[name], **row})
        if not as_json:
            cells = (f"{row[column]:.3g}" if column in row else "" for column in COLUMNS)
            print_line(f"| {name} | {' | '.join(cells)} |")
    if as_json:
        print_json({"checkpoint": shown, "precisions": rows})
