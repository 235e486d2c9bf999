"""The model card of an exported checkpoint."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import ModelCardData

from .atomic import write_text
from .presets import BENCHMARKS, DATASET, PAPER, PRESETS

if TYPE_CHECKING:
    from ..configuration_healthgpt import HealthGPTConfig

CARD_NAME = "README.md"
CARD = """---
{front_matter}
---

# {name}

[HealthGPT]({paper}) (ICML 2025) as one checkpoint of the transformers library: a frozen language model that {abilities}. Its
tasks are plugins (H-LoRA) on the same base; `task` picks one for each row of a batch.

> **Research use only. This is not a medical device**: nothing it says or draws may guide a diagnosis or a treatment.

## Use

```python
{snippet}```

`trust_remote_code=True` runs the code that lies beside the weights. It needs torch, transformers 5{needs} and Pillow.

## What it can do

| task | puts out | rank | alpha | experts | vision layer |
|---|---|---|---|---|---|
{tasks}

{limits}

Intended for research on medical image understanding and generation. Not intended for care of patients, nor for anything that
touches them. The data it learned from covers few modalities, places and groups of people; expect confident mistakes.

{results}## Where it comes from

Merged by `healthgpt export` from the published files, each tensor compared with its source.{quantized}

| source | bytes | SHA-256 |
|---|---|---|
{sources}

Versions: {versions}.
"""

LOAD = """from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained({name}, trust_remote_code=True)
processor = AutoProcessor.from_pretrained({name}, trust_remote_code=True)

picture = Image.radial_gradient("L")  # put a medical picture here: Image.open("chest.png")
"""
ASK_TASK = """
messages = [
    {{"role": "user", "content": [{{"type": "image", "image": picture}}, {{"type": "text", "text": "What is this?"}}]}}
]
inputs = processor.apply_chat_template(
    messages, task="{task}", add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
sequences = model.generate(**inputs, task="{task}", max_new_tokens=128)
print(processor.decode(sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""
DRAW_TASK = """
messages = [
    {{
        "role": "user",
        "content": [{{"type": "image", "image": picture}}, {{"type": "text", "text": "Reconstruct the image."}}],
    }}
]
inputs = processor.apply_chat_template(
    messages, task="{task}", add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
pixels = model.decode_image_tokens(model.generate(**inputs, task="{task}"))
[drawn] = processor.post_process_multimodal_output(pixels, generation_mode="image")
drawn.save("drawn.png")
"""


RESULTS = """## Published results

What the authors of {name} report ([paper]({paper})); not measured on this checkpoint.

Accuracies in percent; SSIM and LPIPS in percent, PSNR in dB, MSE of 8-bit levels.

| benchmark | metric | published |
|---|---|---|
{rows}

"""
LIMITS_DRAWING = (
    "The public generation weights only reconstruct: asked for CT to MRI or another change, they return the input."
)


def build_card(config: "HealthGPTConfig", record: dict) -> str:
    """
    The text of README.md.

    Args:
        config (`HealthGPTConfig`): What the checkpoint can do.
        record (`dict`): Where it comes from, the content of `healthgpt_export.json`: `name` under which it will be
            loaded, `preset` if that was said, `base_model` if the base was named as on the Hub, `sources` with their
            checksums, `quantize` if that was asked for, `versions`.
    """
    name, published, base = record["name"], PRESETS.get(record["preset"]), record["base_model"]
    if base is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", base):
        base = None
    tasks = config.tasks
    asks = [task for task, settings in tasks.items() if settings.kind == "text"]
    draws = [task for task, settings in tasks.items() if settings.kind == "image"]
    data = ModelCardData(
        license=published.license if published else "other",
        base_model=base or (published.sources["base"] if published else None),
        library_name="transformers",
        pipeline_tag="any-to-any" if draws else "image-text-to-text",
        datasets=[DATASET],
        language="en",
        tags=["medical", "healthgpt", "h-lora", "custom_code"],
    )
    snippets = [ASK_TASK.format(task=task) for task in asks[:1]] + [DRAW_TASK.format(task=task) for task in draws[:1]]
    results = ""
    if published:
        rows = "\n".join(
            f"| {BENCHMARKS[benchmark]} | {' / '.join(figures)} | {' / '.join(map(str, figures.values()))} |"
            for benchmark, figures in published.results.items()
        )
        results = RESULTS.format(name=published.name, paper=PAPER, rows=rows)
    quantized, needs = "", ""
    if record["quantize"]:
        quantized = f" Then bitsandbytes stored the linears of the language model in {as_text(record['quantize'].removesuffix('bit'))} bits."
        needs = ", accelerate, bitsandbytes"
    return CARD.format(
        needs=needs,
        quantized=quantized,
        front_matter=data.to_yaml(),
        name=as_text(name.split("/")[-1]),
        paper=PAPER,
        abilities=abilities(config),
        snippet=LOAD.format(name=as_literal(name)) + "".join(snippets),
        tasks="\n".join(
            f"| `{task}` | {settings.kind} | {settings.rank} | {settings.alpha:g} | {settings.num_experts} | "
            f"{settings.vision_layer} |"
            for task, settings in tasks.items()
        ),
        limits=LIMITS_DRAWING if draws else "It cannot draw: no plugin that draws was merged into it.",
        results=results,
        sources="\n".join(
            f"| {as_text(file['file'])} | {file['bytes']:,} | `{as_text(file['sha256'])}` |"
            for file in record["sources"]
        ),
        versions=", ".join(as_text(f"{library} {version}") for library, version in record["versions"].items()),
    )


def as_text(name: str) -> str:
    """A name as Markdown shows it, on one line: what would be markup or cannot be seen is escaped."""
    return re.sub(r"[\\`*\[\]<>|&~#!$]", r"\\\g<0>", as_seen(name))


def as_literal(name: str) -> str:
    """A name as a string of Python; without a backtick, so that it cannot end a block of code either."""
    escaped = name.replace("\\", "\\\\").replace('"', '\\"').replace("`", r"\x60")
    return f'"{as_seen(escaped)}"'


def as_seen(name: str) -> str:
    """A name whose line breaks, control characters and the like are written as Python escapes them."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in name)


def abilities(config: "HealthGPTConfig") -> str:
    """What a checkpoint can do, in words that follow its name."""
    kinds = {task.kind for task in config.tasks.values()}
    can = {"text": "answers questions about medical pictures", "image": "draws medical pictures"}
    return " and ".join(words for kind, words in can.items() if kind in kinds)


def rewrite_card(folder: Path, old: "tuple[HealthGPTConfig, dict]", new: "tuple[HealthGPTConfig, dict]") -> None:
    """Brings a checkpoint's card up to date with its configuration and record; one that somebody else wrote stays as it is."""
    card = folder / CARD_NAME
    if card.is_file() and card.read_bytes() == build_card(*old).encode():
        write_text(card, build_card(*new))
