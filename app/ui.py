"""`healthgpt ui`: the page in a browser, served from this machine."""

import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Annotated

import typer
from filelock import FileLock, Timeout

from ..errors_healthgpt import HealthGPTError
from ..refusals import files
from .common import NANO, Checkpoint, Device, Dtype, load, starting

PREFIX, LOCK = "healthgpt-ui-", "lock"
UNITS = {"kb": 2**10, "mb": 2**20, "gb": 2**30}


def ui(
    context: typer.Context,
    checkpoint: Checkpoint = NANO,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 7860,
    max_file_size: Annotated[
        str, typer.Option(help="Largest file that can be uploaded, for example 500kb, 100mb or 2gb.")
    ] = "100mb",
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """
    Serves a page to chat about pictures and to draw them, until it is interrupted.

    Uploads and drawings lie in a temporary folder that is deleted at the end, or if the server was killed by the next one. Nothing is
    logged, nothing leaves the machine.

    Example: healthgpt ui -c HealthGPT-M3
    """
    limit = bytes_of(max_file_size)
    host = host.strip("[]")  # around an IPv6 address
    require_port(host, port)
    debug = context.obj["debug"]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does, leaving no folder
    with upload_folder() as folder:
        os.environ["GRADIO_TEMP_DIR"] = str(folder)  # read when Gradio is imported
        with starting():
            from .page import serve
            from .runner import Runner

        runner = Runner(*load(checkpoint, device, dtype))
        require_port(host, port)  # once more: loading takes a while, in which another server may have started
        output = sys.stdout
        with ExitStack() as quiet, files(folder, "written"):
            quiet.callback(setattr, tempfile, "tempdir", tempfile.tempdir)
            tempfile.tempdir = str(folder)  # of requests too that were broken off
            if not debug:  # Gradio and its server print tracebacks with what clients send
                nothing = quiet.enter_context(open(os.devnull, "w"))
                quiet.enter_context(redirect_stdout(nothing))
                quiet.enter_context(redirect_stderr(nothing))
            shown_host = f"[{host}]" if ":" in host else host
            page = serve(runner, shown_host, port, checkpoint == NANO, limit, debug)
            typer.echo(f"The page is at {page.local_url} until Ctrl-C.", file=output)
            with suppress(KeyboardInterrupt):
                while True:
                    time.sleep(1)
            runner.close()  # first: a server waits for those whom it serves
            page.close(verbose=False)


def bytes_of(size: str) -> int:
    """Bytes of a size with its unit."""
    match = re.fullmatch(r"([1-9]\d{0,9}) ?(kb|mb|gb)", size.lower())
    if not match:
        raise HealthGPTError(f"--max-file-size is a whole number of kb, mb or gb, such as 100mb, and not {size!r}.")
    return int(match[1]) * UNITS[match[2]]


@contextmanager
def upload_folder() -> Iterator[Path]:
    """
    A temporary folder that goes at the end. Those of servers that were killed go now.

    Each has a file that its server holds a lock on, which the system takes away with the process.

    Raises:
        HealthGPTError: if no folder can be made.
    """
    with files("A temporary folder", "made"):
        while True:
            folder = Path(tempfile.mkdtemp(prefix=PREFIX))
            lock = FileLock(folder / LOCK)
            lock.acquire()
            if (folder / LOCK).exists():  # another server that starts may have locked, and removed, it first
                break
    try:
        remove_stale(folder)
        yield folder
    finally:
        shutil.rmtree(folder)
        lock.release()


def remove_stale(own: Path) -> None:
    """Removes the folders beside one's own that are of the same user, and of servers that are no more."""
    for entry in os.scandir(own.parent):
        is_one = entry.name.startswith(PREFIX) and entry.name != own.name and entry.is_dir(follow_symlinks=False)
        if not is_one or entry.stat(follow_symlinks=False).st_uid != own.stat().st_uid:
            continue
        if os.path.isfile(Path(entry) / LOCK):
            with suppress(Timeout, FileNotFoundError), FileLock(Path(entry) / LOCK).acquire(blocking=False):
                shutil.rmtree(entry)


def require_port(host: str, port: int) -> None:
    """Refuses an address at which nothing can be served, before a model is loaded for it."""
    try:
        family = socket.getaddrinfo(host, port)[0][0]
        socket.create_server((host, port), family=family).close()
    except (OSError, UnicodeError) as error:  # of a host's name that is too long
        raise HealthGPTError(
            f"Port {port} of {host} is taken, not permitted or not of this machine: choose others with --port and --host."
        ) from error
