"""`healthgpt explain`: an answer, and figures of what the model did for it."""

from pathlib import Path
from typing import Annotated

import typer

from ..conversations import conversation, prepare
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
    require_kind,
    split_arguments,
    working,
)


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

    Writes routing.png, and attention_0.png, attention_1.png, ... for the pictures.

    Example: healthgpt explain -c HealthGPT-M3 chest.png "Is there a pleural effusion?" -o explained
    """
    from ..explain import attention_over_pictures, trace_routing
    from ..explain.plots import plot_attention, plot_routing

    if output.is_file():
        raise ValueError(f"{output} is a file: name a folder for the figures.")
    paths, question = split_arguments(arguments)
    pictures = open_all(paths, frame)
    model, processor = load(checkpoint, device, dtype)
    require_kind(model, task, "text")
    inputs = prepare(processor, conversation(pictures, question), task).to(model.device)
    with working("Answering"), trace_routing(model) as routing:
        sequences = model.generate(**inputs, task=task, max_new_tokens=max_new_tokens)
    figures = {"routing.png": plot_routing(routing[task])}
    if "pixel_values" in inputs:
        attention = attention_over_pictures(model, inputs, sequences, task)
        for number, (pixels, grids) in enumerate(zip(inputs["pixel_values"], attention, strict=True)):
            figures[f"attention_{number}.png"] = plot_attention(processor, pixels, grids, sequences[0])
    answer = processor.decode(sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    output.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(output / name, dpi=150)
    written = [str(output / name) for name in figures]
    print_result(as_json, "\n".join([answer, *written]), {"answer": answer, "task": task, "figures": written})
