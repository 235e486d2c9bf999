"""The page in a real browser, with the small model: what people see, and what they must not see of each other."""

import math
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

import gradio as gr
import pytest
import torch
from conftest import GOLDEN
from matplotlib.figure import Figure
from PIL import Image
from playwright.sync_api import expect, sync_playwright
from pydicom.data import get_testdata_file
from typer.testing import CliRunner

from healthgpt.app.cli import app, main
from healthgpt.app.common import NANO
from healthgpt.app.common import load as load_checkpoint
from healthgpt.app.page import build, serve
from healthgpt.app.runner import Runner
from healthgpt.conversations import prepare
from healthgpt.explain import attention_over_pictures, plots
from healthgpt.phantoms.samples import INSTRUCTIONS, drawing_sample

SCREENSHOTS = Path(__file__).parents[2] / "build/screenshots"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CT, RETINA = (str(GOLDEN / f"images/{name}.png") for name in ("ct", "retina"))
QUESTION = "Describe this picture."
expect.set_options(timeout=60_000)
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def command_line(*arguments):
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    return result.stdout


class Served:
    """The page, served from this process. Steps of its model are counted, and can be slowed down or held at one."""

    def __init__(self):
        self.model, self.processor = load_checkpoint(NANO, "cpu", None)
        self.steps, self.pause, self.last = 0, 0.0, math.inf
        self.model.register_forward_pre_hook(self.step)
        self.page = serve(Runner(self.model, self.processor), "127.0.0.1", free_port(), with_examples=True)

    def hold_after(self, steps):
        self.steps, self.last = 0, steps

    def step(self, *inputs):
        self.steps += 1
        time.sleep(self.pause)
        while self.steps > self.last:
            time.sleep(0.01)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
        served = Served()
        yield served
        served.page.close()


@pytest.fixture(scope="module")
def chromium():
    if BROWSER is None:
        stop = pytest.fail if os.environ.get("REQUIRE_BROWSER") else pytest.skip
        stop("There is no Chromium; make's target browser installs it where there is apt-get.")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def ct_answer():
    return command_line("ask", CT, QUESTION).strip()


@pytest.fixture
def visit(served, chromium):
    """Opens the page as somebody new; whoever visits must not be sent anywhere else."""
    visitors, requests = [], []

    def open_page(**options):
        page = chromium.new_context(**{"viewport": {"width": 1280, "height": 800}, **options}).new_page()
        page.set_default_timeout(60_000)
        visitors.append(page.context)
        page.on("request", lambda request: requests.append(request.url))
        page.goto(served.page.local_url)
        expect(prompt(page)).to_be_visible()
        return page

    yield open_page
    served.pause, served.last = 0.0, math.inf
    for visitor in visitors:
        visitor.close()
    assert requests
    assert all(url.startswith((served.page.local_url, "data:", "blob:")) for url in requests)


def prompt(page):
    return page.locator("textarea:visible")


def panel(page):
    """The tab that is open."""
    return page.get_by_role("tabpanel")


def attach(page, *files):
    panel(page).locator("input[type=file]").set_input_files(files)
    expect(panel(page).locator(".thumbnail-item")).to_have_count(len(files))


def send(page, text, *files):
    if files:
        attach(page, *files)
    prompt(page).fill(text)
    prompt(page).press("Enter")


def answers(page):
    return page.locator("[data-testid=bot]")


def progress(page):
    return panel(page).locator(".block.progress")


def finished(page):
    expect(panel(page).get_by_label("Submit")).to_be_visible(timeout=20_000)


def keep(page, name):
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png")


def test_an_answer_grows_into_what_the_command_line_answers(visit, served, ct_answer):
    page = visit()
    served.hold_after(4)
    send(page, QUESTION, CT)
    expect(answers(page)).to_have_text(re.compile("."))
    assert ct_answer.startswith(answers(page).inner_text()) and answers(page).inner_text() != ct_answer
    served.last = math.inf
    expect(answers(page)).to_have_text(ct_answer)
    finished(page)
    keep(page, "chat")

    send(page, "Which organ does this show?")
    expect(answers(page)).to_have_count(2)
    picture = {"type": "image", "image": CT}
    messages = [
        {"role": "user", "content": [picture, {"type": "text", "text": QUESTION}]},
        {"role": "assistant", "content": ct_answer},
        {"role": "user", "content": "Which organ does this show?"},
    ]
    *_, second = Runner(served.model, served.processor).answer(messages, "comprehension", max_new_tokens=64)
    expect(answers(page).last).to_have_text(second)


@pytest.mark.parametrize(("example", "instruction"), [(0, "Turn this CT into an MRI."), (4, "Draw a chest X-ray.")])
def test_a_picture_appears_row_by_row_and_is_the_models(visit, served, tmp_path, example, instruction):
    page = visit()
    page.get_by_role("tab", name="Draw").click()
    panel(page).locator(".gallery-item").nth(example).click()
    expect(prompt(page)).to_have_value(re.compile(instruction))
    served.hold_after(8)
    prompt(page).press("Enter")
    expect(progress(page)).to_have_text("Row 1 of 8")
    served.hold_after(20)
    expect(progress(page)).to_have_text("Row 3 of 8")
    served.last = math.inf
    expect(progress(page)).to_have_text("64 x 64 pixels")
    finished(page)
    with page.expect_download() as download:
        panel(page).get_by_text("Download").click()
    download.value.save_as(tmp_path / "page.png")

    sample = drawing_sample("test", 0, tuple(INSTRUCTIONS)[example])
    given = [tmp_path / "given.png"] if sample["input_image"] else []
    for path in given:
        sample["input_image"].save(path)
    command_line("draw", *given, sample["instruction"], "-o", tmp_path / "line.png")
    assert Image.open(tmp_path / "page.png").tobytes() == Image.open(tmp_path / "line.png").tobytes()
    expect(page.locator("#slider img")).to_have_count(2 if given else 0)
    expect(page.locator("#drawing img")).to_have_count(0 if given else 1)
    keep(page, f"draw-{example}")


def test_sampling_follows_its_settings_and_its_seed(visit, served):
    page = visit()
    page.get_by_role("tab", name="Draw").click()
    panel(page).get_by_role("button", name="Settings").click()
    panel(page).get_by_label("Sample").check()
    panel(page).get_by_label("number input for Top p").fill("0.9")
    panel(page).get_by_label("Seed").fill("7")
    send(page, "Draw a chest X-ray.")
    expect(progress(page)).to_have_text("64 x 64 pixels")
    keep(page, "settings")
    with page.expect_download() as download:
        panel(page).get_by_text("Download").click()

    inputs = prepare(served.processor, [{"role": "user", "content": "Draw a chest X-ray."}], "generation")
    torch.manual_seed(7)
    sequences = served.model.generate(**inputs, task="generation", do_sample=True, temperature=1.0, top_p=0.9)
    pixels = served.model.decode_image_tokens(sequences)
    [drawn] = served.processor.post_process_multimodal_output(pixels, generation_mode="image")
    assert Image.open(download.value.path()).tobytes() == drawn.tobytes()


def test_a_runner_that_is_closed_ends_its_drawing(served):
    runner = Runner(served.model, served.processor)
    served.steps, served.pause = 0, 0.05
    drawing = runner.draw([{"role": "user", "content": "Draw a chest X-ray."}], "generation")
    assert next(drawing)[1] == 1
    runner.close()
    served.pause = 0.0
    assert 8 <= served.steps < 64
    assert all(rows < 8 for _, rows in drawing)


@pytest.mark.parametrize("leave", ["stop", "close"])
def test_who_stops_or_leaves_ends_the_drawing(visit, served, ct_answer, leave):
    page = visit()
    page.get_by_role("tab", name="Draw").click()
    served.hold_after(12)
    send(page, "Draw a chest X-ray.")
    expect(progress(page)).to_have_text("Row 1 of 8")
    served.pause, served.last = 0.2, math.inf
    if leave == "stop":
        panel(page).get_by_label("Stop").click()
        finished(page)
    else:
        page.close()
    steps = -1
    while steps < served.steps:
        steps = served.steps
        time.sleep(1)
    assert 8 <= steps < 64
    served.pause = 0.0
    after = visit()
    send(after, QUESTION, CT)
    expect(answers(after)).to_have_text(ct_answer)


def test_mistakes_are_answered_in_one_sentence(visit, ct_answer, tmp_path):
    page = visit()
    (tmp_path / "notes.png").write_text("These are notes.")
    for files, text, sentence in (
        (
            [tmp_path / "notes.png"],
            QUESTION,
            "'notes.png' is not a picture that can be read: it is neither DICOM nor NIfTI",
        ),
        ([CT], "", "The last message has no text, which task 'comprehension' needs."),
        ([CT, RETINA] * 4, QUESTION, "but the model's window is"),
    ):
        send(page, text, *files)
        expect(page.get_by_role("status").last).to_contain_text(sentence)
        finished(page)
        expect(prompt(page)).to_have_value(text)
        expect(answers(page)).to_have_count(0)
        keep(page, f"mistake-{len(files)}")
        page.reload()
    send(page, QUESTION, CT)
    expect(answers(page)).to_have_text(ct_answer)


def test_a_dicom_file_is_read_as_on_the_command_line(visit):
    page = visit()
    path = get_testdata_file("MR_small.dcm", download=False)
    send(page, QUESTION, path)
    expect(answers(page)).to_have_text(command_line("ask", path, QUESTION).strip())


def test_the_last_answer_can_be_looked_into(visit, ct_answer):
    page = visit()
    page.get_by_role("button", name="Look inside the last answer").click()
    page.get_by_role("button", name="Show experts and attention").click()
    expect(page.get_by_role("status").last).to_contain_text("There is no answer to look inside yet")
    send(page, QUESTION, CT)
    expect(answers(page)).to_have_text(ct_answer)
    page.get_by_role("button", name="Show experts and attention").click()
    for title in ("Experts", "Picture 1"):
        expect(page.locator("#inside").get_by_text(title)).to_be_visible()
    keep(page, "inside")


def test_what_an_answer_looked_at_is_that_of_its_own_tokens(served, monkeypatch):
    """The tokens of a shown answer are found again: the figure is that of the sequences that `generate` wrote."""
    picture = Image.open(CT)
    content = [{"type": "image", "image": picture}, {"type": "text", "text": QUESTION}]
    messages = [{"role": "user", "content": content}]
    inputs = prepare(served.processor, messages, "comprehension")
    sequences = served.model.generate(**inputs)[:, :-1]
    expected = attention_over_pictures(served.model, inputs, sequences)
    drawn = []
    monkeypatch.setattr(plots, "plot_attention", lambda *given: drawn.append(given[2]) or Figure())
    answer = served.processor.decode(sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    titles = [title for _, title in Runner(served.model, served.processor).explain(messages, answer, "comprehension")]
    assert titles == ["Experts", "Picture 1"]
    torch.testing.assert_close(drawn[0], expected[0])


def test_two_people_at_once_get_their_own_answers(visit, served):
    pages = {CT: visit(), RETINA: visit()}
    served.hold_after(2)
    send(pages[CT], QUESTION, CT)
    expect(answers(pages[CT])).to_have_count(1)
    send(pages[RETINA], QUESTION, RETINA)
    expect(progress(pages[RETINA])).to_contain_text("queue: 1/1")
    served.last = math.inf
    for path, page in pages.items():
        expect(answers(page)).to_have_text(command_line("ask", path, QUESTION).strip())
        expect(page.locator("[data-testid=user]")).to_have_count(2)
        expect(page.locator("[data-testid=user] img")).to_have_count(1)
    pictures = [page.locator("[data-testid=user] img").get_attribute("src") for page in pages.values()]
    assert len(set(pictures)) == 2


def test_on_a_phone_nothing_scrolls_sideways_and_the_note_stays(visit):
    page = visit(**PHONE)
    for name in ("Chat", "Draw"):
        page.get_by_role("tab", name=name).tap()
        panel(page).get_by_role("button", name="Settings").tap()
        panel(page).get_by_label("Sample").check()
        panel(page).locator(".gallery-item").nth(1).tap()
        expect(prompt(page)).not_to_have_value("")
        prompt(page).press("Enter")
        result = answers(page) if name == "Chat" else progress(page).get_by_text("64 x 64 pixels")
        expect(result).to_be_visible()
        finished(page)
        page.mouse.wheel(0, 5000)
        expect(page.get_by_text("not a medical device")).to_be_in_viewport(ratio=1)
        assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
        page.evaluate("scrollTo(0, 0)")
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            keep(page, f"phone-{name}-{scheme}")


def test_the_keyboard_is_enough(visit, ct_answer):
    page = visit()
    page.on("filechooser", lambda chooser: chooser.set_files(CT))
    expect(prompt(page)).to_be_focused()
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    expect(panel(page).locator(".thumbnail-item")).to_have_count(1)
    page.keyboard.press("Tab")
    while not prompt(page).evaluate("node => node === document.activeElement"):
        page.keyboard.press("Tab")
    page.keyboard.type(QUESTION)
    page.keyboard.press("Enter")
    expect(answers(page)).to_have_text(ct_answer)


def test_a_tab_without_tasks_is_not_shown(load):
    tabs = {name: build(Runner(*load(name)), with_examples=False) for name in ("l14", "m3")}
    labels = {
        name: [block.label for block in page.blocks.values() if isinstance(block, gr.Tab)]
        for name, page in tabs.items()
    }
    assert labels == {"l14": ["Chat"], "m3": ["Chat", "Draw"]}


def test_the_command_serves_until_it_is_ended_and_leaves_nothing(tmp_path):
    port = free_port()
    script = "from healthgpt.app.cli import main; main()"
    environment = {**os.environ, "TMPDIR": str(tmp_path), "GRADIO_SHARE": "True"}
    command = [sys.executable, "-c", script, "ui", "--port", str(port), "--device", "cpu"]
    process = subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert process.stdout.readline() == f"The page is at http://127.0.0.1:{port}/ until Ctrl-C.\n"
        with urlopen(f"http://127.0.0.1:{port}/") as answer:
            assert b"HealthGPT" in answer.read()
        assert [path.name[:13] for path in tmp_path.iterdir()] == ["healthgpt-ui-"]
        process.terminate()
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, "Traceback" in errors, list(tmp_path.iterdir())) == (0, False, []), output + errors


def test_a_port_that_is_taken_is_refused(monkeypatch, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr(sys, "argv", ["healthgpt", "ui", "--port", str(port)])
        monkeypatch.setenv("GRADIO_TEMP_DIR", "")  # which the command changes: put back afterwards
        with pytest.raises(SystemExit):
            main()
    assert f"Error: Port {port} of 127.0.0.1 is taken or not of this machine: choose" in capsys.readouterr().err


def test_without_gradio_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "healthgpt.app.page")
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    monkeypatch.setattr(sys, "argv", ["healthgpt", "ui"])
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().err == "Error: this needs gradio: pip install healthgpt[ui].\n"
