"""One command at a time: real processes on the same file or folder, one that is killed, and places where nothing can be locked."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from healthgpt.errors_healthgpt import HealthGPTError
from healthgpt.locks import alone, lock_of

HOLD = """
import sys
from healthgpt.locks import alone
with alone(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holds():
    """Starts processes that have a path to themselves until they are ended."""
    started = []

    def start(path):
        command = [sys.executable, "-c", HOLD, path]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_another_process_is_refused_at_once_and_by_any_name_until_the_first_ends(holds, tmp_path, monkeypatch):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/link").symlink_to(tmp_path / "checkpoint")
    monkeypatch.chdir(tmp_path)
    process = holds(tmp_path / "checkpoint")
    for name in (tmp_path / "checkpoint", "checkpoint", "elsewhere/link", "elsewhere/../checkpoint"):
        with pytest.raises(HealthGPTError, match=f"Another command is changing {name}: "), alone(name):
            pass
    with alone("elsewhere"), alone("answers.csv"):  # others are free, there or not
        pass
    process.communicate("")
    with alone("checkpoint"), pytest.raises(HealthGPTError, match="Another command"), alone("checkpoint"):
        pass
    assert {path.name for path in tmp_path.rglob("*")} == {"checkpoint", "elsewhere", "link"}


def test_a_killed_process_stops_nobody(holds, tmp_path):
    process = holds(tmp_path / "answers.csv")
    process.kill()
    assert process.wait(60) == -signal.SIGKILL
    left = lock_of(tmp_path / "answers.csv")
    assert list(tmp_path.iterdir()) == [left] and left.stat().st_mode & 0o777 == 0o666  # another user may take it over
    with alone(tmp_path / "answers.csv"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_lock_goes_with_an_error_too(tmp_path):
    with pytest.raises(KeyboardInterrupt), alone(tmp_path / "a"):
        raise KeyboardInterrupt
    with alone(tmp_path / "a"):
        assert [path.name for path in tmp_path.iterdir()] == [".a.lock"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told(code, tmp_path, monkeypatch):
    def flock(*arguments):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", flock)
    told = pytest.raises(HealthGPTError, match=rf"answers\.csv cannot be locked: .*{os.strerror(code)}")
    with told, alone(tmp_path / "answers.csv"):
        pass
    assert not (tmp_path / "answers.csv").exists()


def test_where_nothing_can_be_made_that_is_told(tmp_path):
    with pytest.raises(HealthGPTError, match=r"The folder .*nowhere does not exist\."), alone(tmp_path / "nowhere/a"):
        pass
    assert list(tmp_path.iterdir()) == []
    lock_of(tmp_path / "b").mkdir()
    with pytest.raises(HealthGPTError, match=r"b cannot be locked: .*b\.lock: "), alone(tmp_path / "b"):
        pass
    lock_of(tmp_path / "a").symlink_to(tmp_path / "other")  # which is not made
    with pytest.raises(HealthGPTError, match=r"a cannot be locked: .*a\.lock: "), alone(tmp_path / "a"):
        pass
    assert not (tmp_path / "other").exists()
