"""
Answers and draws with the package that lies in a folder of any name, in a process of its own, for `decoding.py`.

    python decoding_worker.py PACKAGE DTYPE

Every line of input is a request, every line of output what it gave, both as JSON. The model is the package's own `nano`. Older
checkouts are run too: nothing is imported of the package that this file lies in.
"""

import importlib.util
import json
import re
import sys
import time
from pathlib import Path

from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor


class Clock:
    """
    A streamer that notes when `generate` brings the prompt, and every token after it. This file stands alone, as it also runs with the
    package of another checkout.
    """

    def __init__(self):
        self.times = []

    def put(self, value):
        self.times.append(time.perf_counter())

    def end(self):
        pass


def import_package(folder: Path) -> None:
    spec = importlib.util.spec_from_file_location(
        "healthgpt", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    sys.modules["healthgpt"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["healthgpt"])


def run(model, processor, passes: list[int], task: str, texts: list[str], images: list[str | None], settings: dict):
    """Ids after the prompts, seconds (of the whole, and to the first token), passes, and tokens that a row has read in them."""
    messages = []
    for text, image in zip(texts, images, strict=True):
        content = [] if image is None else [{"type": "image", "image": Image.open(image)}]
        messages.append([{"role": "user", "content": [*content, {"type": "text", "text": text}]}])
    inputs = processor.apply_chat_template(
        messages, task=task, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    passes.clear()
    clock = Clock()
    start = time.perf_counter()
    sequences = model.generate(**inputs, task=task, do_sample=False, streamer=clock, **settings)
    seconds = time.perf_counter() - start
    length = inputs["input_ids"].shape[1]
    return {
        "ids": sequences[:, length:].tolist(),
        "seconds": seconds,
        "first_seconds": clock.times[1] - start,
        "passes": len(passes),
        "tokens_read": sum(passes) - length,
        "peak_gigabytes": int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024 / 1e9,
    }


def main() -> None:
    package, dtype = Path(sys.argv[1]), sys.argv[2]
    import_package(package)
    # Where the package registers no classes, those that its small model carries along are used.
    model = AutoModelForImageTextToText.from_pretrained(package / "nano", trust_remote_code=True, dtype=dtype)
    processor = AutoProcessor.from_pretrained(package / "nano", trust_remote_code=True)
    passes = []
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    for line in sys.stdin:
        print(json.dumps(run(model, processor, passes, **json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
