"""
Programs that start within milliseconds: forked from one process that has imported torch and transformers already.

A page of snippets starts some twenty programs, and each import takes seconds. A program has its own arguments, environment,
folder and standard streams; what it shares is only that the libraries are imported.
"""

import contextlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path

PROGRAMS = ("healthgpt", "python")


@contextlib.contextmanager
def programs(folder: Path, environment: dict[str, str]):
    """Meanwhile the folder has `healthgpt` and `python`, and a `torchrun` that starts in earnest."""
    address = str(folder / "socket")
    for name in PROGRAMS:
        write_script(folder / name, f'exec {sys.executable} -I -S {__file__} {address} {name} "$@"')
    write_script(folder / "torchrun", f'exec {sys.executable} -m torch.distributed.run "$@"')
    command = [sys.executable, __file__, address]
    server = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        if not server.stdout.readline():
            raise RuntimeError("The process that has everything imported did not start.")
        yield
    finally:
        server.kill()
        server.wait()


def write_script(path: Path, command: str) -> None:
    path.write_text(f"#!/bin/sh\n{command}\n")
    path.chmod(0o755)


def serve(address: str) -> None:
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"  # as the command sets it before it imports
    from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, pipeline  # noqa: F401

    import healthgpt.evaluation
    import healthgpt.hub_export
    import healthgpt.phantoms
    import healthgpt.training  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        print("ready", flush=True)
        while select.select([listener, sys.stdin], [], [])[0] == [listener]:  # stdin ends with those who started it
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                run(connection)
            connection.close()


def run(connection: socket.socket) -> None:
    """In the forked process: becomes the program that was asked for, and ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    message, streams, *_ = socket.recv_fds(connection, 2**20, 3)
    name, arguments, environment, folder, group = json.loads(message)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.setpgid(0, group)  # so that it ends with those who started it
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    code = 0
    try:
        start(name, arguments)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    connection.sendall(bytes([code]))
    os._exit(code)


def start(name: str, arguments: list[str]) -> None:
    sys.argv = [name, *arguments]
    if name == "healthgpt":
        from healthgpt.app.cli import main

        main()
    elif arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
        runpy.run_path(arguments[0], run_name="__main__")


def ask(address: str, name: str, arguments: list[str]) -> int:
    """Has a program run in this process's place; its exit code."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        message = [name, arguments, dict(os.environ), os.getcwd(), os.getpgrp()]
        socket.send_fds(connection, [json.dumps(message).encode()], [0, 1, 2])
        answer = connection.recv(1)
    return answer[0] if answer else 1


if __name__ == "__main__":
    if len(sys.argv) == 2:
        serve(sys.argv[1])
    sys.exit(ask(sys.argv[1], sys.argv[2], sys.argv[3:]))
