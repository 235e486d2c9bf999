"""`healthgpt ui`: the page in a browser, served from this machine."""

import os
import signal
import tempfile
from contextlib import closing
from typing import Annotated

import typer

from .common import NANO, Checkpoint, Device, Dtype, load


def ui(
    checkpoint: Checkpoint = NANO,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 7860,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """
    Serves a page to chat about pictures and to draw them, until it is interrupted.

    Uploads and drawings lie in a temporary folder that is deleted at the end. Nothing is logged, nothing leaves the machine.

    Example: healthgpt ui -c HealthGPT-M3
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does, leaving no folder
    with tempfile.TemporaryDirectory(prefix="healthgpt-ui-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # read when Gradio is imported
        from .page import serve
        from .runner import Runner

        with closing(Runner(*load(checkpoint, device, dtype))) as runner:
            try:
                page = serve(runner, host, port, with_examples=checkpoint == NANO)
            except OSError as error:
                raise ValueError(
                    f"Port {port} of {host} is taken or not of this machine: choose others with --port and --host."
                ) from error
            typer.echo(f"The page is at {page.local_url} until Ctrl-C.")
            page.block_thread()
