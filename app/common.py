"""What the commands share: options, and loading a checkpoint as a Python user does."""

import functools
import importlib.util
import json
import os
import re
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ..errors_healthgpt import HealthGPTError

# Packages that only some commands need, and the extra that brings them.
EXTRA_OF = {"accelerate": "train", "datasets": "train", "tensorboard": "train", "sentencepiece": "export"}
EXTRA_OF |= {"scipy": "eval", "skimage": "eval", "torchmetrics": "eval", "pydicom": "dicom", "nibabel": "dicom"}
EXTRA_OF |= {"matplotlib": "plot", "gradio": "ui", "bitsandbytes": "quantization", "torchao": "torchao"}

TOO_LITTLE_MEMORY = (
    "The device has too little memory for this: give fewer pictures, a smaller batch, or load a quantised checkpoint."
)

# The small model that comes with the package.
NANO = str(Path(__file__).parent.parent / "nano")

checkpoint_option = functools.partial(
    typer.Option,
    "--checkpoint",
    "-c",
    envvar="HEALTHGPT_CHECKPOINT",
    help="Exported folder or Hub repository.",
)
Checkpoint = Annotated[str, checkpoint_option(show_default="the small model of the package")]
RequiredCheckpoint = Annotated[str, checkpoint_option()]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...; by default a GPU if there is one.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; by default the checkpoint's.")]
Frame = Annotated[
    int | None,
    typer.Option(
        help="Frame, slice or page of a file of several, from 0; by default the middle one, of pages the first."
    ),
]
AnswerTask = Annotated[str, typer.Option("--task", help="A task of the checkpoint that answers in words.")]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer in tokens.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def load(checkpoint: str, device: str | None, dtype: str | None):
    """Model and processor of a checkpoint, as a Python user loads them."""
    with working("Reading the checkpoint"):
        config = require_checkpoint(checkpoint)
    method = config.get("quantization_config", {}).get("quant_method")
    lacking = [
        name for name in (method, "accelerate") if method in EXTRA_OF and importlib.util.find_spec(name) is None
    ]
    if lacking:
        raise HealthGPTError(
            f"{checkpoint} is quantised, and loading it needs {' and '.join(lacking)}: "
            f"pip install healthgpt[{EXTRA_OF[method]}]."
        )
    if checkpoint == NANO:
        typer.echo(
            "No checkpoint named (-c): this is the small demonstration model, worthless for medicine.", err=True
        )
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise HealthGPTError(f"There is no dtype {dtype!r}; choose one of float32, bfloat16, float16.")
    with working("Loading the model"):
        import torch
        from safetensors import SafetensorError
        from transformers.utils import logging

        from .. import HealthGPTForConditionalGeneration, HealthGPTProcessor

        gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # torchrun gives each process one of its own
        device = device or (gpu if torch.cuda.is_available() else "cpu")
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).split("\n")[0]
            raise HealthGPTError(f"The device {device!r} cannot be used here: {reason}.") from error
    if not Console(stderr=True).is_terminal:
        logging.disable_progress_bar()  # transformers' own, of downloads and weights
    processor = HealthGPTProcessor.from_pretrained(checkpoint)
    try:
        model = HealthGPTForConditionalGeneration.from_pretrained(checkpoint, dtype=dtype or "auto")
    except (SafetensorError, OSError) as error:
        from ..hub_export.sources import read_directory

        try:
            if isinstance(error, SafetensorError) or os.path.isdir(checkpoint):  # else it is what the Hub answers
                read_directory(folder_of(checkpoint))
        except HealthGPTError as named:
            raise HealthGPTError(f"The weights of {checkpoint} are damaged: {named}") from error
        raise
    return model.to(device), processor


def require_file(path: Path) -> None:
    """Refuses a file of samples that is none, before anything takes long."""
    if not path.is_file():
        raise HealthGPTError(f"There is no file {path}.")


def read(path: Path, model, processor, task: str | None, otherwise: str | None = None):
    """The samples of a file; those that name no task are of the named one, which must be there, or of another if none is named."""
    from ..samples import read_samples

    with bars(DownloadColumn()) as progress:
        bar = progress.add_task(f"Reading {path.name}", total=path.stat().st_size)
        advance = functools.partial(progress.advance, bar)
        samples = read_samples(path, model.config, processor, task or otherwise, advance)
    if task is not None and task not in samples["task"]:
        raise HealthGPTError(f"No line of {path} has the task {task!r}: name it there, or leave the field task out.")
    return samples


def require_checkpoint(checkpoint: str) -> dict:
    """
    The content of a checkpoint's config.json; refuses what is neither a folder nor the name of a Hub repository, and checkpoints
    of other models.
    """
    if not os.path.isdir(checkpoint) and not re.fullmatch(r"[\w.-]+/[\w.-]+", checkpoint):
        raise HealthGPTError(f"{checkpoint} is neither a folder nor a Hub repository, which is written user/name.")
    from transformers import PreTrainedConfig

    if os.path.isdir(checkpoint) and not (Path(checkpoint) / "config.json").is_file():
        raise HealthGPTError(f"{checkpoint} is no HealthGPT checkpoint: it has no config.json.")
    from ..hub_export.confine import require_loadable

    require_loadable(folder_of(checkpoint))
    config = PreTrainedConfig.get_config_dict(checkpoint)[0]
    model_type = config.get("model_type")
    if model_type != "healthgpt":
        raise HealthGPTError(
            f"{checkpoint} is no HealthGPT checkpoint: its config.json is that of a {model_type} model."
        )
    return config


def folder_of(checkpoint: str) -> Path:
    """The folder of a checkpoint; of a Hub repository its snapshot in the Hub's cache, with at least its settings."""
    if os.path.isdir(checkpoint):
        return Path(checkpoint)
    from transformers.utils import cached_file

    from ..hub_export.confine import SETTINGS

    config = cached_file(checkpoint, "config.json")
    if config is None:
        raise HealthGPTError(f"{checkpoint} is no HealthGPT checkpoint: it has no config.json.")
    optional = {f"_raise_exceptions_for_{problem}": False for problem in ("missing_entries", "connection_errors")}
    for name in SETTINGS:
        cached_file(checkpoint, name, **optional)
    return Path(config).parent


def missing(error: ModuleNotFoundError) -> str:
    """That something needs a package of `EXTRA_OF`, and how to install it; raises the error again if no extra brings it."""
    if error.name not in EXTRA_OF:
        raise error
    return f"needs {error.name}: pip install healthgpt[{EXTRA_OF[error.name]}]."


def require_kind(model, task: str, kind: str) -> None:
    """Refuses a task that puts out something else than the command is for."""
    tasks = model.config.tasks
    if task not in tasks or tasks[task].kind != kind:
        able = ", ".join(name for name, settings in tasks.items() if settings.kind == kind) or "none"
        verb = "answers in words" if kind == "text" else "draws"
        raise HealthGPTError(f"This checkpoint has no task {task!r} that {verb}; those that do: {able}.")


def split_arguments(arguments: list[str]) -> tuple[list[Path], str]:
    """Paths and text from the arguments of `ask`, `draw` and `explain`."""
    *paths, text = arguments
    if not text.strip():
        raise HealthGPTError("The last argument, a question or instruction, is empty.")
    if os.path.exists(text):
        kind = "folder" if os.path.isdir(text) else "file"
        raise HealthGPTError(
            f"The last argument is the text, but {text!r} is a {kind}: add a question or instruction after it."
        )
    return [Path(path) for path in paths], text


def open_all(paths: list[Path], frame: int | None) -> list:
    """The pictures of files, of each the frame if it is named."""
    if not paths:
        return []
    with working("Reading pictures"):
        from ..medical import open_picture

        return [open_picture(path, frame) for path in paths]


def print_result(as_json: bool, text: str, content: dict) -> None:
    """The result of a command on stdout, for people or programs."""
    if as_json:
        print_json(content)
    else:
        typer.echo(text)


def print_json(content: dict) -> None:
    """A result on stdout for programs."""
    typer.echo(json.dumps(content, indent=2, ensure_ascii=False))


def bars(count: ProgressColumn | None = None) -> Progress:
    """Progress bars on stderr, if it is a terminal; by default they count to a number."""
    return on_terminal(
        TextColumn("{task.description}"), BarColumn(), count or MofNCompleteColumn(), TimeRemainingColumn()
    )


def working(what: str) -> Progress:
    """A sign on stderr, if it is a terminal, that something goes on whose end cannot be told."""
    progress = on_terminal(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    progress.add_task(what, total=None)
    return progress


def on_terminal(*columns) -> Progress:
    """Columns on stderr, gone when they are done; nothing if it is no terminal."""
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def count_parameters(config) -> dict[str, int]:
    """Number of parameters by part of the model."""
    import torch

    from ..modeling_healthgpt import HealthGPTForConditionalGeneration

    with torch.device("meta"):
        model = HealthGPTForConditionalGeneration(config)
    parts = {}
    for name, tensor in model.named_parameters():
        parts[part_of(name)] = parts.get(part_of(name), 0) + tensor.numel()
    return parts


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to, in words."""
    if ".plugins." in name:
        return f"plugin of {name.split('.plugins.')[1].split('.')[0]}"
    for prefix, part in (
        ("model.vision_tower.", "vision tower"),
        ("model.vqgan.", "VQGAN"),
        ("model.token_embeddings.", "token tables"),
        ("token_heads.", "token tables"),
    ):
        if name.startswith(prefix):
            return part
    return f"projector of {name.split('.')[2]}" if name.startswith("model.projectors.") else "language model"
