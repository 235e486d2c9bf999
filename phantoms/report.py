"""
What a model makes of the phantoms of the test split, beside trivial answers: tables for the card of the small model.

    answers    accuracy by kind of question           beside the most frequent answer of training
    pictures   SSIM and PSNR by drawing task          beside the input copied, the mean training target and, as the ceiling, the
                                                      true picture through the VQGAN
    findings   whether the model sees in a drawing    beside the true picture, and that through the VQGAN
               what it should show
"""

import tempfile
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from ..evaluation import (
    Item,
    Records,
    answer_items,
    compare_pictures,
    draw_samples,
    summarise_answers,
    summarise_pictures,
)
from .samples import INSTRUCTIONS, QUESTIONS, comprehension_sample, drawing_sample

TRAINING = 200  # samples that the trivial answers are taken from


def report_answers(model, processor, count: int, log=lambda text: None) -> dict[str, dict]:
    """
    Accuracy in percent for every kind of question, with its 95 % interval, and that of the most frequent answer.

    Args:
        model, processor: As `from_pretrained` loads them.
        count (`int`): Questions of each kind.
        log (`Callable`, *optional*): Told every kind when it is done.

    Returns:
        `dict[str, dict]`: By kind of question `value`, `low`, `high`, `count`, `majority` (the answer) and `trivial` (its
        accuracy).
    """
    found = {}
    for kind in QUESTIONS:
        known = Counter(comprehension_sample("train", number, kind)["response"] for number in range(TRAINING))
        majority = known.most_common(1)[0][0]
        samples = [comprehension_sample("test", number, kind) for number in range(count)]
        asked = [(sample["input_image"], sample["instruction"], sample["response"]) for sample in samples]
        trivial = 100 * sum(sample["response"] == majority for sample in samples) / count
        found[kind] = ask(model, processor, asked) | {"majority": majority, "trivial": trivial}
        log(f"{kind}: {found[kind]['value']:.1f} %, the most frequent answer {trivial:.1f} %")
    return found


def draw_tasks(model, processor, count: int) -> dict[str, tuple[list[dict], dict[str, list[Image.Image]]]]:
    """
    Pictures for samples of every drawing task.

    Args:
        model, processor: As in [`report_answers`].
        count (`int`): Pictures of each task.

    Returns:
        `dict`: By task the samples, and their pictures by way: `drawn`, `input`, `mean`, `ceiling` and `truth`; a task
        without input picture has no `input`.
    """
    found = {}
    for kind in INSTRUCTIONS:
        known = [drawing_sample("train", number, kind)["target_image"] for number in range(TRAINING)]
        mean = Image.fromarray(
            np.mean([np.asarray(picture, dtype=float) for picture in known], axis=0).round().astype(np.uint8)
        )
        samples = [drawing_sample("test", number, kind) for number in range(count)]
        targets = [sample["target_image"] for sample in samples]
        ways = {"drawn": draw(model, processor, samples), "mean": [mean] * count, "truth": targets}
        if samples[0]["input_image"] is not None:
            ways["input"] = [sample["input_image"] for sample in samples]
        codes = model.encode_image(processor.process_target_images(targets))
        pixels = model.decode_image_tokens(codes + model.config.image_code_offset)
        ways["ceiling"] = processor.post_process_multimodal_output(pixels, generation_mode="image")
        found[kind] = samples, ways
    return found


def report_pictures(drawings: dict, log=lambda text: None) -> dict[str, dict]:
    """
    SSIM and PSNR of every drawing task.

    Args:
        drawings (`dict`): Of [`draw_tasks`].
        log: As in [`report_answers`].

    Returns:
        `dict[str, dict]`: By task and then by way what `summarise_pictures` gives.
    """
    found = {}
    for kind, (_, ways) in drawings.items():
        found[kind] = {
            way: summarise_pictures([compare_pictures(*pair) for pair in zip(pictures, ways["truth"], strict=True)])
            for way, pictures in ways.items()
        }
        scores = {
            way: f"{result['SSIM']['value']:.1f}/{result['PSNR']['value']:.2f}" for way, result in found[kind].items()
        }
        log(f"{kind}: SSIM/PSNR {scores}")
    return found


def report_findings(model, processor, drawings: dict, log=lambda text: None) -> dict[str, dict[str, dict]]:
    """
    How often the model, asked what is abnormal, names the finding that a picture should show, by task and then by way
    (`drawn`, `ceiling`, `truth`), as `summarise_answers` gives it.

    Args:
        model, processor, log: As in [`report_answers`].
        drawings (`dict`): Of [`draw_tasks`].
    """
    found = {}
    for kind, (samples, ways) in drawings.items():
        shown = [number for number, sample in enumerate(samples) if sample["finding"] != "no finding"]
        found[kind] = {}
        for way in ("drawn", "ceiling", "truth"):
            asked = [(ways[way][number], QUESTIONS["open"][0], samples[number]["finding"]) for number in shown]
            found[kind][way] = ask(model, processor, asked)
        named = {way: f"{result['value']:.1f}" for way, result in found[kind].items()}
        log(f"{kind}: findings {named}")
    return found


def ask(model, processor, questions: list[tuple[Image.Image, str, str]]) -> dict:
    """Accuracy of the answers to questions, each a picture, a text and the true answer."""
    items = [
        Item(str(number), text, truth, "open", partial(list, [picture]))
        for number, (picture, text, truth) in enumerate(questions)
    ]
    with tempfile.TemporaryDirectory() as folder:
        answered = answer_items(model, processor, items, Records(Path(folder), {}), batch_size=32)
    return summarise_answers(answered)["all"]


def draw(model, processor, samples: list[dict]) -> list[Image.Image]:
    """The pictures that a model draws for samples of phantoms."""
    with tempfile.TemporaryDirectory() as temporary:
        folder, rows = Path(temporary), []
        for number, sample in enumerate(samples):
            paths = []
            if sample["input_image"] is not None:
                paths.append(folder / f"input_{number}.png")
                sample["input_image"].save(paths[0])
            rows.append({"task": "generation", "instruction": sample["instruction"], "input_image": paths})
        draw_samples(model, processor, rows, folder / "drawn", Records(folder, {}), batch_size=32)
        return [Image.open(folder / f"drawn/{number}.png").convert("RGB") for number in range(len(rows))]


def describe(model, processor, folder: Path) -> dict[str, tuple[str, str]]:
    """Modality and description that a model gives of the pictures of a folder, by their names; none if there is no such folder."""
    questions = ("What imaging modality is this?", "Describe this picture.")
    paths = sorted(folder.glob("*.png"))
    if not paths:
        return {}
    items = [
        Item(f"{path.stem} {text}", text, "", "open", partial(list, [path])) for path in paths for text in questions
    ]
    with tempfile.TemporaryDirectory() as records:
        answered = answer_items(model, processor, items, Records(Path(records), {}))
    texts = [record["answer"] for record in answered]
    return {path.stem: pair for path, pair in zip(paths, zip(texts[::2], texts[1::2], strict=True), strict=True)}
