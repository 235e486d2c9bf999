"""`healthgpt export` and `healthgpt plugin`: checkpoints made and changed."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from ..errors_healthgpt import HealthGPTError
from ..refusals import extras, files, memory, printable, temporary_folder
from .common import (
    AsJson,
    count_parameters,
    on_terminal,
    own_name,
    print_json,
    print_result,
    printing,
    starting,
    stoppable,
    working,
)

plugins = typer.Typer(
    help="Lists the plugins of a checkpoint, takes one out, puts one in.\n\nExample: healthgpt plugin list HealthGPT-M3",
    no_args_is_help=True,
)

Public = Annotated[bool, typer.Option("--public", help="Make a new repository public; by default private.")]
CreatePr = Annotated[bool, typer.Option("--create-pr", help="Open a pull request on the repository.")]


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
        bool,
        typer.Option(
            "--dry-run",
            help="Print what would be written, and write nothing; of the Hub's safetensors only headers are read.",
        ),
    ] = False,
    push_to_hub: Annotated[str | None, typer.Option(help="Repository user/name to upload the result to.")] = None,
    public: Public = False,
    create_pr: CreatePr = False,
    as_json: AsJson = False,
) -> None:
    """
    Merges the published files into one checkpoint that from_pretrained loads.

    What an interrupted export has finished is kept beside the output, and the same command goes on from there.

    Example: healthgpt export --preset m3 --vqgan last.ckpt --vqgan-config model.yaml --output HealthGPT-M3

    Example: healthgpt export --base phi-4 --vision clip --comprehension com_hlora_weights_phi4.bin --output HealthGPT-L14
    """
    from ..hub_export.names import require_repository
    from ..hub_export.presets import PRESETS, require_preset

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
            raise HealthGPTError(f"There is no preset {preset!r}; choose one of {', '.join(PRESETS)}.")
        named = PRESETS[preset].sources | named
    missing = [f"--{name}" for name in ("base", "vision") if name not in named]
    if missing:
        raise HealthGPTError(f"The export needs {' and '.join(missing)}, or a --preset that names them.")
    if push_to_hub is None and (public or create_pr):
        raise HealthGPTError("--public and --create-pr go with --push-to-hub.")
    if push_to_hub is not None:
        require_repository(push_to_hub)
    with starting():
        from transformers.utils import logging

        from ..hub_export import ExportSources
        from ..hub_export import export as run
        from ..hub_export import push as upload
        from ..hub_export.hub import fetch
        from ..hub_export.plan import build_plan
        from ..hub_export.quantize import require_bitsandbytes

    sources = ExportSources(**named)
    if dry_run:
        if quantize is not None:
            require_bitsandbytes(quantize)
        with temporary_folder() as folder:
            local = fetch(sources, Path(folder))
            with working("Reading the sources"), extras():
                plan = build_plan(local, dtype)
                if preset is not None:
                    require_preset(plan.config, preset)
            print_plan(plan, quantize, as_json)
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    bars = on_terminal(*columns, TimeRemainingColumn())
    downloads_have_bars = logging.is_progress_bar_enabled()

    def progress(stage, total):
        logging.disable_progress_bar()  # downloads are over; loading the model that tries every task has this one
        bars.start()
        bar = bars.add_task(stage, total=total)
        return lambda nbytes: bars.advance(bar, nbytes)

    kept = "What was finished is kept in a hidden folder beside it, if writing had begun; the same command goes on from there."
    try:
        with stoppable(lambda: f"{output} is not finished. {kept}"), files(output, "written"), memory(), extras():
            run(sources, output, dtype, quantize, skip_forward, preset, progress)
    finally:
        bars.stop()
        if downloads_have_bars:
            logging.enable_progress_bar()  # for the upload
    content = {"output": str(output)}
    if push_to_hub is not None:
        with files(output):
            content["url"] = upload(output, push_to_hub, public, create_pr)
    print_result(as_json, "\n".join(map(printable, content.values())), content)


def push(
    checkpoint: Annotated[Path, typer.Argument(help="Exported folder.")],
    repository: Annotated[str, typer.Argument(help="user/name; made if it does not exist.")],
    public: Public = False,
    create_pr: CreatePr = False,
    as_json: AsJson = False,
) -> None:
    """
    Uploads an exported checkpoint to the Hub, as export --push-to-hub does, for example after a plugin was added.

    Example: healthgpt push HealthGPT-M3 user/HealthGPT-M3
    """
    with starting():
        from ..hub_export import push as run
        from ..hub_export.names import require_repository

    require_repository(repository)
    kept = stoppable(lambda: "What was sent is not sent again; the same command goes on from there.")
    with kept, files(checkpoint):
        url = run(checkpoint, repository, public, create_pr)
    print_result(as_json, url, {"url": url})


@plugins.command("list")
def list_plugins(
    checkpoint: Annotated[str, typer.Argument(help="Exported folder.", callback=own_name)],
    as_json: AsJson = False,
) -> None:
    """
    Says which tasks a checkpoint has and what each of them weighs.

    Example: healthgpt plugin list HealthGPT-M3
    """
    with working("Reading the checkpoint"):
        from ..hub_export.checkpoint import list_plugins as run

        with files(checkpoint):
            found = run(Path(checkpoint))
    if as_json:
        print_json(found)
        return
    table = Table("task", "tensors", "bytes", title="Plugins")
    for task, size in found.items():
        table.add_row(Text(printable(task)), f"{size['tensors']:,}", f"{size['bytes']:,}")
    with printing():
        Console().print(table)


@plugins.command("extract")
def extract_plugin(
    checkpoint: Annotated[str, typer.Argument(help="Exported folder.")],
    task: Annotated[str, typer.Argument(help="Its task.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to make for the plugin.")],
    remove: Annotated[bool, typer.Option("--remove", help="Take the task out of the checkpoint.")] = False,
    published: Annotated[
        bool, typer.Option("--published", help="Write .bin files with the published names of tensors.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """
    Copies the plugin of a task into a folder of its own, and takes it out of the checkpoint if asked to.

    Example: healthgpt plugin extract HealthGPT-M3 generation -o generation-plugin
    """
    with working("Copying the plugin"):
        from ..hub_export.plugins import extract_plugin as run

        if not remove:  # the package's own model stays whole
            checkpoint = own_name(checkpoint)
        with files(output, "written"):
            run(Path(checkpoint), task, output, remove, published)
    print_result(as_json, printable(str(output)), {"output": str(output), "task": task})


@plugins.command("add")
def add_plugin(
    checkpoint: Annotated[Path, typer.Argument(help="Exported folder.")],
    plugin: Annotated[Path, typer.Argument(help="Folder of a plugin, as extract makes it, or a published .bin file.")],
    name: Annotated[
        str | None,
        typer.Option(help="Name of the task in this checkpoint; by default its own, which a .bin file does not have."),
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Take the place of a task of that name.")] = False,
    kind: Annotated[str | None, typer.Option(help="Of a .bin file, which needs it: text or image.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Of a .bin file; by default twice its rank.")] = None,
    fusion: Annotated[Path | None, typer.Option(help="fusion_layer_weights.bin that goes with a .bin file.")] = None,
    as_json: AsJson = False,
) -> None:
    """
    Puts a plugin into a checkpoint, without rewriting what is there.

    Example: healthgpt plugin add HealthGPT-M3 generation-plugin --name ct_to_mri
    """
    with working("Adding the plugin"):
        from ..hub_export.plugins import add_plugin as run

        with files(checkpoint, "changed"), memory():
            run(checkpoint, plugin, name, replace, kind, alpha, fusion)
    print_result(as_json, printable(str(checkpoint)), {"checkpoint": str(checkpoint)})


@printing()
def print_plan(plan, quantize: str | None, as_json: bool) -> None:
    """Every source tensor with its rule, its target or the reason why it is dropped, and sizes; then parts and abilities."""
    from ..hub_export.card import abilities
    from ..hub_export.quantize import stored_bytes

    parts = count_parameters(plan.config)
    quantized = None if quantize is None else stored_bytes(plan, quantize)
    if as_json:
        tensors = {transfer.target: list(transfer.shape) for transfer in plan.transfers}
        content = {"tensors": tensors, "dropped": [name for name, _, _ in plan.dropped], "parameters": parts}
        content |= {"bytes": plan.total_bytes, "quantized_bytes": quantized, "dtype": str(plan.config.dtype)}
        content |= {"tasks": {name: task.kind for name, task in plan.config.tasks.items()}}
        print_json(content)
        return
    for transfer in plan.transfers:
        origin, shape = f"{transfer.tensor.origin.name}: {transfer.name}", list(transfer.shape)
        size = f"{plan.nbytes(transfer):,} bytes"
        written = f"{transfer.target} {shape}, {size}, by {transfer.rule.pattern}"
        typer.echo(printable(f"{origin} {list(transfer.tensor.shape)} -> {written}"))
    for name, tensor, rule in plan.dropped:
        dropped = f"{list(tensor.shape)} dropped: {rule.reason}, by {rule.pattern}"
        typer.echo(printable(f"{tensor.origin.name}: {name} {dropped}"))
    table = Table("part", "parameters", "bytes", title="Parameters")
    for name, count in {**parts, "total": sum(parts.values())}.items():
        table.add_row(name, f"{count:,}", f"{count * plan.config.dtype.itemsize:,}")
    Console().print(table)
    tasks = ", ".join(f"{name} ({task.kind})" for name, task in plan.config.tasks.items())
    typer.echo(f"{plan.total_bytes / 1e9:.3f} GB of weights as {plan.config.dtype}; tasks: {tasks}")
    if quantized is not None:
        typer.echo(f"About {quantized / 1e9:.3f} GB once the linears are quantised to {quantize}")
    typer.echo(f"The checkpoint {abilities(plan.config)}.")
