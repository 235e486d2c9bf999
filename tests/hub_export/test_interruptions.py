"""Exports that are killed, started again, started twice, or run out of disk."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import GOLDEN, full_disk, refused, sources_of, weights_of

from healthgpt.errors_healthgpt import HealthGPTError
from healthgpt.hub_export import CheckpointError, export


def test_a_finished_folder_counts_only_if_it_is_whole_and_of_the_same_settings(files):
    sources, output = files
    export(sources, output, skip_forward=True)
    weights = output / "model-00001-of-00001.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"lacks model-00001-of-00001\.safetensors, which the export wrote"):
        export(sources, output)
    weights.write_bytes(content[:1000])
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        export(sources, output)
    weights.write_bytes(content)
    for name, change in (
        ("vit/preprocessor_config.json", {"image_mean": [0.1, 0.2, 0.3]}),
        ("base/tokenizer_config.json", {"model_max_length": 77}),
    ):
        path = output.parent / "m3" / name
        before = path.read_text()
        path.write_text(json.dumps(json.loads(before) | change))
        with pytest.raises(CheckpointError, match="it holds another export"):
            export(sources, output)
        path.write_text(before)
    export(sources, output)
    (output / "healthgpt_export.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"healthgpt_export\.json"):
        export(sources, output)


def test_an_interrupted_export_goes_on_from_its_finished_files(files, monkeypatch):
    sources, output = files
    partial = output.parent / ".out.partial"
    monkeypatch.setattr("healthgpt.hub_export.merge.MAX_SHARD_BYTES", 10**6)
    whole = output.parent / "m3/whole"
    export(sources, whole)

    def interrupt(stage, total):
        done = 0

        def advance(nbytes):
            nonlocal done
            done += nbytes
            if stage == "Writing" and done > 0.5 * total:
                raise KeyboardInterrupt

        return advance

    with pytest.raises(KeyboardInterrupt):
        export(sources, output, progress=interrupt)
    assert not output.exists()
    finished = {path.name: path.stat().st_mtime_ns for path in partial.glob("*.safetensors")}
    assert 0 < len(finished) < len(list(whole.glob("*.safetensors")))
    export(sources, output)
    assert not partial.exists()
    assert {name: (output / name).stat().st_mtime_ns for name in finished} == finished
    for path in whole.iterdir():
        if path.name not in ("README.md", "healthgpt_export.json"):
            assert (output / path.name).read_bytes() == path.read_bytes(), path.name


def test_what_another_export_left_is_not_used(files, monkeypatch):
    sources, output = files
    partial = output.parent / ".out.partial"
    partial.mkdir()
    (partial / "model-00001-of-00001.safetensors").write_bytes(b"of another export")
    (partial / "merged").mkdir()
    export(sources, output)
    assert weights_of(output).keys() and not partial.exists() and not (output / "merged").exists()


def test_a_finished_file_that_was_damaged_is_noticed(files):
    sources, output = files
    partial = output.parent / ".out.partial"

    def damage(stage, total):
        if stage == "Verifying":
            path = partial / "model-00001-of-00001.safetensors"
            data = bytearray(path.read_bytes())
            data[-1000] ^= 1
            path.write_bytes(data)
        return lambda nbytes: None

    refused(sources, output, "differs from .*: the source was changed meanwhile, or the disk", progress=damage)


def test_two_exports_to_one_folder_at_once(files):
    sources, output = files

    def export_again(stage, total):
        with pytest.raises(HealthGPTError, match=r"Another command is changing .*out: "):
            export(sources, output)
        return lambda nbytes: None

    export(sources, output, progress=export_again)
    assert (output / "config.json").is_file()


def test_a_disk_that_becomes_too_small_loses_nothing_that_was_finished(files, monkeypatch):
    sources, output = files
    partial = output.parent / ".out.partial"

    def interrupt(stage, total):
        if stage == "Verifying":
            raise KeyboardInterrupt
        return lambda nbytes: None

    with pytest.raises(KeyboardInterrupt):
        export(sources, output, progress=interrupt)
    (partial / "model.unfinished").write_bytes(b"half")
    monkeypatch.setattr("healthgpt.hub_export.merge.SPACE_BESIDE_WEIGHTS", 10**18)
    finished = sorted(path.name for path in partial.glob("*.safetensors"))
    with pytest.raises(CheckpointError, match="The disk has"):
        export(sources, output)
    assert sorted(path.name for path in partial.glob("*.safetensors")) == finished != []
    assert not (partial / "model.unfinished").exists()


def test_a_disk_that_is_too_small(files, monkeypatch):
    sources, output = files
    monkeypatch.setattr("healthgpt.hub_export.merge.SPACE_BESIDE_WEIGHTS", 10**18)
    refused(sources, output, r"The disk has \d+\.\d+ GB free, but the export needs 1000000000\.\d+ GB")
    monkeypatch.undo()
    for options in ({}, {"quantize": "8bit"}):
        with full_disk():
            refused(
                sources, output, "could not be written, and nothing was kept: .*(File too large|it is full)", **options
            )


KILLED = """
import sys
import types
from conftest import GOLDEN, sources_of
from healthgpt.hub_export import export
def progress(stage, total):
    print(stage, flush=True)
    return lambda nbytes: print("moved", flush=True)
export(sources_of(GOLDEN / "m3"), sys.argv[1], progress=progress)
"""


@pytest.mark.parametrize("moment", ["Checking", "Writing", "moved", "Verifying"])
def test_a_kill_leaves_nothing_and_the_next_run_finishes(tmp_path, moment):
    output = tmp_path / "out"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(
            [str(Path(__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        ),
    }
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, output], stdout=subprocess.PIPE, text=True, env=environment
    )
    for line in process.stdout:
        if line.startswith(moment):
            process.kill()
            break
    assert process.wait(60) == -signal.SIGKILL
    process.stdout.close()
    assert not output.exists()
    export(sources_of(GOLDEN / "m3"), output)
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (output / "config.json").is_file()
