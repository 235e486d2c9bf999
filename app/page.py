"""The page of `healthgpt ui`: a tab to chat about pictures and a tab to draw them, each if the checkpoint has tasks for it."""

import html
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path

import gradio as gr
from gradio import route_utils
from gradio.processing_utils import save_pil_to_cache
from gradio.utils import get_upload_folder
from PIL import Image
from starlette.middleware import Middleware

from ..errors_healthgpt import HealthGPTError
from ..images_healthgpt import load_picture
from ..medical import open_picture
from ..phantoms.demo import ASKED
from ..phantoms.samples import INSTRUCTIONS, comprehension_sample, drawing_sample
from ..refusals import memory
from .guard import Guard, NamelessParser, Page
from .runner import Runner

HEADER = """
<div class="bar">
  <h1>HealthGPT</h1><span class="name">{name}</span>
  <div class="note"><b>Research use only, not a medical device.</b>
  Nothing it says or draws may guide a diagnosis or a treatment.</div>
</div>
"""
CHAT_HINT = "### Ask about one or several pictures\nAttach them below, or take an example. Later questions may refer to earlier ones."
HOUR = 3600
MAX_FILE_SIZE = 100 * 2**20  # bytes
# One generation at a time, whoever asks for it: the others wait in one queue and see their place.
GENERATION = {"concurrency_id": "model", "concurrency_limit": 1, "show_progress": "minimal"}
# Figures wait in the runner for the model alone, so that drawing them holds up nobody's generation.
FIGURES = {"concurrency_id": "figures", "concurrency_limit": 1, "show_progress": "minimal"}
CONTROL = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
THEME = gr.themes.Default(
    primary_hue="teal",
    secondary_hue="teal",
    neutral_hue="slate",
    radius_size="lg",
    font=("system-ui", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"),
    font_mono=("ui-monospace", "Menlo", "Consolas", "monospace"),
)


@contextmanager
def one_sentence():
    """Shows what is wrong with an input to whoever gave it, and a traceback to nobody."""
    try:
        with memory():
            yield
    except HealthGPTError as error:
        raise gr.Error(str(error), print_exception=False) from error


def sampling(sample: bool, temperature: float, top_p: float, seed: int | None) -> dict:
    """Options of a `Runner` for the values of `sampling_controls`."""
    if sample and seed is None:
        raise HealthGPTError("Sampling needs a seed, but the field is empty: give a whole number.")
    return {"temperature": temperature, "top_p": top_p, "seed": seed} if sample else {}


def frame_number(text: str) -> int | None:
    """The number in `frame_field`, `None` if it is empty."""
    if not text.strip():
        return None
    try:
        return int(text)
    except ValueError as error:
        raise HealthGPTError(f"The frame is a whole number from 0, and not {text!r}.") from error


class Handlers:
    """
    What the page does. They keep nothing of anybody: a chat lives in its browser and comes with every question. Gradio
    remembers, for each page that is open, by which task and with which ids the last answer was given.

    Args:
        runner (`Runner`): The model.
    """

    def __init__(self, runner: Runner):
        self.runner = runner
        self.image_size = runner.processor.image_size

    def read(self, path: str, frame: int | None = None) -> Image.Image:
        """The picture in a file as the model gets it: RGB, 8 bits."""
        try:
            return load_picture(open_picture(path, frame), self.image_size)
        except HealthGPTError as error:
            raise HealthGPTError(str(error).replace(path, Path(path).name)) from error

    def message(self, shown: dict) -> dict:
        """A message to the model of one that the chat shows, in which pictures are files."""
        content = [
            part if part["type"] == "text" else {"type": "image", "image": self.read(part["file"]["path"])}
            for part in shown["content"]
        ]
        return {"role": shown["role"], "content": content}

    def chat(self, prompt: dict, history: list[dict], task: str, max_new_tokens: int, frame: str, *controls):
        """
        Yields the emptied prompt, the chat with the answer so far, its task and ids, and emptied figures.

        All stay as they are until there is an answer.
        """
        with one_sentence():
            number = frame_number(frame)
            paths = [save(self.read(path, number), "picture") for path in prompt["files"]]
            files = [{"path": path, "orig_name": "picture.png", "mime_type": "image/png"} for path in paths]
            content = [*({"type": "file", "file": file} for file in files), {"type": "text", "text": prompt["text"]}]
            history = [*history, {"role": "user", "content": content}]
            messages = [self.message(shown) for shown in history]
            emptied = None
            options = {"max_new_tokens": max_new_tokens, **sampling(*controls)}
            for answer, ids in self.runner.answer(messages, task, **options):
                shown = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
                yield emptied, [*history, shown], (task, ids), emptied
                emptied = gr.skip()  # the next question may be being written

    def explain(self, history: list[dict], answered: tuple[str, list[int]] | None) -> list[tuple[Image.Image, str]]:
        """Figures of what the last answer rests on."""
        with one_sentence():
            if not history or answered is None:  # a token of an answer may come after its chat was cleared
                raise HealthGPTError("There is no answer to look inside yet: ask a question first.")
            task, ids = answered
            return self.runner.explain([self.message(shown) for shown in history[:-1]], ids, task)

    def draw(self, prompt: dict, task: str, frame: str, *controls):
        """Yields what slider, picture, progress and download show of the picture so far."""
        with one_sentence():
            number = frame_number(frame)
            given = [self.read(path, number) for path in prompt["files"]]
            content = [{"type": "image", "image": picture} for picture in given]
            messages = [{"role": "user", "content": [*content, {"type": "text", "text": prompt["text"]}]}]
            total, shown = self.runner.model.config.vqgan_config.grid_size, None
            nothing = gr.skip(), gr.skip()
            for picture, rows in self.runner.draw(messages, task, **sampling(*controls)):
                if shown is None:  # alone, since with a new picture Gradio may read the one before it back
                    yield gr.update(visible=bool(given)), gr.update(visible=not given), *nothing
                    shown = 0
                if rows == shown:
                    yield *nothing, *nothing
                    continue
                shown = rows
                pictures = gr.skip(), picture
                if given:
                    pictures = (given[0].resize(picture.size, Image.Resampling.LANCZOS), picture), gr.skip()
                yield *pictures, f"Row {rows} of {total}", gr.update(interactive=False)
            yield (
                *nothing,
                f"{picture.width} x {picture.height} pixels",
                gr.update(value=save(picture, "drawing"), interactive=True),
            )


def save(picture: Image.Image, name: str) -> str:
    """A file that the browser may fetch."""
    return save_pil_to_cache(picture, get_upload_folder(), name, "png")


def prompt_box(placeholder: str, autofocus: bool) -> gr.MultimodalTextbox:
    """Text and files, of any ending: DICOM files often have none."""
    return gr.MultimodalTextbox(
        file_count="multiple",
        placeholder=placeholder,
        show_label=False,
        autofocus=autofocus,
        max_plain_text_length=10**6,
    )


def offer_examples(prompt: gr.MultimodalTextbox, samples: Iterable[dict]) -> None:
    """A list of phantoms with their questions or instructions, which a click puts into the prompt."""
    pictures = [(sample["instruction"], sample["input_image"]) for sample in samples]
    prompts = [{"text": text, "files": [save(picture, "phantom")] if picture else []} for text, picture in pictures]
    with gr.Column(elem_classes="examples"):
        gr.Examples([[filled] for filled in prompts], prompt, label="Examples")


def task_picker(model, kind: str) -> gr.Dropdown:
    return gr.Dropdown([name for name, task in model.config.tasks.items() if task.kind == kind], label="Task")


def frame_field() -> gr.Textbox:
    """Not a `gr.Number`, which cannot be empty before somebody empties it."""
    info = "Frame, slice or page of files with several, from 0. Empty: the middle one, of pages the first."
    return gr.Textbox("", label="Frame", info=info, max_lines=1)


def sampling_controls() -> list:
    sample = gr.Checkbox(label="Sample", info="Off: the most likely words or codes, always the same.")
    with gr.Column(visible=False) as details:
        temperature = gr.Slider(0.1, 2, 1, step=0.05, label="Temperature")
        top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top p")
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**32 - 1)
    sample.change(lambda on: gr.update(visible=on), sample, details, **CONTROL)
    return [sample, temperature, top_p, seed]


def generate_on_submit(
    prompt, function, inputs: list, outputs: list, progress, name: str, resting=(), stops=()
) -> None:
    """
    Runs `function` when the prompt is sent; meanwhile its button and the events `stops` end the run, and the `resting` buttons
    do nothing.
    """

    def show(running: bool) -> dict:
        prompt_shows = gr.update(submit_btn=not running, stop_btn=running)
        return {prompt: prompt_shows} | {button: gr.update(interactive=not running) for button in resting}

    buttons = [prompt, *resting]
    busy = prompt.submit(lambda: show(running=True), None, buttons, **CONTROL)
    run = busy.then(function, [prompt, *inputs], outputs, api_name=name, show_progress_on=progress, **GENERATION)
    stop = gr.on([prompt.stop, *stops], None, cancels=run, **CONTROL)
    for end in (run.then, run.failure, stop.then):
        end(lambda: show(running=False), None, buttons, **CONTROL)


def build(runner: Runner, with_examples: bool, debug: bool = False) -> gr.Blocks:
    """
    The page.

    Args:
        runner (`Runner`): The model.
        with_examples (`bool`): Whether to offer phantoms, which only the small model knows.
        debug (`bool`, defaults to `False`): Whether tracebacks of what is no user's mistake are shown.
    """
    handlers = Handlers(runner)
    model = runner.model
    kinds = {task.kind for task in model.config.tasks.values()}
    with Page(debug, title="HealthGPT", analytics_enabled=False, delete_cache=(HOUR, 24 * HOUR)) as page:
        gr.HTML(HEADER.format(name=html.escape(Path(model.name_or_path).name)), elem_id="header", padding=False)
        with gr.Tabs():
            if "text" in kinds:
                with gr.Tab("Chat"), gr.Row():
                    with gr.Column(scale=3):
                        answered = gr.State()  # beside a tab it would count as one
                        chatbot = gr.Chatbot(show_label=False, buttons=["copy"], placeholder=CHAT_HINT, elem_id="chat")
                        prompt = prompt_box("Ask a question", autofocus=True)
                        progress = gr.Markdown(elem_classes="progress")
                        with gr.Accordion("Look inside the last answer", open=False):
                            explain = gr.Button("Show experts and attention", size="sm")
                            figures = gr.Gallery(show_label=False, columns=1, object_fit="contain", elem_id="inside")
                    with gr.Column(scale=1, min_width=280):
                        task = task_picker(model, "text")
                        with gr.Accordion("Settings", open=False):
                            length = gr.Slider(1, 2048, 1024, step=1, label="Longest answer (tokens)")
                            frame = frame_field()
                            controls = sampling_controls()
                        if with_examples:
                            offer_examples(
                                prompt, (comprehension_sample("test", number, kind) for kind, number in ASKED)
                            )
                looking = explain.click(handlers.explain, [chatbot, answered], figures, api_name="explain", **FIGURES)
                gr.on([prompt.submit, chatbot.clear], None, cancels=looking, **CONTROL)
                settings = [chatbot, task, length, frame, *controls]
                shown = [prompt, chatbot, answered, figures]
                generate_on_submit(
                    prompt, handlers.chat, settings, shown, progress, "chat", resting=[explain], stops=[chatbot.clear]
                )
                # Once the run is cancelled, since tokens that were on their way bring back the chat that the browser emptied.
                chatbot.clear(lambda: (None, None, None), None, [chatbot, answered, figures], **CONTROL)
            if "image" in kinds:
                with gr.Tab("Draw"), gr.Row():
                    with gr.Column(scale=3):
                        slider = gr.ImageSlider(
                            label="Before and after",
                            format="png",
                            buttons=["fullscreen"],
                            interactive=False,
                            elem_id="slider",
                        )
                        picture = gr.Image(
                            label="Drawing", format="png", buttons=["fullscreen"], visible=False, elem_id="drawing"
                        )
                        with gr.Row():
                            progress = gr.Markdown(elem_classes="progress")
                            download = gr.DownloadButton("Download", size="sm", interactive=False, scale=0)
                        prompt = prompt_box("Say what to draw", autofocus=False)
                    with gr.Column(scale=1, min_width=280):
                        task = task_picker(model, "image")
                        with gr.Accordion("Settings", open=False):
                            frame = frame_field()
                            controls = sampling_controls()
                        if with_examples:
                            offer_examples(prompt, (drawing_sample("test", 0, kind) for kind in INSTRUCTIONS))
                shown = [slider, picture, progress, download]
                generate_on_submit(prompt, handlers.draw, [task, frame, *controls], shown, progress, "draw")
    return page


def serve(
    runner: Runner,
    host: str,
    port: int,
    with_examples: bool,
    max_file_size: int = MAX_FILE_SIZE,
    debug: bool = False,
) -> gr.Blocks:
    """
    Starts to serve the page, to this machine or network only, and returns it.

    Args:
        runner, with_examples, debug: As in [`build`].
        host (`str`): Address to listen at.
        port (`int`): Port to listen at.
        max_file_size (`int`, defaults to 100 MB): Bytes of the largest file that is taken, and of the body of any other request.
    """
    page = build(runner, with_examples, debug)
    route_utils.GradioMultiPartParser = NamelessParser  # Gradio has no setting for the names of uploads
    page.launch(
        max_file_size=max_file_size,
        app_kwargs={"middleware": [Middleware(Guard, max_bytes=max_file_size, debug=debug)]},
        prevent_thread_lock=True,
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        ssr_mode=False,
        enable_monitoring=False,
        run_history=False,
        footer_links=[],
        theme=THEME,
        css_paths=Path(__file__).with_name("page.css"),
    )
    return page
