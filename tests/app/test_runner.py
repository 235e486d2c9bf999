"""Generations that are watched, stopped and waited for, with the golden M3."""

import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import cases_of, inputs_of, messages_of

from healthgpt.app.common import NANO
from healthgpt.app.common import load as load_checkpoint
from healthgpt.app.runner import Runner
from healthgpt.explain import look_inside, plots
from healthgpt.phantoms.anatomy import draw_brain_pair
from healthgpt.phantoms.samples import INSTRUCTIONS

CASES = ("comprehension/0", "comprehension/1", "comprehension/2", "comprehension/two_pictures")
QUESTION = [{"role": "user", "content": "What is this?"}]
INSTRUCTION = [{"role": "user", "content": "Draw a chest X-ray."}]


class Steps:
    """Counts the steps of a model, which can be slowed down or held at one."""

    def __init__(self, model):
        self.count, self.pause, self.last = 0, 0.0, math.inf
        model.register_forward_pre_hook(self.step)

    def hold_after(self, number):
        self.count, self.last = 0, number

    def release(self, pause=0.0):
        self.pause, self.last = pause, math.inf

    def wait_until_held(self):
        while self.count <= self.last:
            time.sleep(0.01)

    def step(self, *inputs):
        self.count += 1
        time.sleep(self.pause)
        while self.count > self.last:
            time.sleep(0.01)


@pytest.fixture
def runner(load):
    runner = Runner(*load("m3"))
    yield runner
    runner.close()


def whole_answer(runner, messages, **options):
    *_, (answer, ids) = runner.answer(messages, "comprehension", **options)
    return answer, ids


def draw(runner):
    return [rows for _, rows in runner.draw(INSTRUCTION, "generation")]


def test_answers_and_drawings_grow_into_those_that_are_published(runner, checkpoints):
    for case in cases_of(checkpoints("m3"), *CASES):
        grown = list(runner.answer(messages_of(case), "comprehension", max_new_tokens=case["max_new_tokens"]))
        assert grown[-1][1] == case["generated_ids"]
        for answer, ids in grown:
            assert ids == case["generated_ids"][: len(ids)]
            assert answer == runner.processor.decode(ids, skip_special_tokens=True).strip()
    drawn = list(runner.draw(INSTRUCTION, "generation"))
    rows = [rows for _, rows in drawn]
    assert (
        rows == sorted(rows) and rows[-1] == 8 and {picture is None for picture, rows in drawn if rows == 0} <= {True}
    )


def test_the_rows_of_a_drawing_look_as_they_will_in_the_whole():
    """The decoder sees the rows to come too: what stands for them must not colour those that are written."""
    runner = Runner(*load_checkpoint(NANO, "cpu", None))
    runner.model.generation_config.codes_per_pass = 1  # a step for each code
    ct, _ = draw_brain_pair(np.random.default_rng(0))
    content = [{"type": "image", "image": ct.picture}, {"type": "text", "text": INSTRUCTIONS["ct_to_mri"]}]
    steps, parts = Steps(runner.model), {}
    steps.hold_after(1)
    for picture, rows in runner.draw([{"role": "user", "content": content}], "generation"):
        parts[rows] = picture
        steps.last += 1  # the next code is written once this one has been seen
    runner.close()
    whole = parts.pop(8)
    assert list(parts) == list(range(8)) and parts.pop(0) is None
    parts.pop(1)  # colours need more than one row to settle
    for rows, picture in parts.items():
        box = (0, 0, whole.width, whole.height * rows // 8)
        written, final = (np.asarray(image.convert("RGB").crop(box), dtype=float) for image in (picture, whole))
        assert np.abs(written - final).mean() < 20


def test_what_is_looked_into_is_what_was_written(runner, checkpoints, monkeypatch):
    drawn, plot_inside, names = [], plots.plot_inside, []
    monkeypatch.setattr(plots, "plot_inside", lambda *given: drawn.append(given[2:]) or plot_inside(*given))
    for case in cases_of(checkpoints("m3"), *CASES):
        messages = messages_of(case)
        answer, ids = whole_answer(runner, messages, max_new_tokens=case["max_new_tokens"])
        names.append([title for _, title in runner.explain(messages, ids, "comprehension")])
        inputs = inputs_of(runner.processor, case)
        sequences = runner.model.generate(**inputs, max_new_tokens=case["max_new_tokens"])
        routing, attention = look_inside(runner.model, inputs, sequences)
        torch.testing.assert_close(drawn[-1], (sequences, routing["comprehension"], attention))
        # what the text alone would not tell
        assert runner.processor.tokenizer(answer, add_special_tokens=False)["input_ids"] != ids
    assert names == [["Experts", *titles] for titles in (["Picture 1"], ["Picture 1"], [], ["Picture 1", "Picture 2"])]


def test_figures_are_drawn_while_others_generate(runner, monkeypatch):
    started, released, plot_inside = threading.Event(), threading.Event(), plots.plot_inside

    def held(*given):
        started.set()
        assert released.wait(60)
        return plot_inside(*given)

    monkeypatch.setattr(plots, "plot_inside", held)
    with ThreadPoolExecutor(2) as people:
        looking = people.submit(runner.explain, QUESTION, [369, 19], "comprehension")
        assert started.wait(60)
        try:
            assert people.submit(whole_answer, runner, QUESTION, max_new_tokens=4).result(60)
        finally:
            released.set()
        assert [title for _, title in looking.result(60)] == ["Experts"]


@pytest.mark.parametrize("written", [4, 12], ids=["before the first row", "after it"])
def test_when_a_runner_closes_those_that_it_serves_are_told(runner, written):
    steps = Steps(runner.model)
    steps.hold_after(written)
    with ThreadPoolExecutor(4) as people:
        asked = [people.submit(draw, runner)]
        steps.wait_until_held()
        asked.append(people.submit(whole_answer, runner, QUESTION))
        asked.append(people.submit(runner.explain, QUESTION, [369, 19], "comprehension"))
        while runner.thread._work_queue.qsize() < 2:
            time.sleep(0.01)
        closing = people.submit(runner.close)
        assert runner.closed.wait(60)
        steps.release()
        closing.result(60)
        assert steps.count == written + 1
        for person in asked:
            with pytest.raises(ValueError, match=r"^The server is being ended\.$"):
                person.result(60)
    with pytest.raises(ValueError, match=r"^The server is being ended\.$"):
        draw(runner)
