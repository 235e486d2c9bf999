"""What the commands import: help, facts on disk and mistakes come without torch, answers and drawings without what they do not use."""

import shutil
import subprocess
import sys

import pytest
from conftest import GOLDEN

from healthgpt.app.common import NANO, count_parameters, count_stored
from healthgpt.configuration_healthgpt import HealthGPTConfig
from healthgpt.hub_export.checkpoint import read_settings

CT = str(GOLDEN / "images/ct.png")
# Runs a command and says on stderr, last, how it ended and which modules it has imported.
RUN = """
import sys
from healthgpt.app.cli import main
code = 0
try:
    main()
except SystemExit as end:
    code = end.code or 0
print("", code, *sys.modules, file=sys.stderr)
"""
UNUSED = {"bitsandbytes", "datasets", "gradio", "matplotlib", "nibabel", "pandas", "peft", "pyarrow", "pydicom"}
UNUSED |= {"skimage", "sklearn", "tensorboard", "tensorflow", "torchao", "torchmetrics", "torchvision"}
UNUSED |= {"healthgpt.hub_export.plan", "healthgpt.training", "healthgpt.evaluation", "healthgpt.explain"}


def imports(folder, *arguments) -> tuple[int, set[str], str]:
    """Exit code of a command in a process of its own, the modules that it imports, and what it says on stderr."""
    result = subprocess.run(
        [sys.executable, "-c", RUN, *arguments], cwd=folder, capture_output=True, text=True, timeout=300
    )
    said, _, last = result.stderr.rpartition("\n ")
    code, *modules = (last or result.stderr).split()
    return int(code), set(modules), said


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the small model, files of other kinds and a folder that is not empty."""
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(NANO, folder / "small")
    shutil.copytree(NANO, folder / "damaged")
    (folder / "damaged/config.json").write_text('{"model_type": "healthgpt", "tasks": {"comprehension": {}}}')
    shutil.copytree(NANO, folder / "other")
    (folder / "other/config.json").write_text('{"model_type": "llama"}')
    (folder / "file").touch()
    (folder / "lines.jsonl").write_text("{}\n")
    (folder / "full").mkdir()
    (folder / "full/file").touch()
    return folder


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["ask", "--help"],
        ["train", "--help"],
        ["info", "small"],
        ["info", "nano", "--json"],
        ["plugin", "list", "small"],
    ],
    ids=" ".join,
)
def test_help_and_facts_on_disk_come_without_torch(place, arguments):
    code, modules, said = imports(place, *arguments)
    assert code == 0 and not modules & {"torch", "transformers"}, said


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        (["ask", "nowhere.png", "What?"], "nowhere.png"),
        (["ask", "file", "What?"], "file"),
        (["ask", CT, "What?", "--frame", "3"], "no frame 3"),
        (["ask", "full", "What?"], "full"),
        (["ask", "What?", "--task", "generation"], "generation"),
        (["ask", "What?", "--dtype", "int3"], "int3"),
        (["ask", "What?", "-c", "nowhere"], "nowhere"),
        (["ask", "What?", "-c", "full"], "full"),
        (["ask", "What?", "-c", "other"], "llama"),
        (["ask", "What?", "-c", "damaged"], "damaged"),
        (["ask", "full", "What?", "-o", "answers.txt"], "answers.txt"),
        (["draw", "Draw.", "-o", "out.xyz"], "out.xyz"),
        (["draw", "Draw.", "-o", "nowhere/out.png"], "nowhere"),
        (["draw", "Draw.", "-o", "out.png", "--task", "comprehension"], "comprehension"),
        (["draw", "Draw.", "-o", "out.png", "--keep-aspect-ratio"], "--keep-aspect-ratio"),
        (["explain", "What?", "-o", "full"], "full"),
        (["explain", "What?", "-o", "out", "--task", "generation"], "generation"),
        (["info", "other"], "llama"),
        (["info", "damaged"], "kind"),
        (["plugin", "list", "full"], "full"),
        (["plugin", "list", "damaged"], "kind"),
        (["push", "small", "no good name!!"], "no good name!!"),
        (["push", "nowhere", "user/name"], "nowhere"),
        (["export", "--output", "out", "--preset", "m5"], "m5"),
        (["export", "--output", "out", "--base", "x"], "--vision"),
        (["train", "nowhere.jsonl", "-c", "small", "-o", "out"], "nowhere.jsonl"),
        (["train", "lines.jsonl", "-c", "small", "-o", "out", "--stage", "last"], "last"),
        (["train", "lines.jsonl", "-c", "small", "-o", "full"], "full"),
        (["eval", "answers", "samples", "nowhere.jsonl", "-c", "small", "-o", "out"], "nowhere.jsonl"),
        (["eval", "draw", "nowhere.jsonl", "-c", "small", "-o", "out"], "nowhere.jsonl"),
        (["eval", "pictures", "full", "full", "-o", "full"], "full"),
        (["bench", "--cpu-memory", "much"], "much"),
        (["bench", "-c", "other"], "llama"),
        (["ui", "--max-file-size", "much"], "much"),
    ],
    ids=lambda value: " ".join(value).replace(CT, "ct.png") if isinstance(value, list) else "",
)
def test_mistakes_are_told_without_torch(place, arguments, value):
    code, modules, said = imports(place, *arguments)
    assert code == 1 and value in said and "Traceback" not in said, said
    assert "torch" not in modules
    assert not (place / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [["ask", CT, "What is this?", "--max-new-tokens", "2"], ["draw", CT, "Reconstruct the image.", "-o", "drawn.png"]],
    ids=["ask", "draw"],
)
def test_answers_and_drawings_import_what_they_use(place, arguments):
    code, modules, said = imports(place, *arguments)
    assert code == 0 and "torch" in modules, said
    assert not modules & UNUSED


@pytest.mark.parametrize("name", ["m3", "l14", "xl32"])
def test_headers_count_as_many_parameters_as_the_model_has(checkpoints, name):
    folder = checkpoints(name).folder
    assert count_stored(str(folder), read_settings(folder)) == count_parameters(
        HealthGPTConfig.from_pretrained(folder)
    )
