"""`healthgpt explain`: the greedy answer, and figures that are whole, in a folder with no others."""

import json
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import GOLDEN
from PIL import Image
from transformers import AutoProcessor
from typer.testing import CliRunner

import healthgpt.explain
from healthgpt.app import explain as command
from healthgpt.app.cli import app
from healthgpt.explain import plots


def explain(*arguments):
    return CliRunner().invoke(app, ["explain", *map(str, arguments)])


@pytest.fixture(scope="module")
def folder(checkpoints):
    return checkpoints("m3").folder


def answer_of(case, folder):
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    return processor.decode(case["generated_ids"], skip_special_tokens=True).strip()


@pytest.mark.parametrize(("index", "names"), [(3, ["attention_0.png", "attention_1.png"]), (2, [])])
def test_the_routers_and_every_picture_are_drawn(index, names, folder, checkpoints, tmp_path):
    case, output = checkpoints("m3").cases[index], tmp_path / "a/b"
    pictures = [GOLDEN / f"images/{name}.png" for name in case["image"] or []]
    result = explain("-c", folder, *pictures, case["question"], "-o", output)
    figures = [output / name for name in ["routing.png", *names]]
    assert result.stdout == "\n".join([answer_of(case, folder), *map(str, figures)]) + "\n", result.output
    assert sorted(output.iterdir()) == sorted(figures)
    for figure in figures:
        with Image.open(figure) as picture:
            picture.load()
            assert picture.width > 100


def test_the_answer_is_greedy_whatever_the_checkpoint_says(folder, checkpoints, tmp_path):
    case = checkpoints("m3").cases[3]
    shutil.copytree(folder, tmp_path / "sampling")
    path = tmp_path / "sampling/generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"do_sample": True, "temperature": 100.0}))
    pictures = [GOLDEN / f"images/{name}.png" for name in case["image"]]
    options = ["-c", tmp_path / "sampling", "-o", tmp_path / "out", "--json"]
    assert json.loads(explain(*pictures, case["question"], *options).stdout)["answer"] == answer_of(case, folder)


def test_all_that_takes_time_is_shown(folder, tmp_path, monkeypatch):
    shown, during = [], {}

    @contextmanager
    def working(what):
        shown.append(what)
        yield
        shown.remove(what)

    monkeypatch.setattr(command, "working", working)
    parts = [(healthgpt.explain, "look_inside"), (plots, "plot_inside"), (plots, "as_picture")]
    for module, name in parts:
        function = getattr(module, name)

        def call(*arguments, name=name, function=function):
            during[name] = list(shown)
            return function(*arguments)

        monkeypatch.setattr(module, name, call)
    explain("-c", folder, "What?", "-o", tmp_path / "out")
    assert during == {name: ["Looking inside"] for _, name in parts}


def test_a_figure_is_there_whole_or_not_at_all(folder, tmp_path, monkeypatch):
    def kill(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", kill)  # the last step of writing a file
    assert explain("-c", folder, "What?", "-o", tmp_path / "out").exit_code == 130
    assert not list((tmp_path / "out").iterdir())


def test_a_folder_that_cannot_be_made_is_refused_before_the_model_is_loaded(tmp_path):
    (tmp_path / "file").touch()
    result = explain("-c", "nano", "What?", "-o", tmp_path / "file/out")
    assert str(result.exception) == f"{tmp_path / 'file/out'} cannot be made: Not a directory."


def test_figures_are_not_mixed_with_what_is_there(folder, tmp_path):
    (tmp_path / "attention_1.png").write_bytes(b"old")
    for output, message in (
        (tmp_path, f"The folder {tmp_path} is not empty: name a new or empty one"),
        (tmp_path / "attention_1.png", "attention_1.png is a file: name a folder"),
    ):
        assert message in str(explain("-c", folder, "What?", "-o", output).exception)
    assert [path.name for path in tmp_path.iterdir()] == ["attention_1.png"]
    (tmp_path / "empty").mkdir()
    assert explain("-c", folder, "What?", "-o", tmp_path / "empty").exit_code == 0
