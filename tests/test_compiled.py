"""Decoding that transformers compiles: a static cache, one graph for all passes of a call and of the next calls, the same ids."""

import pytest
import torch
from conftest import cases_of, inputs_of
from transformers.generation import CompileConfig


@pytest.fixture
def compiled():
    """
    Arguments of `generate` that compile its passes on the CPU too, without a break; and of each graph that came of it the shape of
    the ids that it reads, and its inputs that are not tensors: those would need a CUDA graph for each value.
    """
    graphs = []

    def backend(graph, inputs):
        values = [node.meta["example_value"] for node in graph.graph.nodes if node.op == "placeholder"]
        ids = next(
            value
            for value in values
            if isinstance(value, torch.Tensor) and value.dtype == torch.long and value.ndim == 2
        )
        graphs.append((tuple(ids.shape), [value for value in values if not isinstance(value, torch.Tensor)]))
        return graph.forward

    torch._dynamo.reset()
    config = CompileConfig(fullgraph=True, mode=None, backend=backend)
    config._compile_all_devices = True
    yield {"cache_implementation": "static", "compile_config": config}, graphs
    torch._dynamo.reset()


@pytest.mark.parametrize("codes_per_pass", [1, 7, None])
@pytest.mark.parametrize("name", ["m3", "made_m3"], ids=["whole_window", "sliding_window"])
def test_a_drawing_is_compiled_once(name, codes_per_pass, load, checkpoints, compiled):
    options, graphs = compiled
    model, processor = load(name)
    for case in checkpoints(name).cases:
        if case["task"] != "generation":
            continue
        inputs = inputs_of(processor, case)
        for _ in range(2):
            sequences = model.generate(
                **inputs, task="generation", codes_per_pass=codes_per_pass, max_cache_len=256, **options
            )
            assert sequences[0, inputs["input_ids"].shape[1] :].tolist() == case["generated_ids"]
    width = codes_per_pass or min(128, model.config.num_image_codes)
    assert graphs == [((1, width), [])]


@pytest.mark.parametrize("name", ["m3", "made_m3"], ids=["whole_window", "sliding_window"])
def test_answers_are_compiled_once(name, load, checkpoints, compiled):
    options, graphs = compiled
    model, processor = load(name)
    for case in checkpoints(name).cases:
        if case["task"] == "comprehension":
            inputs = inputs_of(processor, case)
            sequences = model.generate(
                **inputs, max_new_tokens=len(case["generated_ids"]), max_cache_len=256, **options
            )
            assert sequences[0, inputs["input_ids"].shape[1] :].tolist() == case["generated_ids"]
    assert graphs == [((1, 1), [])]


@pytest.mark.parametrize(
    "order", [("comprehension/0", "generation/0"), ("generation/0", "comprehension/0", "generation/1")]
)
def test_a_batch_of_both_kinds_is_compiled_once(order, m3, load, compiled):
    options, graphs = compiled
    model, processor = load("m3")
    cases = cases_of(m3[0], *order)
    inputs = inputs_of(processor, cases)
    call = {"task": [case["task"] for case in cases], "max_new_tokens": 24}
    expected = model.generate(**inputs, **call)
    assert torch.equal(model.generate(**inputs, **call, **options), expected)
    assert len(graphs) == 1 and graphs[0][1] == []


def test_a_larger_batch_reads_fewer_codes_of_each_image(m3, load, compiled):
    options, graphs = compiled
    model, processor = load("m3")
    [case] = cases_of(m3[0], "generation/0")
    sequences = model.generate(**inputs_of(processor, [case] * 16), task="generation", **options)
    assert sequences[:, -len(case["generated_ids"]) :].tolist() == [case["generated_ids"]] * 16
    assert graphs == [((16, 128 // 16), [])]
