"""`healthgpt ui`: the page in a browser, served from this machine."""

import os
import signal
import socket
import tempfile
import time
from contextlib import suppress
from typing import Annotated

import typer

from ..errors_healthgpt import HealthGPTError
from .common import NANO, Checkpoint, Device, Dtype, load, working


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
    host = host.strip("[]")  # around an IPv6 address
    require_port(host, port)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does, leaving no folder
    with tempfile.TemporaryDirectory(prefix="healthgpt-ui-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # read when Gradio is imported
        with working("Starting"):
            from .page import serve
            from .runner import Runner

        runner = Runner(*load(checkpoint, device, dtype))
        page = serve(runner, f"[{host}]" if ":" in host else host, port, with_examples=checkpoint == NANO)
        typer.echo(f"The page is at {page.local_url} until Ctrl-C.")
        with suppress(KeyboardInterrupt):
            while True:
                time.sleep(1)
        runner.close()  # first: a server waits for those whom it serves
        page.close(verbose=False)


def require_port(host: str, port: int) -> None:
    """Refuses an address at which nothing can be served, before a model is loaded for it."""
    try:
        family = socket.getaddrinfo(host, port)[0][0]
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        raise HealthGPTError(
            f"Port {port} of {host} is taken, not permitted or not of this machine: choose others with --port and --host."
        ) from error
