"""What the commands share: options, and loading a checkpoint as a Python user does."""

import functools
import importlib.util
import json
import math
import os
import re
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from ..refusals import EXTRA_OF, extras, files, loading, memory, printable, reason_of

# The small model that comes with the package.
NANO = str(Path(__file__).parent.parent / "nano")

# What a file's name ends in and a question does not, beside the endings of images that Pillow knows.
ENDING = re.compile(
    r"\.(dcm|dicom|ima|nii|gz|hdr|img|mgz|mha|mhd|nrrd|mnc|svs|ndpi|heic|svg|raw|npy|npz|mp4|avi|csv|tsv|json|jsonl|parquet|xlsx?|ods|txt|md"
    r"|pdf|zip|tar|tgz|7z|html|xml|yaml|safetensors|bin|ckpt|pt|pth|h5|docx?|log)"
)


def own_name(checkpoint: str) -> str:
    """The small model by its name, `nano`, unless there is a checkpoint of this name where one stands."""
    return NANO if checkpoint == "nano" and not os.path.isfile("nano/config.json") else checkpoint


checkpoint_option = functools.partial(
    typer.Option,
    "--checkpoint",
    "-c",
    envvar="HEALTHGPT_CHECKPOINT",
    callback=own_name,
    help="Exported folder or Hub repository; nano is the small model of the package.",
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
Compile = Annotated[
    bool,
    typer.Option("--compile", help="Compile the model for a GPU: takes about a minute, so it is for many images."),
]
OpenVINO = Annotated[
    bool,
    typer.Option(
        "--openvino",
        help="Run the language model in 8 bits by OpenVINO: fast on a CPU, after some seconds more of loading.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


LARGE = 10**9  # weights, from which on OpenVINO is worth its loading


def load(
    checkpoint: str,
    device: str | None,
    dtype: str | None,
    task: str | None = None,
    kind: str = "text",
    openvino: bool = False,
):
    """
    Model and processor of a checkpoint, as a Python user loads them, or with its linears given to OpenVINO.

    Raises:
        HealthGPTError: if there is none, a part of it is missing or damaged, it does not fit this machine, or it has no such task
            of this kind.
    """
    if openvino:
        if device is not None and device.partition(":")[0] != "cpu":
            raise HealthGPTError(f"--openvino is for the CPU, and --device is {device}: leave one of them out.")
        if importlib.util.find_spec("openvino") is None:
            raise HealthGPTError(f"--openvino needs openvino: pip install healthgpt[{EXTRA_OF['openvino']}].")
        device = "cpu"
    with loading(checkpoint), memory(), extras():
        model, processor = load_parts(checkpoint, device, dtype, task, kind)
    tokenizer = getattr(
        processor, "tokenizer", None
    )  # transformers takes a tokenizer for a processor that it does not find
    if tokenizer is None or tokenizer.pad_token is None:
        name = "processor" if tokenizer is None else "tokenizer"
        raise HealthGPTError(f"{checkpoint} cannot be loaded: its {name}_config.json is missing or incomplete.")
    if openvino:
        from ..openvino_linears import use_openvino

        with working("Giving OpenVINO the model"), memory():
            use_openvino(model)
    return model, processor


def recommend_openvino(model) -> None:
    """Says what would be faster for a large model, not quantised, where the processor has no instructions for its dtype."""
    from ..precision_healthgpt import CPU_DTYPES

    is_slow = model.device.type == "cpu" and model.dtype not in CPU_DTYPES
    if is_slow and getattr(model.config, "quantization_config", None) is None and model.num_parameters() >= LARGE:
        typer.echo(
            f"This processor has no instructions for {str(model.dtype).removeprefix('torch.')}: --openvino is faster here "
            f"(pip install healthgpt[{EXTRA_OF['openvino']}]).",
            err=True,
        )


def load_parts(checkpoint: str, device: str | None, dtype: str | None, task: str | None, kind: str):
    """What `load` loads, with whatever error the libraries raise."""
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
    if task is not None:
        require_task(checkpoint, config, task, kind)
    if checkpoint == NANO:
        typer.echo("This is the small demonstration model, worthless for medicine; -c names another one.", err=True)
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise HealthGPTError(f"There is no dtype {dtype!r}; choose one of float32, bfloat16, float16.")
    with working("Loading the model"):
        import torch
        from transformers.utils import logging

        from .. import HealthGPTConfig, HealthGPTForConditionalGeneration, HealthGPTProcessor
        from ..hub_export.confine import reading

        with reading(f"The config.json of {checkpoint}"):
            HealthGPTConfig.from_dict(config)

        gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # torchrun gives each process one of its own
        device = device or (gpu if torch.cuda.is_available() else "cpu")
        try:
            torch.zeros((), device=device).item()
        except (RuntimeError, AssertionError) as error:
            reason = str(error).split("\n")[0]
            raise HealthGPTError(f"The device {device!r} cannot be used here: {reason}.") from error
    if not Console(stderr=True).is_terminal:
        logging.disable_progress_bar()  # transformers' own, of downloads and weights
    processor = HealthGPTProcessor.from_pretrained(checkpoint)
    model = HealthGPTForConditionalGeneration.from_pretrained(checkpoint, dtype=dtype or "auto")
    return model.to(device), processor


def cache_options(model, compiled: bool) -> dict[str, str]:
    """The argument of `generate` with which transformers compiles it, if that is asked for; refused where it would not."""
    if compiled and model.device.type not in ("cuda", "xpu"):
        raise HealthGPTError(f"--compile is for GPUs (cuda, xpu), and the model is on {model.device}: leave it out.")
    return {"cache_implementation": "static"} if compiled else {}


def require_file(path: Path) -> None:
    """Refuses a file of samples that is none, before anything takes long."""
    if not os.path.isfile(path):
        raise HealthGPTError(f"There is no file {path}.")


def read(path: Path, model, processor, task: str | None, otherwise: str | None = None):
    """The samples of a file; those that name no task are of the named one, which must be there, or of another if none is named."""
    from ..samples import read_samples

    with bars(DownloadColumn()) as progress, files(path):
        bar = progress.add_task(f"Reading {printable(path.name)}", total=path.stat().st_size)
        advance = functools.partial(progress.advance, bar)
        samples = read_samples(path, model.config, processor, task or otherwise, advance)
    if task is not None and task not in samples["task"]:
        raise HealthGPTError(f"No line of {path} has the task {task!r}: name it there, or leave the field task out.")
    return samples


def require_checkpoint(checkpoint: str) -> dict:
    """
    The content of a checkpoint's config.json; refuses what is neither a folder nor can be a Hub repository, and checkpoints
    of other models.
    """
    from ..hub_export.checkpoint import read_settings
    from ..hub_export.confine import require_loadable
    from ..hub_export.names import require_folder_or_repository

    require_folder_or_repository(checkpoint)
    with loading(checkpoint):
        folder = folder_of(checkpoint)
        settings = read_settings(folder, checkpoint)
        require_loadable(folder)
    return settings


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


def require_task(checkpoint: str, settings: dict, task: str, kind: str) -> None:
    """Refuses a task that the settings of a checkpoint do not have, or that puts out something else than the command is for."""
    from ..hub_export.checkpoint import read_tasks

    tasks = read_tasks(settings, checkpoint)
    if task not in tasks or tasks[task].kind != kind:
        able = ", ".join(name for name, known in tasks.items() if known.kind == kind) or "none"
        verb = "answers in words" if kind == "text" else "draws"
        raise HealthGPTError(f"This checkpoint has no task {task!r} that {verb}; those that do: {able}.")


def split_arguments(arguments: list[str]) -> tuple[list[Path], str]:
    """
    Paths and text from the arguments of `ask`, `draw` and `explain`.

    Raises:
        HealthGPTError: if one is an address, or the text is empty or a path, be there such a file or not.
    """
    for argument in arguments:
        if re.match(r"([A-Za-z][\w+.-]*://|data:)\S*$", argument):
            raise HealthGPTError(
                f"{argument} is an address, and commands read files alone: download it first, or name the address in Python, "
                "where the processor opens it."
            )
    *paths, text = arguments
    if not text.strip():
        raise HealthGPTError("The last argument, a question or instruction, is empty.")
    if os.path.exists(text):
        kind = "folder" if os.path.isdir(text) else "file"
        raise HealthGPTError(
            f"The last argument is the text, but {text!r} is a {kind}: add a question or instruction after it."
        )
    if looks_like_path(text.strip()):
        raise HealthGPTError(
            f"There is no file or folder {text!r}, and the last argument, which is the question or instruction, looks like the "
            "name of one; a text that ends in such a name needs a full stop or question mark after it."
        )
    return [Path(path) for path in paths], text


def looks_like_path(text: str) -> bool:
    """
    Whether a text is rather the name of a file or folder than a question: it ends as a file's name does or begins as
    a path does, or has a separator or an ending of any kind, and neither spaces, nor a mark at its end, nor letters of a script
    without spaces.
    """
    from PIL import Image

    name, dot, ending = re.split(r"[/\\]", text.lower())[-1].rpartition(".")
    is_known = ENDING.fullmatch(dot + ending) or dot + ending in Image.registered_extensions()
    if is_known and name and not name[-1].isspace():
        return True
    if re.match(r"(~|\.\.?|[A-Za-z]:)?[/\\]", text) or text.endswith("/"):
        return True
    if re.search(r"\s", text) or any(unicodedata.east_asian_width(letter) in "WF" for letter in text):
        return False
    return re.search(r"[/\\]|[^.]\.\w+$", text) is not None and unicodedata.category(text[-1]) != "Po"


def same_file(one: Path, other: Path) -> bool:
    """Whether two paths lead to one place, be there a file or not."""
    return os.path.realpath(one) == os.path.realpath(other)


def open_all(paths: list[Path], frame: int | None) -> list:
    """The pictures of files, of each the frame if it is named."""
    if not paths:
        return []
    with working("Reading images"), memory():
        from ..medical import open_picture

        return [open_picture(path, frame) for path in paths]


@contextmanager
def starting(what: str = "Starting") -> Iterator[None]:
    """A sign on stderr while the modules of a command are imported; a package that an extra brings is named if it is missing."""
    with working(what), extras():
        yield


@contextmanager
def stoppable(kept: Callable[[], str]) -> Iterator[None]:
    """Long work: says, when Ctrl-C stops it, what is kept and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"Stopped. {printable(kept())}", err=True)
        raise


@contextmanager
def printing() -> Iterator[None]:
    """Output on stdout, which may lead to a full disk, or to a terminal that lacks letters; a reader that goes away is no mistake."""
    try:
        yield
    except BrokenPipeError:
        raise
    except (OSError, UnicodeEncodeError) as error:
        raise HealthGPTError(f"The result cannot be printed: {reason_of(error)}.") from error


@printing()
def print_line(text: str) -> None:
    """A line of a result on stdout."""
    typer.echo(text)


def print_result(as_json: bool, text: str, content: dict) -> None:
    """The result of a command on stdout, for people or programs."""
    if as_json:
        print_json(content)
    else:
        print_line(text)


@printing()
def print_json(content: dict) -> None:
    """A result on stdout for programs; what a terminal may obey is escaped, as JSON escapes it."""
    text = json.dumps(content, indent=2, ensure_ascii=False)
    typer.echo(
        "".join(letter if letter.isprintable() or letter == "\n" else json.dumps(letter)[1:-1] for letter in text)
    )


def bars(count: ProgressColumn | None = None) -> Progress:
    """Progress bars on stderr, if it is a terminal; by default they count to a number."""
    return on_terminal(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        count or MofNCompleteColumn(),
        TimeRemainingColumn(),
    )


def working(what: str) -> Progress:
    """A sign on stderr, if it is a terminal, that something goes on whose end cannot be told."""
    progress = on_terminal(SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    progress.add_task(what, total=None)
    return progress


def on_terminal(*columns) -> Progress:
    """Columns on stderr, gone when they are done; nothing if it is no terminal."""
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def count_parameters(config) -> dict[str, int]:
    """Number of parameters by part of the model that a configuration describes."""
    import torch

    from ..modeling_healthgpt import HealthGPTForConditionalGeneration

    with torch.device("meta"):
        model = HealthGPTForConditionalGeneration(config)
    return sum_by_part({name: tensor.numel() for name, tensor in model.named_parameters()})


def count_stored(checkpoint: str, settings: dict) -> dict[str, int]:
    """
    Number of parameters by part of a checkpoint: by the headers of its weights, without torch; by its configuration if it lies on the
    Hub, or is quantised, since headers do not tell how many numbers are packed.
    """
    from ..hub_export.checkpoint import read_headers, read_weight_map

    if not os.path.isdir(checkpoint) or "quantization_config" in settings:
        from .. import HealthGPTConfig

        return count_parameters(HealthGPTConfig.from_pretrained(checkpoint))
    folder, sizes = Path(checkpoint), {}
    for name in set(read_weight_map(folder).values()):
        sizes |= {key: math.prod(header.shape) for key, header in read_headers(folder / name).items()}
    return sum_by_part(dict(sorted(sizes.items())))


def sum_by_part(sizes: dict[str, int]) -> dict[str, int]:
    """Sizes by part of the model, of sizes by tensor."""
    parts = {}
    for name, size in sizes.items():
        parts[part_of(name)] = parts.get(part_of(name), 0) + size
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
