"""The page in a real browser, with the small model: what people see, and what they must not see of each other."""

import io
import os
import re
import shutil
import threading
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image
from playwright.sync_api import expect, sync_playwright
from pydicom.data import get_testdata_file
from test_runner import Steps
from test_ui import kept_port
from typer.testing import CliRunner

from healthgpt.app.cli import app
from healthgpt.app.common import NANO
from healthgpt.app.common import load as load_checkpoint
from healthgpt.app.page import serve
from healthgpt.app.runner import Runner
from healthgpt.conversations import conversation, prepare
from healthgpt.explain import plots
from healthgpt.medical import open_picture
from healthgpt.phantoms.samples import INSTRUCTIONS, drawing_sample

SCREENSHOTS = Path(__file__).parents[2] / "build/screenshots"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CT, RETINA = (str(GOLDEN / f"images/{name}.png") for name in ("ct", "retina"))
QUESTION = "Describe this picture."
expect.set_options(timeout=60_000)
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}


def command_line(*arguments):
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    return result.stdout


class Served:
    """The page, served from this process, and the steps of its model."""

    def __init__(self, port):
        model, processor = load_checkpoint(NANO, "cpu", None)
        model.generation_config.codes_per_pass = 1  # a step for each code
        self.steps = Steps(model)
        self.runner = Runner(model, processor)
        self.page = serve(self.runner, "127.0.0.1", port, with_examples=True)
        self.url = self.page.local_url


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch, kept_port() as port:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
        served = Served(port)
        yield served
        served.runner.close()
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
        page.goto(served.url)
        expect(prompt(page)).to_be_visible()
        return page

    yield open_page
    served.steps.release()
    for visitor in visitors:
        visitor.close()
    assert requests
    assert all(url.startswith((served.url, "data:", "blob:")) for url in requests)


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
    expect(panel(page).get_by_label("Submit")).to_be_visible()


def keep(page, name):
    page.evaluate("Promise.allSettled([...document.images].map(image => image.decode()))")
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png")


def test_an_answer_grows_into_what_the_command_line_answers(visit, served, ct_answer):
    page = visit()
    served.steps.hold_after(4)
    send(page, QUESTION, CT)
    expect(answers(page)).to_have_text(re.compile("."))
    assert ct_answer.startswith(answers(page).inner_text()) and answers(page).inner_text() != ct_answer
    served.steps.release()
    expect(answers(page)).to_have_text(ct_answer)
    finished(page)
    expect(prompt(page)).to_have_value("")
    keep(page, "chat")

    send(page, "Which organ does this show?")
    expect(answers(page)).to_have_count(2)
    picture = {"type": "image", "image": CT}
    messages = [
        {"role": "user", "content": [picture, {"type": "text", "text": QUESTION}]},
        {"role": "assistant", "content": ct_answer},
        {"role": "user", "content": "Which organ does this show?"},
    ]
    *_, (second, _) = served.runner.answer(messages, "comprehension", max_new_tokens=64)
    expect(answers(page).last).to_have_text(second)


@pytest.mark.parametrize(("example", "instruction"), [(0, "Turn this CT into an MRI."), (4, "Draw a chest X-ray.")])
def test_a_picture_appears_row_by_row_and_is_the_models(visit, served, tmp_path, example, instruction):
    page = visit()
    page.get_by_role("tab", name="Draw").click()
    panel(page).locator(".gallery-item").nth(example).click()
    expect(prompt(page)).to_have_value(re.compile(instruction))
    served.steps.hold_after(8)
    prompt(page).press("Enter")
    expect(progress(page)).to_have_text("Row 1 of 8")
    served.steps.hold_after(20)
    expect(progress(page)).to_have_text("Row 3 of 8")
    served.steps.release()
    expect(progress(page)).to_have_text("64 x 64 pixels")
    finished(page)
    with page.expect_download() as download:
        panel(page).get_by_text("Download").click()
    download.value.save_as(tmp_path / "page.png")

    sample = drawing_sample("test", 0, tuple(INSTRUCTIONS)[example])
    given = [tmp_path / "given.png"] if sample["input_image"] else []
    for path in given:
        sample["input_image"].save(path)
    command_line("draw", *given, sample["instruction"], "-o", tmp_path / "line.png", "--codes-per-pass", 1)
    drawn = Image.open(tmp_path / "line.png").tobytes()
    assert Image.open(tmp_path / "page.png").tobytes() == drawn
    expect(page.locator("#slider img")).to_have_count(2 if given else 0)
    expect(page.locator("#drawing img")).to_have_count(0 if given else 1)
    shown = page.request.get(page.locator("#slider img, #drawing img").last.get_attribute("src"))
    assert Image.open(io.BytesIO(shown.body())).tobytes() == drawn
    expect(page.get_by_role("tab")).to_have_text(["Chat", "Draw"])
    keep(page, f"draw-{example}")


def test_sampling_follows_its_settings_and_its_seed(visit, served):
    page = visit()
    page.get_by_role("tab", name="Draw").click()
    panel(page).get_by_role("button", name="Settings").click()
    panel(page).get_by_label("Sample").check()
    panel(page).get_by_label("number input for Temperature").fill("0.5")
    panel(page).get_by_label("number input for Top p").fill("0.9")
    panel(page).get_by_label("Seed").fill("7")
    send(page, "Draw a chest X-ray.")
    expect(progress(page)).to_have_text("64 x 64 pixels")
    keep(page, "settings")
    with page.expect_download() as download:
        panel(page).get_by_text("Download").click()

    messages = [{"role": "user", "content": "Draw a chest X-ray."}]
    inputs = prepare(served.runner.processor, messages, "generation")

    def drawn(**options):
        torch.manual_seed(7)
        sequences = served.runner.model.generate(**inputs, task="generation", do_sample=True, **options)
        pixels = served.runner.model.decode_image_tokens(sequences)
        [picture] = served.runner.processor.post_process_multimodal_output(pixels, generation_mode="image")
        return picture.tobytes()

    expected = drawn(temperature=0.5, top_p=0.9)
    assert Image.open(download.value.path()).tobytes() == expected
    assert expected != drawn(temperature=1.0, top_p=0.9)


@pytest.mark.parametrize("leave", ["stop", "close"])
def test_who_stops_or_leaves_ends_the_drawing(visit, served, ct_answer, leave):
    page = visit()
    page.get_by_role("tab", name="Draw").click()
    served.steps.hold_after(12)
    send(page, "Draw a chest X-ray.")
    expect(progress(page)).to_have_text("Row 1 of 8")
    served.steps.release(pause=0.2)
    if leave == "stop":
        panel(page).get_by_label("Stop").click()
        finished(page)
    else:
        page.close()
    served.runner.thread.submit(int).result(120)  # the drawing has ended
    assert 12 <= served.steps.count < 20  # some before the request to stop has come, and not the rest of the row
    served.steps.release()
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
    path = get_testdata_file("examples_ybr_color.dcm", download=False)  # 30 frames
    panel(page).get_by_role("button", name="Settings").click()
    frame = panel(page).get_by_label("Frame")
    expect(frame).to_have_value("")
    frame.fill("30")
    send(page, QUESTION, path)
    expect(page.get_by_role("status").last).to_contain_text("has no frame 30: it has 30, numbered from 0 to 29.")
    frame.fill("")
    prompt(page).press("Enter")
    expect(answers(page)).to_have_text(command_line("ask", path, QUESTION).strip())


def figures(page):
    return page.locator("#inside button img")


def test_the_last_answer_can_be_looked_into(visit, served, ct_answer):
    page = visit()
    page.get_by_role("button", name="Look inside the last answer").click()
    look = page.get_by_role("button", name="Show experts and attention")
    look.click()
    expect(page.get_by_role("status").last).to_contain_text("There is no answer to look inside yet")
    served.steps.hold_after(2)
    send(page, QUESTION, CT)
    expect(answers(page)).to_have_count(1)
    expect(look).to_be_disabled()
    served.steps.release()
    expect(answers(page)).to_have_text(ct_answer)
    look.click()
    for title in ("Experts", "Picture 1"):
        expect(page.locator("#inside").get_by_text(title)).to_be_visible()
    expect(figures(page)).to_have_count(2)
    keep(page, "inside")

    send(page, "Which organ does this show?")
    expect(answers(page)).to_have_count(2)
    expect(figures(page)).to_have_count(0)
    finished(page)
    look.click()
    expect(figures(page)).to_have_count(2)
    page.locator("#chat").get_by_label("Clear").click()
    expect(figures(page)).to_have_count(0)
    look.click()
    expect(page.get_by_role("status").last).to_contain_text("There is no answer to look inside yet")


def test_a_chat_that_is_cleared_while_it_is_answered_stays_empty(visit, served):
    page = visit()
    served.steps.hold_after(2)
    send(page, QUESTION, CT)
    expect(answers(page)).to_have_count(1)

    def end_the_answer_first(route):
        served.steps.release()
        served.runner.thread.submit(int).result(120)
        route.continue_()

    page.route("**/run/predict*", end_the_answer_first)
    page.locator("#chat").get_by_label("Clear").click()
    expect(answers(page)).to_have_count(0)
    finished(page)
    page.get_by_role("button", name="Look inside the last answer").click()
    page.get_by_role("button", name="Show experts and attention").click()
    expect(page.get_by_role("status").last).to_contain_text("There is no answer to look inside yet")
    expect(page.locator("#chat [data-testid=user]")).to_have_count(0)
    send(page, "Hello")
    expect(answers(page)).to_have_count(1)


def test_figures_that_come_after_the_next_question_are_not_shown(visit, monkeypatch):
    released, done, as_picture = threading.Event(), threading.Event(), plots.as_picture

    def held(figure):
        assert released.wait(60)
        try:
            return as_picture(figure)
        finally:
            done.set()

    monkeypatch.setattr(plots, "as_picture", held)
    page = visit()
    send(page, "Hello")
    finished(page)
    page.get_by_role("button", name="Look inside the last answer").click()
    page.get_by_role("button", name="Show experts and attention").click()
    send(page, QUESTION, CT)
    expect(answers(page)).to_have_count(2)
    finished(page)
    released.set()
    assert done.wait(60)
    page.wait_for_timeout(2000)
    expect(figures(page)).to_have_count(0)


def test_two_people_at_once_get_their_own_answers(visit, served):
    pages = {CT: visit(), RETINA: visit()}
    served.steps.hold_after(2)
    send(pages[CT], QUESTION, CT)
    expect(answers(pages[CT])).to_have_count(1)
    send(pages[RETINA], QUESTION, RETINA)
    expect(progress(pages[RETINA])).to_contain_text("queue: 1/1")
    served.steps.release()
    for path, page in pages.items():
        expect(answers(page)).to_have_text(command_line("ask", path, QUESTION).strip())
        expect(page.locator("[data-testid=user]")).to_have_count(2)
        expect(page.locator("[data-testid=user] img")).to_have_count(1)
    pictures = [page.locator("[data-testid=user] img").get_attribute("src") for page in pages.values()]
    assert len(set(pictures)) == 2


def test_who_stops_in_the_queue_is_not_served(visit, served, ct_answer):
    first, second = visit(), visit()
    served.steps.hold_after(2)
    send(first, QUESTION, CT)
    expect(answers(first)).to_have_count(1)
    send(second, QUESTION, RETINA)
    expect(progress(second)).to_contain_text("queue: 1/1")
    panel(second).get_by_label("Stop").click()
    finished(second)
    served.steps.release()
    expect(answers(first)).to_have_text(ct_answer)
    finished(first)
    send(first, QUESTION, RETINA)  # it would wait for the second one
    expect(answers(first)).to_have_count(2)
    finished(first)
    expect(answers(second)).to_have_count(0)


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


def test_programs_ask_with_the_settings_of_the_page(served):
    path = get_testdata_file("examples_ybr_color.dcm", download=False)  # 30 frames
    client = Client(served.url, download_files=False, verbose=False)

    def ask(length, frame):
        prompt, settings = {"text": QUESTION, "files": [handle_file(path)]}, [False, 1, 1, 0]
        return client.predict(prompt, [], "comprehension", length, frame, *settings, api_name="/chat")

    _, chat, _ = ask(length=3, frame="0")
    messages = conversation([open_picture(path, 0)], QUESTION)
    *_, (expected, ids) = served.runner.answer(messages, "comprehension", max_new_tokens=3)
    assert len(ids) == 3 and chat[-1]["content"][0]["text"] == expected
    shown = client.predict(chat, api_name="/explain")
    assert [figure["caption"] for figure in shown] == ["Experts", "Picture 1"]
    with pytest.raises(
        AppError, match=r"^examples_ybr_color.dcm has no frame 30: it has 30, numbered from 0 to 29\.$"
    ):
        ask(length=3, frame="30")
