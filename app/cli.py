"""The command line: thin commands over the functions that a Python user calls."""

import json
import os
import re
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

app = typer.Typer(
    name="healthgpt",
    help="HealthGPT answers questions about medical pictures and draws medical pictures. Research use only.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)

plugins = typer.Typer(help="List the plugins of a checkpoint, take one out, put one in.", no_args_is_help=True)
app.add_typer(plugins, name="plugin")

Checkpoint = Annotated[
    str,
    typer.Option(
        "--checkpoint",
        "-c",
        envvar="HEALTHGPT_CHECKPOINT",
        help="Exported folder or Hub repository, whose code is run.",
    ),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...; by default a GPU if there is one.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; by default the checkpoint's.")]


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
    checkpoint: Checkpoint,
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
    checkpoint: Checkpoint,
    output: Annotated[Path, typer.Option("--output", "-o", help="Picture to write, for example out.png.")],
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
def export(
    output: Annotated[Path, typer.Option(help="Folder to write; must be new or empty.")],
    preset: Annotated[
        str | None, typer.Option(help="m3, l14 or xl32: takes from the Hub what is not given here.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Folder or Hub repository of the language model.")] = None,
    vision: Annotated[str | None, typer.Option(help="Folder or Hub repository of the CLIP model.")] = None,
    comprehension: Annotated[
        str | None, typer.Option(help="com_hlora_weights.bin or its like; a path or hf://user/name/file.")
    ] = None,
    comprehension_alpha: Annotated[float | None, typer.Option(help="Its alpha; by default twice its rank.")] = None,
    generation: Annotated[str | None, typer.Option(help="gen_hlora_weights.bin or its like.")] = None,
    generation_alpha: Annotated[float | None, typer.Option(help="Its alpha; by default twice its rank.")] = None,
    fusion: Annotated[str | None, typer.Option(help="fusion_layer_weights.bin.")] = None,
    vqgan: Annotated[str | None, typer.Option(help="last.ckpt of the VQGAN.")] = None,
    vqgan_config: Annotated[str | None, typer.Option(help="model.yaml of the VQGAN.")] = None,
    num_codes: Annotated[
        int | None, typer.Option(help="Image codes in the vocabulary when no VQGAN tells; 8192 as published.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; by default the base's.")] = None,
    quantize: Annotated[str | None, typer.Option(help="4bit or 8bit: writes a bitsandbytes checkpoint.")] = None,
    skip_forward: Annotated[
        bool, typer.Option("--skip-forward", help="Do not run every task once at the end.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be written, and write nothing.")
    ] = False,
    push_to_hub: Annotated[str | None, typer.Option(help="Repository user/name to upload the result to.")] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Make a new repository public; by default private.")
    ] = False,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request on the repository.")] = False,
) -> None:
    """
    Merges the published files into one checkpoint that from_pretrained loads.

    What an interrupted export has finished is kept beside the output, and the same command goes on from there.

    Example: healthgpt export --base Phi-3-mini-4k-instruct --vision clip-vit-large-patch14-336
    --comprehension com_hlora_weights.bin --output HealthGPT-M3
    """
    from ..hub_export import ExportSources, push
    from ..hub_export import export as run
    from ..hub_export.hub import fetch
    from ..hub_export.plan import build_plan
    from ..hub_export.presets import PRESETS

    named = {
        "base": base,
        "vision": vision,
        "comprehension": comprehension,
        "comprehension_alpha": comprehension_alpha,
        "generation": generation,
        "generation_alpha": generation_alpha,
        "fusion": fusion,
        "vqgan": vqgan,
        "vqgan_config": vqgan_config,
        "num_codes": num_codes,
    }
    named = {name: value for name, value in named.items() if value is not None}
    if preset is not None:
        if preset not in PRESETS:
            raise ValueError(f"There is no preset {preset!r}; choose one of {', '.join(PRESETS)}.")
        named = PRESETS[preset].sources | named
    missing = [f"--{name}" for name in ("base", "vision") if name not in named]
    if missing:
        raise ValueError(f"The export needs {' and '.join(missing)}, or a --preset that names them.")
    sources = ExportSources(**named)
    if dry_run:
        print_plan(build_plan(fetch(sources), dtype))
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bars:

        def progress(stage, total):
            bar = bars.add_task(stage, total=total)
            return lambda nbytes: bars.advance(bar, nbytes)

        run(sources, output, dtype, quantize, skip_forward, push_to_hub, preset, progress)
    typer.echo(f"{output}")
    if push_to_hub is not None:
        typer.echo(push(output, push_to_hub, public, create_pr))


@plugins.command("list")
def list_plugins(
    checkpoint: Annotated[Path, typer.Argument(help="Exported folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """
    Says which tasks a checkpoint has and what each of them weighs.

    Example: healthgpt plugin list HealthGPT-M3
    """
    from ..hub_export.plugins import list_plugins as run

    found = run(checkpoint)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    table = Table("task", "tensors", "bytes", title="Plugins")
    for task, size in found.items():
        table.add_row(task, f"{size['tensors']:,}", f"{size['bytes']:,}")
    Console().print(table)


@plugins.command("extract")
def extract_plugin(
    checkpoint: Annotated[Path, typer.Argument(help="Exported folder.")],
    task: Annotated[str, typer.Argument(help="Its task.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to make for the plugin.")],
    remove: Annotated[bool, typer.Option("--remove", help="Take the task out of the checkpoint.")] = False,
) -> None:
    """
    Copies the plugin of a task into a folder of its own, and takes it out of the checkpoint if asked to.

    Example: healthgpt plugin extract HealthGPT-M3 generation -o generation-plugin
    """
    from ..hub_export.plugins import extract_plugin as run

    run(checkpoint, task, output, remove)
    typer.echo(f"{output}")


@plugins.command("add")
def add_plugin(
    checkpoint: Annotated[Path, typer.Argument(help="Exported folder.")],
    plugin: Annotated[Path, typer.Argument(help="Folder of a plugin, as extract makes it.")],
    name: Annotated[str | None, typer.Option(help="Name of the task in this checkpoint; by default its own.")] = None,
) -> None:
    """
    Puts a plugin into a checkpoint, without rewriting what is there.

    Example: healthgpt plugin add HealthGPT-M3 generation-plugin --name ct_to_mri
    """
    from ..hub_export.plugins import add_plugin as run

    run(checkpoint, plugin, name)
    typer.echo(f"{checkpoint}")


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


def load(checkpoint: str, device: str | None, dtype: str | None):
    """Model and processor of a checkpoint, as a Python user loads them."""
    require_checkpoint(checkpoint)
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise ValueError(f"There is no dtype {dtype!r}; choose one of float32, bfloat16, float16.")
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers.utils import logging

    logging.disable_progress_bar()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"The device {device!r} cannot be used here: {reason}.") from error
    processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    try:
        model = AutoModelForImageTextToText.from_pretrained(checkpoint, trust_remote_code=True, dtype=dtype or "auto")
    except SafetensorError as error:
        raise ValueError(f"The weights of {checkpoint} are damaged: {error}.") from error
    return model.to(device), processor


def require_checkpoint(checkpoint: str) -> None:
    """Refuses what is neither a folder nor the name of a Hub repository, and checkpoints of other models."""
    if not Path(checkpoint).is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", checkpoint):
        raise ValueError(f"{checkpoint} is neither a folder nor a Hub repository, which is written user/name.")
    from transformers import PreTrainedConfig

    if Path(checkpoint).is_dir() and not (Path(checkpoint) / "config.json").is_file():
        raise ValueError(f"{checkpoint} is no HealthGPT checkpoint: it has no config.json.")
    model_type = PreTrainedConfig.get_config_dict(checkpoint)[0].get("model_type")
    if model_type != "healthgpt":
        raise ValueError(f"{checkpoint} is no HealthGPT checkpoint: its config.json is that of a {model_type} model.")


def require_kind(model, task: str, kind: str) -> None:
    """Refuses a task that puts out something else than the command is for."""
    tasks = model.config.tasks
    if task not in tasks or tasks[task].kind != kind:
        able = ", ".join(name for name, settings in tasks.items() if settings.kind == kind) or "none"
        verb = "answers in words" if kind == "text" else "draws"
        raise ValueError(f"This checkpoint has no task {task!r} that {verb}; those that do: {able}.")


def prepare(model, processor, messages: list[dict], task: str):
    """Model inputs of one conversation on the model's device."""
    inputs = processor.apply_chat_template(
        messages, task=task, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    return inputs.to(model.device)


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


def print_plan(plan) -> None:
    """Every source tensor with its rule, its target or the reason why it is dropped, and sizes; then the parts."""
    for transfer in plan.transfers:
        typer.echo(
            f"{transfer.tensor.origin.name}: {transfer.name} {list(transfer.tensor.shape)} -> {transfer.target} "
            f"{list(transfer.shape)}, {plan.nbytes(transfer):,} bytes, by {transfer.rule.pattern}"
        )
    for name, tensor, rule in plan.dropped:
        typer.echo(f"{tensor.origin.name}: {name} {list(tensor.shape)} dropped: {rule.reason}, by {rule.pattern}")
    table = Table("part", "parameters", "bytes", title="Parameters")
    parts = count_parameters(plan.config)
    for name, count in {**parts, "total": sum(parts.values())}.items():
        table.add_row(name, f"{count:,}", f"{count * plan.config.dtype.itemsize:,}")
    Console().print(table)
    tasks = ", ".join(f"{name} ({task.kind})" for name, task in plan.config.tasks.items())
    typer.echo(f"{plan.total_bytes / 1e9:.3f} GB of weights as {plan.config.dtype}; tasks: {tasks}")


def main() -> None:
    """Entry point: errors that a user can act on are one sentence, not a traceback."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app()
    except (ValueError, OSError) as error:
        typer.echo(f"Error: {error}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        typer.echo("Interrupted.", err=True)
        sys.exit(130)
