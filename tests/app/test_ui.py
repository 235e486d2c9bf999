"""`healthgpt ui`: a server that starts, ends and is refused; what it serves is in test_page.py."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import httpx
import pytest
from conftest import GOLDEN, full_disk
from gradio_client import Client
from gradio_client.utils import Status

from healthgpt.app.cli import main
from healthgpt.app.ui import upload_folder

CT = GOLDEN / "images/ct.png"
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
def served(folder, before="", host="127.0.0.1", options=()):
    """The command in a process of its own, once it serves, and its address."""
    script = f"{before}\nfrom healthgpt.app.cli import main; main()"
    environment = {**os.environ, "TMPDIR": str(folder), "GRADIO_SHARE": "True"}
    with kept_port() as port:
        command = [
            sys.executable,
            "-c",
            script,
            "ui",
            "--host",
            host,
            "--port",
            str(port),
            "--device",
            "cpu",
            *options,
        ]
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


SECRET = "DOE^JANE"
GREEDY = [False, 1, 1, 0]
NOTICE = "This is the small demonstration model, worthless for medicine; -c names another one.\n"


def error_of(address, name, *data):
    """The sentence that a program gets in place of a result."""
    event = httpx.post(f"{address}gradio_api/call/{name}", json={"data": data}, timeout=60).json()["event_id"]
    lines = httpx.get(f"{address}gradio_api/call/{name}/{event}", timeout=60).text.splitlines()
    assert lines[0] == "event: error", lines
    return json.loads(lines[1].removeprefix("data: "))["error"]


def file_at(path):
    return {"path": path, "orig_name": f"{SECRET}.png", "meta": {"_type": "gradio.FileData"}}


def test_what_is_refused_is_told_in_a_sentence_and_nothing_of_it_is_logged(tmp_path):
    with served(tmp_path, options=["--max-file-size", "50kb"]) as (process, address):
        api = f"{address}gradio_api"
        for content, path in (
            ({"data": [SECRET]}, f"call/{SECRET}"),
            ({"data": [SECRET]}, f"call/v2/{SECRET}"),
            ({"data": [SECRET], "fn_index": 9999}, "run/predict"),
            ({"data": [SECRET], "fn_index": 9999, "session_hash": SECRET}, "queue/join"),
            ({"data": SECRET, "component_id": 99, "fn_name": SECRET, "session_hash": SECRET}, "component_server"),
        ):
            answer = httpx.post(f"{api}/{path}", json=content)
            assert answer.status_code == 400 and "cannot be served" in answer.json()["error"]
        assert httpx.post(f"{api}/call/chat", content=f"{{{SECRET}").status_code == 422
        assert httpx.get(f"{api}/custom_component/{SECRET}/client/x/y").status_code == 404
        settings = ["comprehension", 8, "", *GREEDY]
        for data in (
            [],
            [SECRET],
            [None, [], *settings],
            [{"text": None, "files": []}, [], *settings],
            [{"text": SECRET, "files": [SECRET]}, [], *settings],
            [{"text": SECRET, "files": [file_at("/etc/passwd")]}, [], *settings],
            [{"text": SECRET, "files": []}, [{"role": SECRET, "content": SECRET}], *settings],
            [{"text": SECRET, "files": []}, [], "comprehension", SECRET, "", *GREEDY],
            [{"text": SECRET, "files": []}, [], "comprehension", 8, "", True, 1, 1, SECRET],
        ):
            assert "cannot be served" in error_of(address, "chat", *data)
        for number, wrong in ((1, 10**9), (2, SECRET), (4, 0)):
            changed = [*settings[:3], True, 1, 1, 0]
            changed[number] = wrong
            assert str(wrong) in error_of(address, "chat", {"text": SECRET, "files": []}, [], *changed)
        remote = {"text": SECRET, "files": [file_at("http://127.0.0.1:9/DOE^JANE.png")]}
        assert error_of(address, "chat", remote, [], *settings) == "The page opens no addresses: upload the file."
        process.terminate()
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (0, "", NOTICE)


def test_uploads_have_a_limit_and_names_of_their_own_and_go_with_a_killed_server(tmp_path):
    def pieces():
        for _ in range(20):
            yield b"1" * 10_000

    with served(tmp_path, options=["--max-file-size", "50kb"]) as (_, address):
        api = f"{address}gradio_api"
        limit = 50 * 2**10
        for name, ending in (
            (f"{SECRET}.PNG", ".png"),
            (f"{SECRET}.nii.gz", ".nii.gz"),
            (f"scan.{SECRET}", ""),
            (f"../{SECRET}.dcm", ".dcm"),
        ):
            [path] = httpx.post(f"{api}/upload", files={"files": (name, b"x" * limit)}).json()
            assert Path(path).name.endswith(ending) and len(Path(path).name) == 16 + len(ending)
            assert Path(path).stat().st_size == limit
        large = {"files": (f"{SECRET}.png", b"x" * (limit + 1))}
        for path, body in (
            ("upload", {"files": large}),
            ("component_server", {"files": large}),
            ("call/chat", {"json": {"data": ["x" * limit]}}),
            ("call/chat", {"content": pieces()}),
        ):
            assert httpx.post(f"{api}/{path}", **body).status_code == 413
        field = {"data": {"files": "x" * 10**6}, "files": {"other": ("other.png", b"")}}  # kept in memory
        assert httpx.post(f"{api}/upload", **field).status_code == 400
        [path] = httpx.post(f"{api}/upload", files={"files": (f"{SECRET}.png", CT.read_bytes())}).json()
        prompt = {"text": "What is this?", "files": [file_at(path)]}
        sentence = error_of(address, "chat", prompt, [], "comprehension", 8, "7", *GREEDY)
        assert sentence == f"{SECRET}.png has no frame 7: it has 1, numbered from 0 to 0."
        names = [path.name for path in tmp_path.rglob("*")]
        assert len(names) > 10 and not [name for name in names if "DOE" in name.upper()]
        [killed] = tmp_path.iterdir()
    assert killed.exists()
    with served(tmp_path, "import sys; sys.argv.insert(1, '--debug')") as (process, address):
        assert killed not in tmp_path.iterdir()
        httpx.post(f"{address}gradio_api/call/nothing", json={"data": []})
        process.terminate()
        assert "FnIndexInferError" in process.communicate(timeout=60)[1]


def test_folders_of_others_are_left_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("healthgpt-ui-other", "healthgpt-uploads", "outside"):  # nobody knows whose they are
        (tmp_path / name).mkdir()
    (tmp_path / "outside/lock").touch()
    (tmp_path / "healthgpt-ui-link").symlink_to(tmp_path / "outside")
    before = set(tmp_path.iterdir())
    with upload_folder() as living, upload_folder() as own:
        assert set(tmp_path.iterdir()) - before == {living, own}
    assert set(tmp_path.iterdir()) == before and (tmp_path / "outside/lock").exists()


@pytest.mark.parametrize("size", ["", "100", "0mb", "-1mb", "1.5mb", "100 tb", "much"])
def test_a_limit_that_is_no_size_is_refused(size, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["healthgpt", "ui", "--max-file-size", size])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1 and f"such as 100mb, and not {size!r}" in capsys.readouterr().err


def test_a_port_that_is_taken_is_refused_before_a_model_is_loaded(monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        error = refused(monkeypatch, capsys, port)
    assert error.startswith(f"Error: Port {port} of 127.0.0.1 is taken, not permitted or not of this machine: choose")


def test_a_port_that_is_taken_while_the_model_is_loaded_is_named_too(monkeypatch, capsys):
    with kept_port() as port, socket.socket() as other:

        def take(*arguments):
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            other.bind(("127.0.0.1", port))
            other.listen()
            return None, None

        monkeypatch.setattr("healthgpt.app.ui.load", take)
        assert f"Port {port} of 127.0.0.1 is taken" in refused(monkeypatch, capsys, port)


def test_a_full_disk_is_called_one(monkeypatch, capsys):
    with kept_port() as port, full_disk(100):
        assert "File too large" in refused(monkeypatch, capsys, port)


def test_without_gradio_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "healthgpt.app.page", raising=False)
    monkeypatch.setitem(sys.modules, "gradio", None)
    with kept_port() as port:
        assert refused(monkeypatch, capsys, port) == "Error: This needs gradio: pip install healthgpt[ui].\n"
