"""`healthgpt explain`: an answer, and figures of what the model did for it."""

import os
from pathlib import Path
from typing import Annotated

import typer

from ..conversations import conversation, prepare
from ..errors_healthgpt import HealthGPTError
from ..refusals import files, memory, printable
from .common import (
    NANO,
    AnswerTask,
    AsJson,
    Checkpoint,
    Device,
    Dtype,
    Frame,
    MaxNewTokens,
    load,
    open_all,
    print_result,
    require_checkpoint,
    require_task,
    split_arguments,
    starting,
    working,
)
from .draw import require_picture_path, save


def explain(
    arguments: Annotated[list[str], typer.Argument(metavar="[PICTURE]... QUESTION")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the figures.")],
    checkpoint: Checkpoint = NANO,
    task: AnswerTask = "comprehension",
    max_new_tokens: MaxNewTokens = 64,
    frame: Frame = None,
    as_json: AsJson = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """
    Answers a question and draws how the routers weighed the experts and where each token of the answer looked.

    Writes routing.png, and attention_0.png, attention_1.png, ... for the pictures, into a new or empty folder.

    Example: healthgpt explain -c HealthGPT-M3 chest.png "Is there a pleural effusion?" -o explained
    """
    if os.path.isfile(output):
        raise HealthGPTError(f"{output} is a file: name a folder for the figures.")
    with files(output):
        is_full = os.path.isdir(output) and any(output.iterdir())
    if is_full:
        raise HealthGPTError(f"The folder {output} is not empty: name a new or empty one for the figures.")
    paths, question = split_arguments(arguments)
    pictures = open_all(paths, frame)
    require_task(checkpoint, require_checkpoint(checkpoint), task, "text")  # before the folder is made
    with starting():
        from ..explain import look_inside
        from ..explain.plots import as_picture, plot_inside

    with files(output, "made"):
        output.mkdir(parents=True, exist_ok=True)
    require_picture_path(output / "routing.png")
    model, processor = load(checkpoint, device, dtype)
    inputs = prepare(processor, conversation(pictures, question), task).to(model.device)
    with working("Answering"), memory():
        sequences = model.generate(**inputs, task=task, do_sample=False, max_new_tokens=max_new_tokens)
    with working("Looking inside"), memory():
        routing, attention = look_inside(model, inputs, sequences, task)
        figures = plot_inside(processor, inputs, sequences, routing[task], attention)
        pictures = [as_picture(figure) for figure in figures]
    answer = processor.decode(sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    paths = [output / "routing.png", *(output / f"attention_{number}.png" for number in range(len(pictures) - 1))]
    for picture, path in zip(pictures, paths, strict=True):
        save(picture, path)
    written = [str(path) for path in paths]
    print_result(
        as_json, "\n".join([answer, *map(printable, written)]), {"answer": answer, "task": task, "figures": written}
    )
