"""Answers and drawings that can be watched while they grow, and stopped: what the page shows, without the page."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from PIL import Image
from transformers import StoppingCriteria

from ..conversations import prepare
from ..errors_healthgpt import HealthGPTError


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
    token that is being written. Whatever is asked of a closed runner raises a `HealthGPTError`.

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
        self.thread.shutdown()

    def answer(
        self, messages: list[dict], task: str, seed: int | None = None, **options
    ) -> Iterator[tuple[str, list[int]]]:
        """
        Yields the answer to a conversation and its ids as it grows; the last one is whole.

        Args:
            messages (`list[dict]`): As for `apply_chat_template`.
            task (`str`): A task that answers in words.
            seed (`int`, *optional*): Sample with this seed; by default the answer is greedy.
            options: Of `generate`: `max_new_tokens`, `temperature`, ...

        Raises:
            HealthGPTError: if `apply_chat_template` or `generate` refuse the conversation, or the runner is closed.
        """
        inputs = prepare(self.processor, messages, task).to(self.model.device)
        for sequences in self._watch(inputs, task, seed, options):
            ids = sequences[0, inputs["input_ids"].shape[1] :].tolist()
            yield self.processor.decode(ids, skip_special_tokens=True).strip(), ids

    def draw(
        self, messages: list[dict], task: str, seed: int | None = None, **options
    ) -> Iterator[tuple[Image.Image | None, int]]:
        """
        Yields the picture so far and how many whole rows of codes it has, after every token: a reader can stop at any of them.

        Missing rows are grey; there is no picture before the first row.

        Args:
            messages, seed, options: As for `answer`.
            task (`str`): A task that draws.

        Raises:
            HealthGPTError: as `answer`.
        """
        inputs = prepare(self.processor, messages, task).to(self.model.device)
        grid = self.model.config.vqgan_config.grid_size
        picture, rows = None, 0
        for sequences in self._watch(inputs, task, seed, options):
            written = sequences.shape[1] - inputs["input_ids"].shape[1]
            if written // grid > rows:
                rows = written // grid
                # Whole pictures only can be decoded: the last row stands for those to come, and is cut off again.
                padding = sequences[:, -grid:].repeat(1, grid)[:, : grid**2 - written]
                pixels = self.model.decode_image_tokens(torch.cat([sequences, padding], dim=1))
                [picture] = self.processor.post_process_multimodal_output(pixels, generation_mode="image")
                picture.paste("grey", (0, picture.height * rows // grid, picture.width, picture.height))
            yield picture, rows

    def explain(self, messages: list[dict], ids: list[int], task: str) -> list[tuple[Image.Image, str]]:
        """
        Figures, with titles, of how the routers weighed the experts and where the tokens of an answer looked in each picture.

        The model's thread is asked for the numbers alone: others may generate while the figures are drawn.

        Args:
            messages (`list[dict]`): The conversation up to the answer, as for `apply_chat_template`.
            ids (`list[int]`): The answer, as `answer` yields it.
            task (`str`): The task that answered.

        Raises:
            ModuleNotFoundError: if matplotlib is not installed.
            HealthGPTError: as `answer`.
        """
        from ..explain import look_inside
        from ..explain.plots import as_picture, plot_inside

        inputs = prepare(self.processor, messages, task).to(self.model.device)
        written = torch.tensor([ids], device=self.model.device)
        sequences = torch.cat([inputs["input_ids"], written], dim=1)
        inside = self._submit(lambda: look_inside(self.model, inputs, sequences, task))
        routing, attention = inside.result()
        figures = plot_inside(self.processor, inputs, sequences, routing[task], attention)
        titles = ["Experts", *(f"Picture {number}" for number in range(1, len(figures)))]
        return [(as_picture(figure), title) for figure, title in zip(figures, titles, strict=True)]

    def _submit(self, function: Callable) -> Future:
        """Has the model's thread call a function in its turn, unless the runner is closed before the function has ended."""
        ended = HealthGPTError("The server is being ended.")

        def call():
            result = None if self.closed.is_set() else function()
            if self.closed.is_set():
                raise ended
            return result

        try:
            return self.thread.submit(call)
        except RuntimeError as error:  # the thread takes no more
            raise ended from error

    def _watch(self, inputs, task: str, seed: int | None, options: dict) -> Iterator[torch.LongTensor]:
        """Yields the ids (1, length) of prompt and what is written, the newest each time and the whole at last."""
        watcher = Watcher(self.closed)

        def generate():
            if seed is not None:
                torch.manual_seed(seed)
            sampling = {"do_sample": seed is not None, **options}
            return self.model.generate(**inputs, task=task, stopping_criteria=[watcher], **sampling)

        generation = self._submit(generate)
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
