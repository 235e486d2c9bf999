"""
What each precision of a checkpoint costs on the CPU: memory, speed, and how near it stays to another one. `healthgpt bench`.

Each precision runs in a process of its own, one after the other, on a phantom that no model has seen. What is quantised is
quantised and saved first, so that loading means loading what was saved. Measured are

    file          gigabytes of weights on the disk
    resident      gigabytes of memory after loading and reading every weight once, without those of the libraries
    peak          gigabytes at most, with the libraries
    load          seconds to load
    first token   seconds to the first token of the first answer
    tokens/s      after it

and beside another precision, the reference,

    KL            mean Kullback-Leibler divergence of the next token over the reference's answer
    top-1         share of positions there with the same likeliest token
    codes, PSNR   share of equal codes of a drawn picture, and its decibels

A full-size picture of 1024 codes takes long on a CPU: with `true_codes` every code is the likeliest one after the true ones
before it (those of the picture itself), which takes one forward pass.
"""

import importlib
import logging
import re
import signal
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import active_children, get_context
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import BitsAndBytesConfig
from transformers.utils.logging import disable_progress_bar

from .. import HealthGPTForConditionalGeneration, HealthGPTProcessor
from ..conversations import conversation, prepare
from ..errors_healthgpt import HealthGPTError
from ..hub_export.confine import reading
from ..hub_export.quantize import BASE_WEIGHT
from ..phantoms import drawing_sample
from ..refusals import files, loading, memory, temporary_folder

BITS = {
    "8bit": {"load_in_8bit": True},
    "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "4bit-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
}
# Bytes of a weight of the language model's linears, with its part of their scales, and of any other weight.
BYTES = {
    "float32": (4, 4),
    "bfloat16": (2, 2),
    "float16": (2, 2),
    "8bit": (1, 2),
    "4bit": (0.5 + 4 / 64, 2),
    "4bit-double": (0.5 + 1 / 64, 2),
}
PRECISIONS = tuple(BYTES)
COLUMNS = ("file", "resident", "peak", "load", "first token", "tokens/s", "KL", "top-1", "codes", "PSNR")
QUESTION = "Describe this picture."
CODES_PER_PASS = 64  # fixed, since below float32 a drawing depends on it
STATUS = Path("/proc/self/status")


@dataclass
class Measurement:
    """
    What one precision costs, and what came out of it.

    Args:
        costs (`dict[str, float]`): By the names of `COLUMNS`, `"file"` to `"tokens/s"`.
        answer (`list[int]`): Ids of the answer.
        log_probabilities (`np.ndarray` of shape `(tokens, rows)`): Of the next token over the reference's answer.
        codes (`list[int]`): Ids of the drawn picture; empty if no task draws.
        picture (`PIL.Image.Image`, *optional*): The drawn picture.
    """

    costs: dict[str, float]
    answer: list[int]
    log_probabilities: np.ndarray
    codes: list[int]
    picture: Image.Image | None


def expected_gigabytes(config) -> dict[str, float]:
    """
    The cost model: gigabytes of weights in each of `PRECISIONS`.

    Args:
        config (`HealthGPTConfig`): Of the checkpoint.
    """
    with torch.device("meta"):
        sizes = {name: weight.numel() for name, weight in HealthGPTForConditionalGeneration(config).named_parameters()}
    linears = sum(size for name, size in sizes.items() if name.endswith(BASE_WEIGHT))
    others = sum(sizes.values()) - linears
    return {name: (linears * linear + others * other) / 1e9 for name, (linear, other) in BYTES.items()}


def measure(
    checkpoint: str | Path,
    precision: str,
    reference: Measurement | None = None,
    tokens: int = 32,
    true_codes: bool = False,
    cpu_memory: str | None = None,
) -> Measurement:
    """
    Measures one precision of a checkpoint, in a process of its own.

    Args:
        checkpoint (`str` or `Path`): Folder of a checkpoint that is not quantised.
        precision (`str`): One of `PRECISIONS`.
        reference (`Measurement`, *optional*): That of the precision to compare with; by default itself.
        tokens (`int`, defaults to 32): Length of the answer, at least 2.
        true_codes (`bool`, defaults to `False`): Whether to choose every code after the true ones.
        cpu_memory (`str`, *optional*): Memory for weights that are not quantised, for example `"12GB"`; the rest lies on the
            disk, which is slow, but the numbers to compare with are right.

    Raises:
        HealthGPTError: if the checkpoint cannot be loaded in this precision, memory runs out, or nothing tells how much is used.
    """
    require_memory_figures()
    answer = None if reference is None else reference.answer
    with memory(), temporary_folder() as folder:
        settings = {"dtype": precision}
        if cpu_memory is not None:
            settings |= {"device_map": "auto", "max_memory": {"cpu": cpu_memory}, "offload_folder": folder}
        try:
            if precision in BITS:
                in_own_process(quantise, checkpoint, precision, folder)
                checkpoint, settings = folder, {"device_map": {"": "cpu"}}
            return in_own_process(run, checkpoint, precision, settings, tokens, true_codes, answer)
        except BrokenProcessPool as error:
            raise HealthGPTError(
                f"The process that measured {precision} was killed, as happens when there is too little memory."
            ) from error


def compare(reference: Measurement, found: Measurement) -> dict[str, float]:
    """How near a precision stays to the reference: `"KL"`, `"top-1"`, and if they draw `"codes"` and `"PSNR"` (dB)."""
    true, own = reference.log_probabilities, found.log_probabilities
    row = {
        "KL": float((np.exp(true) * (true - own)).sum(axis=-1).mean()),
        "top-1": float((true.argmax(axis=-1) == own.argmax(axis=-1)).mean()),
    }
    if found.picture is not None:
        from ..evaluation import compare_pictures  # not at the head: the processes that are measured do without it

        row["codes"] = float(np.equal(reference.codes, found.codes).mean())
        row["PSNR"] = compare_pictures(found.picture, reference.picture)["PSNR"]
    return row


def in_own_process(function: Callable, *arguments):
    """What a function of a module returns in a new process, whose memory is its own; an interrupt ends it at once."""
    with ProcessPoolExecutor(1, get_context("spawn"), prepare_process) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except KeyboardInterrupt:  # which a terminal sends to both, and others to this process alone
            for process in active_children():
                process.terminate()
            raise


def prepare_process() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    for library in (
        "accelerate",
        "bitsandbytes",
    ):  # which say that they do what was asked of them, and what would be faster
        logging.getLogger(library).setLevel(logging.ERROR)


def quantise(checkpoint: str | Path, precision: str, output: str) -> None:
    settings = {"quantization_config": BitsAndBytesConfig(**BITS[precision]), "device_map": {"": "cpu"}}
    model = load(checkpoint, dtype="bfloat16", **settings)
    with loading(checkpoint):
        processor = HealthGPTProcessor.from_pretrained(checkpoint)
    with files(output, "written"):
        model.save_pretrained(output)
        processor.save_pretrained(output)


def load(checkpoint: str | Path, **settings):
    disable_progress_bar()
    with reading(checkpoint):
        return HealthGPTForConditionalGeneration.from_pretrained(checkpoint, **settings)


def run(
    checkpoint: str | Path,
    precision: str,
    settings: dict,
    tokens: int,
    true_codes: bool,
    reference: list[int] | None,
) -> Measurement:
    """Loads a checkpoint with settings of `from_pretrained`, answers and draws; `reference` is an answer to compare."""
    with loading(checkpoint):
        processor = HealthGPTProcessor.from_pretrained(checkpoint)
    if precision in BITS:
        importlib.import_module("bitsandbytes")  # neither its time nor its memory is that of the weights
    before = gigabytes("VmRSS")
    start = time.perf_counter()
    model = load(checkpoint, **settings)
    costs = {"load": time.perf_counter() - start}
    for tensor in model.state_dict().values():
        tensor.view(torch.uint8).max()  # weights that are mapped from the file come into memory when they are read
    costs["resident"] = gigabytes("VmRSS") - before
    costs["file"] = sum(file.stat().st_size for file in Path(checkpoint).glob("*.safetensors")) / 1e9
    tasks = {task.kind: name for name, task in model.config.tasks.items()}
    sample = drawing_sample("test", 0, "reconstruction")

    def log_probabilities(task, inputs, continuation):
        """Of the tokens of `continuation`, `(tokens, rows)`."""
        ids = torch.cat([inputs["input_ids"], continuation], dim=1)
        inputs = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad():
            logits = model(**inputs, task=task, logits_to_keep=continuation.shape[1] + 1).logits
        return logits[0, :-1].float().log_softmax(dim=-1)

    question = prepare(processor, conversation([sample["input_image"]], QUESTION), tasks["text"])
    start = time.perf_counter()
    clock = Clock()
    sequences = model.generate(
        **question, task=tasks["text"], streamer=clock, max_new_tokens=tokens, min_new_tokens=tokens
    )
    times = clock.times[1:]  # the first call brings the prompt
    costs |= {"first token": times[0] - start, "tokens/s": (len(times) - 1) / (times[-1] - times[0])}
    answer = sequences[:, question["input_ids"].shape[1] :]
    codes, picture = torch.empty(1, 0, dtype=torch.long), None
    if "image" in tasks:
        task, offset = tasks["image"], model.config.image_code_offset
        inputs = prepare(processor, conversation([sample["input_image"]], sample["instruction"]), task)
        if true_codes:
            with torch.no_grad():
                true = model.encode_image(processor.process_target_images([sample["target_image"]])) + offset
            choices = log_probabilities(task, inputs, true)[:, offset : offset + model.config.vqgan_config.num_codes]
            codes = choices.argmax(dim=-1)[None] + offset
        else:
            sequences = model.generate(**inputs, task=task, codes_per_pass=CODES_PER_PASS)
            codes = sequences[:, inputs["input_ids"].shape[1] :]
        pixels = model.decode_image_tokens(codes)
        [picture] = processor.post_process_multimodal_output(pixels, generation_mode="image")
    costs["peak"] = gigabytes("VmHWM")
    scored = log_probabilities(tasks["text"], question, answer if reference is None else torch.tensor([reference]))
    return Measurement(costs, answer[0].tolist(), scored.numpy(), codes[0].tolist(), picture)


class Clock:
    """A streamer that notes when `generate` brings the prompt, and every token after it."""

    def __init__(self):
        self.times = []

    def put(self, value):
        self.times.append(time.perf_counter())

    def end(self):
        pass


def require_memory_figures() -> None:
    """
    Raises:
        HealthGPTError: where the system has no file that tells the memory of a process.
    """
    if not STATUS.is_file():
        raise HealthGPTError(f"The memory of a process is read from {STATUS}, which Linux has, and which is not here.")


def gigabytes(field: str) -> float:
    """Memory of this process: `VmRSS` now, `VmHWM` at most (unlike that of getrusage, without its parent's)."""
    return int(re.search(rf"{field}:\s+(\d+) kB", STATUS.read_text())[1]) * 1024 / 1e9
