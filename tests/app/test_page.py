"""What the page is built of, without a browser: test_browser.py shows it in one."""

import shutil

import gradio as gr
import pytest
import torch
from conftest import GOLDEN
from PIL import Image
from pydicom.data import get_testdata_file

from healthgpt.app.common import load as load_checkpoint
from healthgpt.app.page import Handlers, build
from healthgpt.app.runner import Runner
from healthgpt.hub_export.plugins import add_plugin, extract_plugin
from healthgpt.medical import open_picture

CT = str(GOLDEN / "images/ct.png")
VOLUME = get_testdata_file("examples_ybr_color.dcm", download=False)  # 30 frames
GREEDY = (False, 1, 1, 0)


@pytest.fixture
def two_text_tasks(checkpoints, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoints("m3").folder, folder)
    extract_plugin(folder, "comprehension", tmp_path / "plugin")
    add_plugin(folder, tmp_path / "plugin", name="reports")
    return Runner(*load_checkpoint(str(folder), "cpu", None))


@pytest.fixture
def handlers(load, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    return Handlers(Runner(*load("m3")))


def chat(handlers, text, *paths, history=(), task="comprehension", frame=""):
    """The chat and what is remembered of its last answer, once it is whole."""
    *_, (_, shown, answered, _) = handlers.chat({"text": text, "files": paths}, history, task, 8, frame, *GREEDY)
    return shown, answered


def refusal(function):
    """The sentence that the page shows in place of what a handler gives."""
    with pytest.raises(gr.Error) as error:
        function()
    assert not error.value.print_exception
    return error.value.message


def choices(page):
    """The choices of the task picker in every tab."""
    found = {block.label: None for block in page.blocks.values() if isinstance(block, gr.Tab)}
    for block in page.blocks.values():
        if isinstance(block, gr.Dropdown):
            tab = block.parent
            while not isinstance(tab, gr.Tab):
                tab = tab.parent
            found[tab.label] = [name for _, name in block.choices]
    return found


def test_a_tab_has_the_tasks_that_belong_there(two_text_tasks, load):
    page = build(two_text_tasks, with_examples=False)
    assert choices(page) == {"Chat": ["comprehension", "reports"], "Draw": ["generation"]}
    assert choices(build(Runner(*load("l14")), with_examples=False)) == {"Chat": ["comprehension"]}


def test_the_task_that_answered_is_the_one_that_is_looked_into(two_text_tasks, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    handlers = Handlers(two_text_tasks)
    shown, answered = chat(handlers, "What is this?", CT, task="reports")
    assert answered[0] == "reports"
    assert [title for _, title in handlers.explain(shown, answered)] == ["Experts", "Picture 1"]


def test_an_answer_is_looked_into_with_or_without_pictures_or_there_is_none(handlers):
    sentence = refusal(lambda: handlers.explain([], None))
    assert sentence == "There is no answer to look inside yet: ask a question first."
    shown, answered = chat(handlers, "Hello")
    assert [title for _, title in handlers.explain(shown, answered)] == ["Experts"]
    shown, answered = chat(handlers, "What is this?", CT, history=shown)
    assert [title for _, title in handlers.explain(shown, answered)] == ["Experts", "Picture 1"]


@pytest.mark.parametrize(("frame", "number"), [("", 15), (" 0 ", 0)])
def test_the_frame_that_is_asked_for_is_read(frame, number, handlers):
    expected = open_picture(VOLUME, number).convert("RGB")
    shown, _ = chat(handlers, "What is this?", VOLUME, frame=frame)
    with Image.open(shown[0]["content"][0]["file"]["path"]) as picture:
        assert picture.tobytes() == expected.tobytes()
    prompt = {"text": "Turn this CT into an MRI.", "files": [VOLUME]}
    sliders = (slider for slider, *_ in handlers.draw(prompt, "generation", frame, *GREEDY))
    given, drawn = next(slider for slider in sliders if isinstance(slider, tuple))
    assert given.tobytes() == expected.resize(drawn.size, Image.Resampling.LANCZOS).tobytes()


@pytest.mark.parametrize(
    ("frame", "sentence"),
    [
        ("-1", "examples_ybr_color.dcm has no frame -1: it has 30, numbered from 0 to 29."),
        ("30", "examples_ybr_color.dcm has no frame 30: it has 30, numbered from 0 to 29."),
        ("1.5", "The frame is a whole number from 0, and not '1.5'."),
    ],
)
def test_a_frame_that_is_not_there_is_refused(frame, sentence, handlers):
    prompt = {"text": "Draw.", "files": [VOLUME]}
    for ask in (
        lambda: chat(handlers, "What is this?", VOLUME, frame=frame),
        lambda: list(handlers.draw(prompt, "generation", frame, *GREEDY)),
    ):
        assert refusal(ask) == sentence


def test_too_little_memory_is_one_sentence(handlers, monkeypatch):
    def generate(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(handlers.runner.model, "generate", generate)
    assert refusal(lambda: chat(handlers, "What is this?", CT)).startswith(
        "The device has too little memory for this: "
    )


def test_an_ended_server_says_so(handlers):
    shown, answered = chat(handlers, "Hello")
    handlers.runner.close()
    prompt = {"text": "Draw.", "files": []}
    for ask in (
        lambda: chat(handlers, "Hello"),
        lambda: list(handlers.draw(prompt, "generation", "", *GREEDY)),
        lambda: handlers.explain(shown, answered),
    ):
        assert refusal(ask) == "The server is being ended."
