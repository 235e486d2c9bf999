"""
What each precision of a checkpoint costs: memory, speed, and how near it stays to float32.

    python benchmarks/memory.py nano
    python benchmarks/memory.py HealthGPT-M3 --precisions bfloat16 8bit 4bit --tokens 32

Each precision runs in a process of its own, one after the other; the first of them is what the others are compared with. Printed is
one table: gigabytes resident after loading and at the peak, seconds of loading and to the first token, tokens per second; then the
mean Kullback-Leibler divergence of the next token and the share of positions with the same likeliest token, both over the first one's
answer; and the share of equal codes of a drawn picture with its PSNR. The picture is drawn where a task draws, all of its codes.
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
PRECISIONS = ("float32", "bfloat16", "float16", "8bit", "4bit", "4bit-double")
COLUMNS = {
    "resident_gigabytes": "resident",
    "peak_gigabytes": "peak",
    "load_seconds": "load",
    "first_token_seconds": "first token",
    "tokens_per_second": "tokens/s",
    "divergence": "KL",
    "top_1": "top-1",
    "codes": "codes",
    "psnr": "PSNR",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--tokens", type=int, default=32, help="length of the answer")
    parser.add_argument("--no-drawing", action="store_true", help="answer only: a full-size picture is 1024 tokens")
    parser.add_argument("--picture", type=Path, default=ROOT / "tests/golden/images/ct.png")
    arguments = parser.parse_args()
    print(f"| precision | {' | '.join(COLUMNS.values())} |\n{'|---' * (len(COLUMNS) + 1)}|")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for precision in arguments.precisions:
            program = "import memory, sys; memory.run(*sys.argv[1:])"
            paths = [Path(arguments.checkpoint).absolute(), arguments.picture.absolute(), f"{folder}/first.pt"]
            kinds = ["text"] if arguments.no_drawing else ["text", "image"]
            options = [*paths, precision, arguments.tokens, *kinds]
            text = subprocess.run(
                [sys.executable, "-c", program, *map(str, options)],
                cwd=Path(__file__).parent,
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            ).stdout
            row = json.loads(text.splitlines()[-1])
            rows.append({"precision": precision} | row)
            cells = (f"{row[name]:.3g}" if name in row else "" for name in COLUMNS)
            print(f"| {precision} | {' | '.join(cells)} |", flush=True)
    print(json.dumps(rows))


def run(checkpoint: str, path: str, first: str, precision: str, tokens: str, *kinds: str) -> None:
    import torch
    from PIL import Image
    from skimage.metrics import peak_signal_noise_ratio
    from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig, TextStreamer

    class Clock(TextStreamer):
        times = []

        def put(self, value):
            self.times.append(time.perf_counter())

        def end(self):
            pass

    options = {"dtype": precision}
    if "bit" in precision:
        settings = (
            {"load_in_8bit": True} if precision == "8bit" else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        )
        if precision == "4bit-double":
            settings["bnb_4bit_use_double_quant"] = True
        options = {"dtype": torch.bfloat16, "quantization_config": BitsAndBytesConfig(**settings)}
    start = time.perf_counter()
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, trust_remote_code=True, **options)
    row = {"load_seconds": time.perf_counter() - start, "resident_gigabytes": gigabytes("VmRSS")}
    processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    by_kind = {settings.kind: task for task, settings in model.config.tasks.items() if settings.kind in kinds}
    picture = Image.open(path)

    def prepare(task, text):
        content = [{"type": "image", "image": picture}, {"type": "text", "text": text}]
        return processor.apply_chat_template(
            [{"role": "user", "content": content}],
            task=task,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )

    found = {}
    for kind, task in by_kind.items():
        inputs = prepare(task, "Describe this picture." if kind == "text" else "Reconstruct the image.")
        Clock.times = []
        start = time.perf_counter()
        length = {"max_new_tokens": int(tokens), "min_new_tokens": int(tokens)} if kind == "text" else {}
        sequences = model.generate(**inputs, task=task, streamer=Clock(processor.tokenizer), **length)
        times = Clock.times[1:]  # the first call brings the prompt
        if kind == "text":
            row["first_token_seconds"] = times[0] - start
            row["tokens_per_second"] = (len(times) - 1) / (times[-1] - times[0])
        found[kind] = sequences[:, inputs["input_ids"].shape[1] :]
        if kind == "image":
            pixels = model.decode_image_tokens(sequences)
            [drawn] = processor.post_process_multimodal_output(pixels, generation_mode="image")
            found["picture"] = torch.frombuffer(bytearray(drawn.tobytes()), dtype=torch.uint8)
    row["peak_gigabytes"] = gigabytes("VmHWM")
    reference = torch.load(first) if Path(first).exists() else found
    if "text" in by_kind:
        inputs = prepare(by_kind["text"], "Describe this picture.")
        inputs["input_ids"] = torch.cat([inputs["input_ids"], reference["text"]], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        kept = reference["text"].shape[1] + 1
        with torch.no_grad():
            logits = model(**inputs, task=by_kind["text"], logits_to_keep=kept).logits[0, :-1].float()
        found["log_probabilities"] = logits.log_softmax(dim=-1)
        if reference is not found:
            true = reference["log_probabilities"]
            row["divergence"] = (true.exp() * (true - found["log_probabilities"])).sum(dim=-1).mean().item()
            row["top_1"] = (true.argmax(dim=-1) == found["log_probabilities"].argmax(dim=-1)).float().mean().item()
    if "image" in by_kind and reference is not found:
        row["codes"] = (reference["image"] == found["image"]).float().mean().item()
        true, drawn = reference["picture"].numpy(), found["picture"].numpy()
        row["psnr"] = math.inf if (true == drawn).all() else peak_signal_noise_ratio(true, drawn, data_range=255)
    if reference is found:
        torch.save(found, first)
    print(json.dumps(row))


def gigabytes(field: str) -> float:
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024 / 1e9


if __name__ == "__main__":
    main()
