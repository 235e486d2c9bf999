"""`healthgpt draw`: one picture from an instruction and pictures."""

import io
import os
from pathlib import Path
from typing import Annotated

import typer

from ..conversations import conversation, prepare
from ..errors_healthgpt import HealthGPTError
from ..refusals import compiling, files, memory, printable
from .common import (
    NANO,
    AsJson,
    Checkpoint,
    Compile,
    Device,
    Dtype,
    Frame,
    OpenVINO,
    bars,
    cache_options,
    load,
    open_all,
    print_result,
    recommend_openvino,
    same_file,
    split_arguments,
    working,
)

SHEET_HEIGHT, MARGIN, LABEL = 512, 16, 24  # pixels


def draw(
    arguments: Annotated[list[str], typer.Argument(metavar="[PICTURE]... INSTRUCTION")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Picture to write, for example out.png.")],
    checkpoint: Checkpoint = NANO,
    task: Annotated[str, typer.Option(help="A task of the checkpoint that draws.")] = "generation",
    frame: Frame = None,
    keep_aspect_ratio: Annotated[
        bool,
        typer.Option(
            "--keep-aspect-ratio",
            help="Resize the picture to the size of the one given: models learn to draw it stretched to a square.",
        ),
    ] = False,
    sheet: Annotated[
        Path | None, typer.Option(help="Picture to write with input and output side by side, for example sheet.png.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**32 - 1, help="Sample with this seed instead of drawing greedily.")
    ] = None,
    codes_per_pass: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="How many codes a pass reads; the drawing is the same. By default measured.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
    device: Device = None,
    dtype: Dtype = None,
    compile_model: Compile = False,
    openvino: OpenVINO = False,
) -> None:
    """
    Draws one picture from an instruction and, if given, pictures.

    Example: healthgpt draw -c HealthGPT-M3 slice.png "Reconstruct the image." -o out.png

    Example: healthgpt draw -c HealthGPT-M3 volume.nii.gz --frame 80 "Reconstruct the image." -o out.png --sheet sheet.png
    """
    with working("Starting"):
        from PIL import Image

    if sheet is not None and same_file(sheet, output):
        raise HealthGPTError(f"--sheet and --output are the same file, {output}: name two.")
    paths, instruction = split_arguments(arguments)
    for path in (output, sheet):
        if path is not None and any(same_file(path, given) for given in paths):
            raise HealthGPTError(
                f"{path} is one of the pictures given, which would be lost: name another file to write."
            )
    if keep_aspect_ratio and len(paths) != 1:
        raise HealthGPTError(f"--keep-aspect-ratio needs one picture whose size to take, and {len(paths)} are given.")
    pictures = open_all(paths, frame)
    require_picture_path(output, *(picture.size for picture in pictures if keep_aspect_ratio))
    if sheet is not None:
        drawn = pictures[0] if keep_aspect_ratio else Image.new("RGB", (1, 1))  # models draw squares
        require_picture_path(sheet, sheet_size([*pictures, drawn]))
    model, processor = load(checkpoint, device, dtype, task, "image", openvino)
    recommend_openvino(model)
    import torch

    from .streamers import CodeCounter

    options = {"task": task, "do_sample": seed is not None, "codes_per_pass": codes_per_pass}
    options |= cache_options(model, compile_model)
    inputs = prepare(processor, conversation(pictures, instruction), task).to(model.device)
    if seed is not None:
        torch.manual_seed(seed)

    with bars() as progress, memory(), compiling():
        bar = progress.add_task("Drawing", total=model.config.num_image_codes)
        counter = CodeCounter(lambda number: progress.advance(bar, number))
        sequences = model.generate(**inputs, **options, streamer=counter)
        pixels = model.decode_image_tokens(sequences)
    [picture] = processor.post_process_multimodal_output(pixels, generation_mode="image")
    if keep_aspect_ratio:
        picture = picture.resize(pictures[0].size, Image.Resampling.LANCZOS)
    save(picture, output)
    lines = [f"{printable(str(output))} ({picture.width} x {picture.height} pixels)"]
    content = {"output": str(output), "width": picture.width, "height": picture.height, "task": task}
    if sheet is not None:
        save(side_by_side(pictures, picture), sheet)
        lines.append(printable(str(sheet)))
        content["sheet"] = str(sheet)
    print_result(as_json, "\n".join(lines), content)


def require_picture_path(path: Path, size: tuple[int, int] = (16, 16)) -> None:
    """Refuses, before anything is drawn, a path where no picture of this width and height can be written."""
    from PIL import Image

    name = Image.registered_extensions().get(path.suffix.lower())
    try:
        Image.new("RGB", size).save(io.BytesIO(), name or "")
    except (KeyError, OSError, ValueError) as error:
        raise HealthGPTError(
            f"{path} has no ending of a picture format that Pillow writes in this size, such as .png, .jpg or .tif."
        ) from error
    if os.path.isdir(path):
        raise HealthGPTError(f"{path} is a folder: name the picture in it.")
    if not os.path.isdir(path.parent):
        raise HealthGPTError(f"The folder {path.parent} does not exist.")
    with files(path, "written"):
        unfinished(path).touch()
        unfinished(path).unlink()


def unfinished(path: Path) -> Path:
    """Where a picture is written before it gets its name."""
    return path.with_name(f"{path.name}.unfinished")


def save(picture, path: Path) -> None:
    """Writes a picture that is there whole or, after a kill, as it was."""
    from PIL import Image

    content = io.BytesIO()  # Pillow does not notice when a full disk takes only the start of a file
    picture.save(content, Image.registered_extensions()[path.suffix.lower()])
    with files(path, "written"):
        try:
            unfinished(path).write_bytes(content.getvalue())
            unfinished(path).replace(path)
        finally:
            unfinished(path).unlink(missing_ok=True)


def shown_width(picture) -> int:
    """Width of a picture on a sheet, in pixels."""
    return max(1, round(picture.width * SHEET_HEIGHT / picture.height))


def sheet_size(pictures: list) -> tuple[int, int]:
    """Width and height of a sheet of these pictures, in pixels."""
    return MARGIN + sum(shown_width(picture) + MARGIN for picture in pictures), SHEET_HEIGHT + LABEL + 2 * MARGIN


def side_by_side(inputs: list, output):
    """A sheet of the inputs and the output, labelled and of one height."""
    from PIL import Image, ImageDraw

    labels = ["input"] if len(inputs) == 1 else [f"input {number}" for number in range(1, len(inputs) + 1)]
    pictures = [*inputs, output]
    sheet = Image.new("RGB", sheet_size(pictures), "white")
    pen, left = ImageDraw.Draw(sheet), MARGIN
    for label, picture in zip([*labels, "output"], pictures, strict=True):
        pen.text((left, MARGIN), label, fill="black", font_size=LABEL - 8)
        shown = picture.convert("RGB").resize((shown_width(picture), SHEET_HEIGHT), Image.Resampling.LANCZOS)
        sheet.paste(shown, (left, MARGIN + LABEL))
        left += shown.width + MARGIN
    return sheet
