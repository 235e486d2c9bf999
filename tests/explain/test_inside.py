"""Traces of whole runs against the plain restatement of the published computation, which shares no code with the package."""

import json
import math
import threading
from collections import namedtuple

import published
import pytest
import torch
from conftest import cases_of, continuation, inputs_of, pictures_of
from published import IMAGE, Published
from transformers import AutoModelForImageTextToText, AutoProcessor

from healthgpt.explain import attention_over_pictures, look_inside, trace_routing

Run = namedtuple("Run", "checkpoint model cases tasks inputs sequences routing restated")
ROWS = {
    "m3": ("generation/1", "comprehension/0", "comprehension/two_pictures", "generation/2", "comprehension/2"),
    "l14": ("comprehension/0", "comprehension/1"),
    "xl32": ("comprehension/1", "comprehension/0"),
    "made_m3": (
        "comprehension/0",
        "generation/0",
        "comprehension/1",
        "generation/1",
    ),  # 3 and 5 experts, sliding window
}


class Restatement(Published):
    """Keeps the expert weights by linear and the attention of every layer `(heads, length, length)` of its last forward."""

    def linear(self, x, name, task):
        route = self.plugins[task][f"base_model.model.{name}.lora_route.weight"]
        self.experts[name.removeprefix("model.")] = (x @ route.T).softmax(-1)
        return super().linear(x, name, task)

    def run(self, ids, pictures, task):
        self.experts, attentions = {}, []

        def attention(query, key, value, mask=None):
            if mask is not None:  # the language model's, not the vision tower's
                attentions.append((query @ key.transpose(1, 2) / math.sqrt(query.shape[-1]) + mask).softmax(-1))
            return original(query, key, value, mask)

        original = published.attention
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(published, "attention", attention)
            self.logits(ids, pictures, task)
        return self.experts, torch.stack(attentions)


@pytest.fixture(scope="module", params=ROWS)
def run(request, checkpoints):
    """One padded batch of all kinds of rows through `generate`, traced, and what the restatement says of each row."""
    checkpoint = checkpoints(request.param)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint.folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(checkpoint.folder, trust_remote_code=True)
    cases = cases_of(checkpoint, *ROWS[request.param])
    tasks = [case["task"] for case in cases]
    inputs = inputs_of(processor, cases)
    assert (inputs["attention_mask"] == 0).any()
    with trace_routing(model) as routing:
        sequences = model.generate(**inputs, task=tasks, max_new_tokens=12)

    content = json.loads((checkpoint.source / "cases.json").read_text())
    restatement = Restatement(checkpoint.source, content["template"])
    restatement.alphas = {task: plugin["alpha"] for task, plugin in content["plugins"].items()}
    num_codes = content.get("num_codes", content["plugins"]["comprehension"].get("n_new_tokens", 0) - 3)
    if num_codes > 0:
        restatement.add_image_tokens(num_codes)
    restated = []
    for case, sequence in zip(cases, sequences, strict=True):
        new = continuation(sequence, inputs["input_ids"].shape[1], case)
        restated.append(restatement.run([*case["input_ids"], *new[:-1]], pictures_of(case), case["task"]))
    return Run(checkpoint, model, cases, tasks, inputs, sequences, routing, restated)


def test_expert_weights_of_generate(run):
    plugins = json.loads((run.checkpoint.source / "cases.json").read_text())["plugins"]
    assert run.routing.keys() == set(run.tasks)
    for task, weights in run.routing.items():
        rows = [index for index, name in enumerate(run.tasks) if name == task]
        assert weights.keys() == run.restated[rows[0]][0].keys()
        for linear, traced in weights.items():
            assert traced.shape == (len(rows), run.sequences.shape[1] - 1, plugins[task]["n"])
            assert traced.dtype == torch.float32
            torch.testing.assert_close(traced.sum(dim=-1), torch.ones(traced.shape[:2]))
            for row, index in zip(traced, rows, strict=True):
                expected = run.restated[index][0][linear]
                start = int((run.inputs["attention_mask"][index] == 0).sum())
                torch.testing.assert_close(row[start : start + len(expected)], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("layer", [None, 0, -1])
def test_attention_over_pictures(run, layer):
    config = run.model.config
    patches, side = config.num_image_patches, math.isqrt(config.num_image_patches)
    grids = attention_over_pictures(run.model, run.inputs, run.sequences, run.tasks, layer)
    new_tokens = run.sequences.shape[1] - run.inputs["input_ids"].shape[1]
    assert grids.shape == (len(run.inputs["pixel_values"]), new_tokens, side, side)
    grids = iter(grids)
    for case, (_, attentions) in zip(run.cases, run.restated, strict=True):
        attention = attentions.mean(dim=0) if layer is None else attentions[layer]
        positions = [id for id in case["input_ids"] for _ in range(patches if id == IMAGE else 1)]
        starts = [index for index, id in enumerate(positions) if id == IMAGE][::patches]
        for start in starts:
            expected = attention.mean(dim=0)[len(positions) - 1 :, start : start + patches].unflatten(1, (side, side))
            torch.testing.assert_close(next(grids)[: len(expected)], expected, atol=1e-5, rtol=0)
    assert next(grids, None) is None


def test_attention_is_that_of_the_steps_of_generate(load, checkpoints):
    eager, processor = load("m3", attn_implementation="eager")
    model, _ = load("m3")
    [case] = cases_of(checkpoints("m3"), "comprehension/two_pictures")
    inputs = inputs_of(processor, case)
    outputs = eager.generate(**inputs, output_attentions=True, return_dict_in_generate=True)
    pictures = inputs["input_ids"][0] == eager.config.image_token_id
    steps = [
        torch.stack([layer[0, :, -1].mean(dim=0) for layer in step]).mean(dim=0)[: len(pictures)][pictures]
        for step in outputs.attentions
    ]
    grids = attention_over_pictures(model, inputs, outputs.sequences)
    torch.testing.assert_close(grids.transpose(0, 1).flatten(1), torch.stack(steps))
    assert model.model.language_model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["comprehension/two_pictures", "comprehension/2"])
def test_both_at_once_are_those_of_generate(name, m3):
    checkpoint, model, processor = m3
    inputs = inputs_of(processor, cases_of(checkpoint, name)[0])
    with trace_routing(model) as expected:
        sequences = model.generate(**inputs, max_new_tokens=12)
    routing, attention = look_inside(model, inputs, sequences)
    assert routing.keys() == expected.keys()
    torch.testing.assert_close(routing["comprehension"], expected["comprehension"], atol=1e-5, rtol=0)
    if "pixel_values" in inputs:
        assert torch.equal(attention, attention_over_pictures(model, inputs, sequences))
    else:
        assert attention is None


def test_nothing_stays_behind(m3):
    checkpoint, model, processor = m3
    inputs = inputs_of(processor, cases_of(checkpoint, "comprehension/0")[0])

    def hooks():
        return sum(len(module._forward_hooks) for module in model.modules())

    before = hooks()
    with trace_routing(model):
        assert hooks() > before
    with pytest.raises(KeyError), trace_routing(model) as routing:
        model(**inputs)
        raise KeyError
    assert routing == {}
    sequences = torch.nn.functional.pad(inputs["input_ids"], (0, 2), value=5)
    with pytest.raises(ValueError, match="no task 'nothing'"):
        attention_over_pictures(model, inputs, sequences, "nothing")
    assert hooks() == before
    assert model.model.language_model.config._attn_implementation == "sdpa"


def test_other_threads_are_not_traced(m3):
    checkpoint, model, processor = m3
    inputs = inputs_of(processor, cases_of(checkpoint, "comprehension/0")[0])
    with trace_routing(model) as routing, torch.no_grad():
        other = threading.Thread(target=lambda: model(**inputs, task="generation"))
        other.start()
        other.join()
        model(**inputs)
    assert list(routing) == ["comprehension"]
    assert routing["comprehension"]["layers.0.mlp.down_proj"].shape == (1, inputs["input_ids"].shape[1], 4)


def test_inputs_that_do_not_fit_are_refused(m3):
    checkpoint, model, processor = m3
    with_picture, without = (inputs_of(processor, case) for case in cases_of(checkpoint, *ROWS["m3"][1::3]))
    with pytest.raises(ValueError, match="no pixel_values"):
        attention_over_pictures(model, without, without["input_ids"])
    with pytest.raises(ValueError, match="give what generate returned, whole"):
        attention_over_pictures(model, with_picture, with_picture["input_ids"][:, 3:])
    for inputs in (with_picture, without):
        with pytest.raises(
            ValueError, match="The answer is empty: the sequences end where the prompts of the inputs do"
        ):
            look_inside(model, inputs, inputs["input_ids"])
