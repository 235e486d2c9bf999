"""The command line: thin commands over the functions that a Python user calls."""

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from .common import NANO, Checkpoint, Device, Dtype, count_parameters, load, prepare, require_checkpoint, require_kind
from .evaluate import evaluation
from .export import export, plugins, push
from .train import train

# Packages that only some commands need, and the extra that brings them.
EXTRA_OF = {"accelerate": "train", "datasets": "train", "tensorboard": "train", "sentencepiece": "export"}
EXTRA_OF |= {"scipy": "eval", "skimage": "eval", "torchmetrics": "eval"}

app = typer.Typer(
    name="healthgpt",
    help="HealthGPT answers questions about medical pictures and draws medical pictures. Research use only.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)
app.command()(export)
app.command()(push)
app.command()(train)
app.add_typer(evaluation, name="eval")
app.add_typer(plugins, name="plugin")


def print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"healthgpt {version('healthgpt')}")
        raise typer.Exit


@app.callback()
def common(
    show_version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


@app.command()
def ask(
    arguments: Annotated[list[str], typer.Argument(metavar="[IMAGE]... QUESTION")],
    checkpoint: Checkpoint = NANO,
    task: Annotated[str, typer.Option(help="A task of the checkpoint that answers in words.")] = "comprehension",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 1024,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """
    Answers a question about pictures, or about nothing but the question.

    Example: healthgpt ask -c HealthGPT-M3 chest.png "Is there a pleural effusion?"
    """
    messages = read_messages(arguments)
    model, processor = load(checkpoint, device, dtype)
    require_kind(model, task, "text")
    inputs = prepare(model, processor, messages, task)
    sequences = model.generate(**inputs, task=task, max_new_tokens=max_new_tokens)
    answer = processor.decode(sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    typer.echo(answer.strip())


@app.command()
def draw(
    arguments: Annotated[list[str], typer.Argument(metavar="[IMAGE]... INSTRUCTION")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Picture to write, for example out.png.")],
    checkpoint: Checkpoint = NANO,
    task: Annotated[str, typer.Option(help="A task of the checkpoint that draws.")] = "generation",
    seed: Annotated[int | None, typer.Option(help="Sample with this seed instead of drawing greedily.")] = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """
    Draws one picture from an instruction and, if given, pictures.

    Example: healthgpt draw -c HealthGPT-M3 slice.png "Reconstruct the image." -o out.png
    """
    import torch
    from PIL import Image

    if Image.registered_extensions().get(output.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"{output} has no ending of a picture format that Pillow writes, such as .png.")
    if output.is_dir():
        raise ValueError(f"{output} is a folder: name the picture in it.")
    if not output.parent.is_dir():
        raise ValueError(f"The folder {output.parent} does not exist.")
    messages = read_messages(arguments)
    model, processor = load(checkpoint, device, dtype)
    require_kind(model, task, "image")
    inputs = prepare(model, processor, messages, task)
    if seed is not None:
        torch.manual_seed(seed)
    sequences = model.generate(**inputs, task=task, do_sample=seed is not None)
    [picture] = processor.post_process_multimodal_output(model.decode_image_tokens(sequences), generation_mode="image")
    picture.save(output)
    typer.echo(f"{output} ({picture.width} x {picture.height} pixels)")


@app.command()
def info(
    checkpoint: Annotated[str, typer.Argument(help="Exported folder or Hub repository.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """
    Says what a checkpoint can do and how large its parts are, without loading its weights.

    Example: healthgpt info HealthGPT-M3
    """
    require_checkpoint(checkpoint)
    from ..configuration_healthgpt import HealthGPTConfig

    config = HealthGPTConfig.from_pretrained(checkpoint)
    parts = count_parameters(config)
    if as_json:
        content = {"tasks": config.to_dict()["tasks"], "parameters": parts, "dtype": str(config.dtype)}
        content |= {"language_model": config.text_config.model_type, "token_rows": config.text_config.vocab_size}
        typer.echo(json.dumps(content, indent=2))
        return
    console = Console()
    tasks = Table("task", "puts out", "rank", "alpha", "experts", "vision layer", "token tables", title="Tasks")
    for name, task in config.tasks.items():
        row = (
            name,
            task.kind,
            task.rank,
            task.alpha,
            task.num_experts,
            task.vision_layer,
            task.token_tables or "base",
        )
        tasks.add_row(*map(str, row))
    console.print(tasks)
    sizes = Table("part", "parameters", title=f"Parameters ({config.dtype})")
    for name, count in {**parts, "total": sum(parts.values())}.items():
        sizes.add_row(name, f"{count:,}")
    console.print(sizes)


def read_messages(arguments: list[str]) -> list[dict]:
    """One message of pictures and text from the arguments of `ask` and `draw`."""
    *paths, text = arguments
    if os.path.isfile(text):
        raise ValueError(
            f"The last argument is the text, but {text!r} is a file: add a question or instruction after it."
        )
    for path in paths:
        if not os.path.isfile(path):
            raise ValueError(f"There is no picture file {path!r}.")
    pictures = [{"type": "image", "image": path} for path in paths]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": text}]}]


def main() -> None:
    """Entry point: errors that a user can act on are one sentence, not a traceback."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app()
    except ModuleNotFoundError as error:
        if error.name not in EXTRA_OF:
            raise
        extra = "eval" if error.name == "datasets" and sys.argv[1] == "eval" else EXTRA_OF[error.name]
        typer.echo(f"Error: this needs {error.name}: pip install healthgpt[{extra}].", err=True)
        sys.exit(1)
    except (ValueError, OSError) as error:
        typer.echo(f"Error: {error}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        typer.echo("Interrupted.", err=True)
        sys.exit(130)
