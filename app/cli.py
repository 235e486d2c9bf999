"""The command line: thin commands over the functions that a Python user calls."""

import logging
import os
import sys
import warnings
from importlib.metadata import version
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

from ..errors_healthgpt import HealthGPTError
from ..refusals import loading, printable
from .ask import ask
from .bench import bench
from .common import AsJson, count_stored, own_name, print_json, printing, require_checkpoint, working
from .draw import draw
from .evaluate import evaluation
from .explain import explain
from .export import export, plugins, push
from .train import train
from .ui import ui

app = typer.Typer(
    name="healthgpt",
    help="HealthGPT answers questions about medical pictures and draws medical pictures. Research use only.\n\n"
    'Example: healthgpt ask -c HealthGPT-M3 chest.dcm "Is there a pleural effusion?"\n\n'
    "Exit codes: 0 done, 1 bad input, 2 options or arguments that cannot be parsed, 130 interrupted. A traceback is a mistake "
    "of the package.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)
app.command()(ask)
app.command()(draw)
app.command()(export)
app.command()(push)
app.command()(explain)
app.command()(train)
app.command()(bench)
app.command()(ui)
app.add_typer(evaluation, name="eval")
app.add_typer(plugins, name="plugin")


def print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"healthgpt {version('healthgpt')}")
        raise typer.Exit


@app.callback()
def common(
    context: typer.Context,
    show_version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show where every error comes from: healthgpt --debug ask ...")
    ] = False,
) -> None:
    context.ensure_object(dict)["debug"] = debug


@app.command()
def info(
    checkpoint: Annotated[str, typer.Argument(help="Exported folder or Hub repository.", callback=own_name)],
    as_json: AsJson = False,
) -> None:
    """
    Says what a checkpoint can do and how large its parts are, without loading its weights.

    Example: healthgpt info HealthGPT-M3
    """
    with working("Reading the checkpoint"):
        settings = require_checkpoint(checkpoint)
        from ..hub_export.checkpoint import read_tasks

        tasks = read_tasks(settings, checkpoint)
        with loading(checkpoint):
            parts = count_stored(checkpoint, settings)
            dtype, text = f"torch.{settings['dtype']}", settings["text_config"]
            content = {"tasks": settings["tasks"], "parameters": parts, "dtype": dtype}
            content |= {"language_model": text["model_type"], "token_rows": text["vocab_size"]}
    if as_json:
        print_json(content)
        return
    console = Console()
    columns = ("puts out", "rank", "alpha", "experts", "vision layer", "token tables")
    table = Table(Column("task", no_wrap=True), *columns, title="Tasks")
    for name, task in tasks.items():
        row = (
            name,
            task.kind,
            task.rank,
            task.alpha,
            task.num_experts,
            task.vision_layer,
            task.token_tables or "base",
        )
        table.add_row(*(Text(printable(str(cell))) for cell in row))
    sizes = Table("part", "parameters", title=f"Parameters ({escape(printable(dtype))})")
    for name, count in {**parts, "total": sum(parts.values())}.items():
        sizes.add_row(name, f"{count:,}")
    with printing():
        console.print(table)
        console.print(sizes)


def main() -> None:
    """Entry point: errors that a user can act on are one sentence, not a traceback."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Threads that wait sleep: by default they spin, and take the processor from those that others have work for.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says at every step that it multiplies in 8 bits
    # Pillow's, of images that are refused here in a sentence.
    warnings.filterwarnings("ignore", message="Image size .* exceeds limit")
    options = {}  # filled by `common`
    try:
        app(obj=options)
    except HealthGPTError as error:
        if options["debug"]:
            raise
        typer.echo(f"Error: {printable(str(error))}", err=True)
        sys.exit(1)
