"""`healthgpt ui`: a server that starts, ends and is refused; what it serves is in test_page.py."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from urllib.request import urlopen

import pytest
from conftest import full_disk
from gradio_client import Client
from gradio_client.utils import Status

from healthgpt.app.cli import main

SLOWLY = """
import time
from healthgpt.app.runner import Watcher

def watch(watcher, *arguments, watch=Watcher.__call__, **options):
    time.sleep(0.2)
    return watch(watcher, *arguments, **options)

Watcher.__call__ = watch
"""


@contextmanager
def kept_port():
    """A port that the system gives to nobody else meanwhile: those who listen with SO_REUSEADDR, as servers do, may share it."""
    with socket.socket() as kept:
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        kept.bind(("127.0.0.1", 0))
        yield kept.getsockname()[1]


@contextmanager
def served(folder, before="", host="127.0.0.1"):
    """The command in a process of its own, once it serves, and its address."""
    script = f"{before}\nfrom healthgpt.app.cli import main; main()"
    environment = {**os.environ, "TMPDIR": str(folder), "GRADIO_SHARE": "True"}
    with kept_port() as port:
        command = [sys.executable, "-c", script, "ui", "--host", host, "--port", str(port), "--device", "cpu"]
        process = subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            address = f"http://{f'[{host}]' if ':' in host else host}:{port}/"
            assert process.stdout.readline() == f"The page is at {address} until Ctrl-C.\n"
            yield process, address
        finally:
            process.kill()
            process.wait()


def refused(monkeypatch, capsys, port):
    """The sentence with which the command ends."""
    monkeypatch.setattr(sys, "argv", ["healthgpt", "ui", "--port", str(port)])
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")  # which the command changes: put back afterwards
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    return capsys.readouterr().err


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_it_serves_until_it_is_ended_and_leaves_nothing(host, tmp_path):
    with served(tmp_path, host=host) as (process, address):
        with urlopen(address) as answer:
            assert b"HealthGPT" in answer.read()
        assert [path.name[:13] for path in tmp_path.iterdir()] == ["healthgpt-ui-"]
        process.terminate()
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in errors, list(tmp_path.iterdir())) == (0, False, []), output + errors


def test_ctrl_c_ends_a_drawing_and_those_that_wait(tmp_path):
    with served(tmp_path, SLOWLY) as (process, address):
        clients = [Client(address, download_files=False, verbose=False) for _ in range(2)]
        settings = [{"text": "Draw a chest X-ray.", "files": []}, "generation", "", False, 1, 1, 0]
        drawing = clients[0].submit(*settings, api_name="/draw")
        next(drawing)  # a code
        waiting = clients[1].submit(*settings, api_name="/draw")
        while waiting.status().code in (Status.STARTING, Status.JOINING_QUEUE):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in errors, list(tmp_path.iterdir())) == (0, False, []), output + errors
    assert len(drawing.outputs()) < 64 and not waiting.outputs()


def test_a_port_that_is_taken_is_refused_before_a_model_is_loaded(monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        error = refused(monkeypatch, capsys, port)
    assert error.startswith(f"Error: Port {port} of 127.0.0.1 is taken, not permitted or not of this machine: choose")


def test_a_full_disk_is_called_one(monkeypatch, capsys):
    with kept_port() as port, full_disk(100):
        assert "File too large" in refused(monkeypatch, capsys, port)


def test_without_gradio_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "healthgpt.app.page", raising=False)
    monkeypatch.setitem(sys.modules, "gradio", None)
    with kept_port() as port:
        assert refused(monkeypatch, capsys, port) == "Error: This needs gradio: pip install healthgpt[ui].\n"
