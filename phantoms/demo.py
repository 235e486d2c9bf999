"""
What a small HealthGPT makes of phantoms that it has not seen: `python -m healthgpt.phantoms.demo CHECKPOINT OUTPUT`.

Five questions with their true answers, five drawings, and one sheet with input, output and truth of every drawing task.
"""

import argparse
from pathlib import Path

from PIL import Image, ImageDraw
from transformers.utils.logging import disable_progress_bar

from .. import HealthGPTForConditionalGeneration, HealthGPTProcessor
from ..conversations import conversation, prepare
from .samples import INSTRUCTIONS, comprehension_sample, drawing_sample

ASKED = (
    ("modality", 1),
    ("closed", 2),
    ("side", 3),
    ("open", 4),
    ("report", 5),
)  # kinds of questions, numbers of samples
SCALE, MARGIN, TITLE, FONT = 3, 12, 24, 14  # of the sheet: pixels per pixel, and pixels


def run(model, processor, samples: list[dict], task: str):
    """Ids that the model writes for samples, prompts cut off."""
    asked = [conversation([s["input_image"]] if s["input_image"] else [], s["instruction"]) for s in samples]
    inputs = prepare(processor, asked, task)
    return model.generate(**inputs, task=task, max_new_tokens=64)[:, inputs["input_ids"].shape[1] :]


def contact_sheet(samples: list[dict], drawn: list[Image.Image]) -> Image.Image:
    """Rows of input, output and truth, with the instruction above."""
    width, height = (SCALE * side for side in drawn[0].size)
    row = height + TITLE + MARGIN
    sheet = Image.new("RGB", (3 * width + 4 * MARGIN, len(samples) * row + TITLE + MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(("input", "output", "truth")):
        pen.text((MARGIN + column * (width + MARGIN), MARGIN // 2), title, fill="black", font_size=FONT)
    for index, (sample, picture) in enumerate(zip(samples, drawn, strict=True)):
        top = TITLE + index * row
        pen.text((MARGIN, top + 4), sample["instruction"], fill="black", font_size=FONT)
        for column, shown in enumerate((sample["input_image"], picture, sample["target_image"])):
            if shown is not None:
                enlarged = shown.resize((width, height), Image.Resampling.NEAREST)
                sheet.paste(enlarged, (MARGIN + column * (width + MARGIN), top + TITLE))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("output", type=Path, help="folder for the pictures")
    arguments = parser.parse_args()
    disable_progress_bar()
    model = HealthGPTForConditionalGeneration.from_pretrained(arguments.checkpoint)
    processor = HealthGPTProcessor.from_pretrained(arguments.checkpoint)
    arguments.output.mkdir(parents=True, exist_ok=True)

    asked = [comprehension_sample("test", number, kind) for kind, number in ASKED]
    answers = processor.batch_decode(run(model, processor, asked, "comprehension"), skip_special_tokens=True)
    for sample, answer in zip(asked, answers, strict=True):
        print(f"{sample['instruction']}\n    answer: {answer.strip()}    (true: {sample['response']})")
    samples = [drawing_sample("test", 0, task) for task in INSTRUCTIONS]
    pixels = model.decode_image_tokens(run(model, processor, samples, "generation"))
    drawn = processor.post_process_multimodal_output(pixels, generation_mode="image")
    for task, picture in zip(INSTRUCTIONS, drawn, strict=True):
        picture.save(arguments.output / f"{task}.png")
        print(f"{task}: {arguments.output / task}.png")
    contact_sheet(samples, drawn).save(arguments.output / "sheet.png")
    print(f"Input, output and truth of all five: {arguments.output / 'sheet.png'}")


if __name__ == "__main__":
    main()
