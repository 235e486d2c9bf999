"""Answers and drawings that can be watched while they grow, and stopped: what the page shows, without the page."""

import io
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from PIL import Image
from transformers import StoppingCriteria

from ..conversations import prepare


class Watcher(StoppingCriteria):
    """
    Sees what a generation has written after every token, and ends it on demand.

    Args:
        closed (`threading.Event`): Ends every generation of a runner; `stopped` ends this one.
    """

    def __init__(self, closed: threading.Event):
        self.news = threading.Event()
        self.stopped = threading.Event()
        self.closed = closed
        self.sequences = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        self.sequences = input_ids
        self.news.set()
        ended = self.stopped.is_set() or self.closed.is_set()
        return torch.full((len(input_ids),), ended, device=input_ids.device)


class Runner:
    """
    One model for several people: it generates for one at a time, in a thread of its own.

    An iterator that is closed before its end, as the page does when somebody stops or leaves, ends its generation after the
    token that is being written.

    Args:
        model (`HealthGPTForConditionalGeneration`): The model.
        processor (`HealthGPTProcessor`): Its processor.
    """

    def __init__(self, model, processor):
        self.model = model
        self.processor = processor
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.closed = threading.Event()

    def close(self) -> None:
        """Ends the running generation after the token that is being written, and those that wait for their turn."""
        self.closed.set()
        self.thread.shutdown(cancel_futures=True)

    def answer(self, messages: list[dict], task: str, seed: int | None = None, **options) -> Iterator[str]:
        """
        Yields the answer to a conversation as it grows; the last one is whole.

        Args:
            messages (`list[dict]`): As for `apply_chat_template`.
            task (`str`): A task that answers in words.
            seed (`int`, *optional*): Sample with this seed; by default the answer is greedy.
            options: Of `generate`: `max_new_tokens`, `temperature`, ...

        Raises:
            ValueError: if `apply_chat_template` or `generate` refuse the conversation.
        """
        inputs = prepare(self.processor, messages, task).to(self.model.device)
        for sequences in self._watch(inputs, task, seed, options):
            written = sequences[0, inputs["input_ids"].shape[1] :]
            yield self.processor.decode(written, skip_special_tokens=True).strip()

    def draw(
        self, messages: list[dict], task: str, seed: int | None = None, **options
    ) -> Iterator[tuple[Image.Image, int]]:
        """
        Yields the picture and how many rows of codes it has, whenever there are more; missing rows are grey.

        Args:
            messages, seed, options: As for `answer`.
            task (`str`): A task that draws.

        Raises:
            ValueError: as `answer`.
        """
        inputs = prepare(self.processor, messages, task).to(self.model.device)
        grid = self.model.config.vqgan_config.grid_size
        rows = 0
        for sequences in self._watch(inputs, task, seed, options):
            written = sequences.shape[1] - inputs["input_ids"].shape[1]
            if written // grid > rows:
                rows = written // grid
                # Whole pictures only can be decoded: the last code stands for those to come, and is cut off again.
                padding = sequences[:, -1:].expand(-1, grid**2 - written)
                pixels = self.model.decode_image_tokens(torch.cat([sequences, padding], dim=1))
                [picture] = self.processor.post_process_multimodal_output(pixels, generation_mode="image")
                picture.paste("grey", (0, picture.height * rows // grid, picture.width, picture.height))
                yield picture, rows

    def explain(self, messages: list[dict], answer: str, task: str) -> list[tuple[Image.Image, str]]:
        """
        Figures, with titles, of how the routers weighed the experts and where the words of an answer looked in each picture.

        Args:
            messages (`list[dict]`): The conversation up to the answer, as for `apply_chat_template`.
            answer (`str`): What was answered.
            task (`str`): The task that answered.

        Raises:
            ValueError: if there is no picture in the conversation.
            ModuleNotFoundError: if matplotlib is not installed.
        """
        from ..explain import attention_over_pictures, trace_routing
        from ..explain.plots import plot_attention, plot_routing

        def trace():
            inputs = prepare(self.processor, messages, task).to(self.model.device)
            written = self.processor.tokenizer(answer, add_special_tokens=False, return_tensors="pt")["input_ids"]
            sequences = torch.cat([inputs["input_ids"], written.to(self.model.device)], dim=1)
            with trace_routing(self.model) as routing:
                attention = attention_over_pictures(self.model, inputs, sequences, task)
            figures = [plot_routing(routing[task])]
            for pixels, grids in zip(inputs["pixel_values"], attention, strict=True):
                figures.append(plot_attention(self.processor, pixels, grids, sequences[0]))
            return figures

        figures = self.thread.submit(trace).result()  # no other generation may run meanwhile
        titles = ["Experts", *(f"Picture {number}" for number in range(1, len(figures)))]
        return [(as_picture(figure), title) for figure, title in zip(figures, titles, strict=True)]

    def _watch(self, inputs, task: str, seed: int | None, options: dict) -> Iterator[torch.LongTensor]:
        """Yields the ids (1, length) of prompt and what is written, the newest each time and the whole at last."""
        watcher = Watcher(self.closed)

        def generate():
            if seed is not None:
                torch.manual_seed(seed)
            sampling = {"do_sample": seed is not None, **options}
            return self.model.generate(**inputs, task=task, stopping_criteria=[watcher], **sampling)

        generation = self.thread.submit(generate)
        generation.add_done_callback(lambda _: watcher.news.set())
        try:
            while not generation.done():
                watcher.news.wait()
                watcher.news.clear()
                if watcher.sequences is not None:
                    yield watcher.sequences
            yield generation.result()
        finally:
            watcher.stopped.set()


def as_picture(figure) -> Image.Image:
    """A matplotlib figure as pixels."""
    file = io.BytesIO()
    figure.savefig(file, dpi=150)
    return Image.open(file)
