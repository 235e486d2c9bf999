"""
What each precision of a checkpoint costs: memory, speed, and how near it stays to float32.

    python benchmarks/memory.py nano
    python benchmarks/memory.py HealthGPT-M3 --true-codes

Each precision runs in a process of its own, one after the other, and the first of them is what the others are compared with. What
is quantised is quantised and saved first, so that loading means loading what was saved. Printed is one table:

    file          gigabytes of weights on the disk
    resident      gigabytes of memory after loading and reading every weight once, without those of the libraries
    peak          gigabytes at most, with the libraries
    load          seconds to load
    first token   seconds to the first token of the first answer
    tokens/s      after it
    KL            mean Kullback-Leibler divergence of the next token over the first precision's answer
    top-1         share of positions there with the same likeliest token
    codes, PSNR   share of equal codes of a drawn picture, and its decibels

What does not fit can lie on the disk: `--cpu-memory 12GB` leaves that much to weights that are not quantised. It is slow, but the numbers
to compare with are right.

A full-size picture of 1024 codes takes long on a CPU: with `--true-codes` every code is the likeliest one after the true ones before
it (those of the picture itself), which takes one forward pass.
"""

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
BITS = {
    "8bit": {"load_in_8bit": True},
    "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "4bit-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
}
PRECISIONS = ("float32", "bfloat16", "float16", *BITS)
COLUMNS = ("file", "resident", "peak", "load", "first token", "tokens/s", "KL", "top-1", "codes", "PSNR")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--tokens", type=int, default=32, help="length of the answer")
    parser.add_argument("--true-codes", action="store_true", help="choose every code after the true ones")
    parser.add_argument("--cpu-memory", default="", help="memory for weights that are not quantised, for example 12GB")
    parser.add_argument("--picture", type=Path, default=ROOT / "tests/golden/images/ct.png")
    arguments = parser.parse_args()
    print(f"| precision | {' | '.join(COLUMNS)} |\n{'|---' * (len(COLUMNS) + 1)}|")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for precision in arguments.precisions:
            checkpoint = arguments.checkpoint.absolute()
            if precision in BITS:
                child("quantise", checkpoint, precision, f"{folder}/{precision}")
                checkpoint = f"{folder}/{precision}"
            settings = [precision, arguments.tokens, arguments.true_codes or "", arguments.cpu_memory]
            text = child("run", checkpoint, arguments.picture.absolute(), f"{folder}/first.pt", *settings)
            row = json.loads(text.splitlines()[-1])
            rows.append({"precision": precision} | row)
            cells = (f"{row[name]:.3g}" if name in row else "" for name in COLUMNS)
            print(f"| {precision} | {' | '.join(cells)} |", flush=True)
    print(json.dumps(rows))


def child(name: str, *arguments) -> str:
    program = f"import memory, sys; memory.{name}(*sys.argv[1:])"
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT / "benchmarks", check=True, stdout=subprocess.PIPE, text=True).stdout


def quantise(checkpoint: str, precision: str, output: str) -> None:
    from transformers import AutoProcessor, BitsAndBytesConfig

    settings = {"dtype": "bfloat16", "quantization_config": BitsAndBytesConfig(**BITS[precision])}
    load(checkpoint, **settings).save_pretrained(output)
    AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True).save_pretrained(output)


def load(checkpoint: str, **settings):
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(checkpoint, trust_remote_code=True, **settings)


def run(checkpoint: str, path: str, first: str, precision: str, tokens: str, true_codes: str, cpu_memory: str) -> None:
    import torch
    from PIL import Image
    from skimage.metrics import peak_signal_noise_ratio
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    before = gigabytes("VmRSS")
    start = time.perf_counter()
    settings = {} if precision in BITS else {"dtype": precision}
    if settings and cpu_memory:
        settings |= {"device_map": "auto", "max_memory": {"cpu": cpu_memory}, "offload_folder": f"{first}.offload"}
    model = load(checkpoint, **settings)
    row = {"load": time.perf_counter() - start}
    for tensor in model.state_dict().values():
        tensor.view(torch.uint8).max()  # weights that are mapped from the file come into memory when they are read
    row["resident"] = gigabytes("VmRSS") - before
    row["file"] = sum(file.stat().st_size for file in Path(checkpoint).glob("*.safetensors")) / 1e9
    by_kind = {settings.kind: task for task, settings in model.config.tasks.items()}
    picture = Image.open(path)

    def prepare(task, text):
        content = [{"type": "image", "image": picture}, {"type": "text", "text": text}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            task=task,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        return inputs.to(model.dtype)

    def log_probabilities(task, inputs, continuation):
        """Of the tokens of `continuation`, `(tokens, table rows)`."""
        inputs["input_ids"] = torch.cat([inputs["input_ids"], continuation], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.no_grad():
            logits = model(**inputs, task=task, logits_to_keep=continuation.shape[1] + 1).logits
        return logits[0, :-1].float().log_softmax(dim=-1)

    found = {}
    inputs = prepare(by_kind["text"], "Describe this picture.")
    start = time.perf_counter()
    clock, length = Clock(), int(tokens)
    sequences = model.generate(
        **inputs, task=by_kind["text"], streamer=clock, max_new_tokens=length, min_new_tokens=length
    )
    times = clock.times[1:]  # the first call brings the prompt
    row |= {"first token": times[0] - start, "tokens/s": (len(times) - 1) / (times[-1] - times[0])}
    found["text"] = sequences[:, inputs["input_ids"].shape[1] :]
    if "image" in by_kind:
        task, offset = by_kind["image"], model.config.image_code_offset
        inputs = prepare(task, "Reconstruct the image.")
        if true_codes:
            with torch.no_grad():
                codes = model.encode_image(processor.process_target_images([path])) + offset
            choices = log_probabilities(task, inputs, codes)[:, offset : offset + model.config.vqgan_config.num_codes]
            found["image"] = choices.argmax(dim=-1, keepdim=True).T + offset
        else:
            found["image"] = model.generate(**inputs, task=task)[:, inputs["input_ids"].shape[1] :]
        pixels = model.decode_image_tokens(found["image"])
        [drawn] = processor.post_process_multimodal_output(pixels, generation_mode="image")
        found["picture"] = torch.frombuffer(bytearray(drawn.tobytes()), dtype=torch.uint8)
    row["peak"] = gigabytes("VmHWM")
    reference = torch.load(first) if Path(first).exists() else found
    inputs = prepare(by_kind["text"], "Describe this picture.")
    found["log_probabilities"] = log_probabilities(by_kind["text"], inputs, reference["text"])
    if reference is found:
        torch.save(found, first)
    else:
        true, own = reference["log_probabilities"], found["log_probabilities"]
        row["KL"] = (true.exp() * (true - own)).sum(dim=-1).mean().item()
        row["top-1"] = (true.argmax(dim=-1) == own.argmax(dim=-1)).float().mean().item()
        if "image" in by_kind:
            row["codes"] = (reference["image"] == found["image"]).float().mean().item()
            true, drawn = reference["picture"].numpy(), found["picture"].numpy()
            row["PSNR"] = math.inf if (true == drawn).all() else peak_signal_noise_ratio(true, drawn, data_range=255)
    print(json.dumps(row))


class Clock:
    """A streamer that notes when `generate` brings the prompt, and every token after it."""

    def __init__(self):
        self.times = []

    def put(self, value):
        self.times.append(time.perf_counter())

    def end(self):
        pass


def gigabytes(field: str) -> float:
    """Memory of this process: `VmRSS` now, `VmHWM` at most (unlike that of getrusage, without its parent's)."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024 / 1e9


if __name__ == "__main__":
    main()
